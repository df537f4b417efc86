"""What `RLSDTrainer` refuses beside its settings: arguments, rows, models, credit functions.

Settings are refused in `config`. Each check raises ValueError, unless it says otherwise, with the
value and what works instead.
"""

import inspect
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, ProcessorMixin
from trl.trainer.utils import get_callable_name, is_async_callable

from rlsd_lib import methods, prompts
from rlsd_lib.credit import Credit
from rlsd_lib.names import alike, nearest
from rlsd_lib.trainer import states
from rlsd_lib.trainer.config import HARMLESS, SAMPLED, RLSDConfig
from rlsd_lib.trainer.sharded import is_sharded, shape_of

# Config fields by which a model changes its logits after the head, which `divergence` does not do.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
LOGIT_CHANGES += ("lm_head_multiplier", "output_multiplier")
# Of a model's generation_config: what TRL sets itself or has no effect, and what has none at 1.
GIVEN_BY_TRL = {
    *("temperature", "top_k", "top_p", "repetition_penalty", "do_sample", "max_new_tokens"),
    *("max_length", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "num_return_sequences", "length_penalty"),
}
NEUTRAL_AT_ONE = ("num_beams", "top_h", "typical_p", "encoder_repetition_penalty")
NEUTRAL_AT_ONE += ("guidance_scale", "num_beam_groups")
VIDEO_ADVICE = (
    "GRPO in TRL 1.16 would generate with it and train without it. Drop these rows, or give chosen "
    "frames as images."
)


logger = logging.getLogger(__name__)


def check_arguments(
    reward_funcs: Any,
    args: RLSDConfig,
    dataset: Any,
    teacher_model: Any,
    rollout_func: Any = None,
    environment_factory: Any = None,
) -> None:
    """Judge what a trainer is given, before any model is loaded."""
    sees, method = args.row.teacher_sees, f"method={args.method!r}"
    if sees == methods.PROMPT and teacher_model is None:
        raise ValueError(f"{method} needs teacher_model=, the model to distil from.")
    if sees != methods.PROMPT and teacher_model is not None:
        raise ValueError(f"{method} teaches itself: teacher_model= is for method='opd' only.")
    if sees == methods.PEER and not reward_funcs:
        raise ValueError(f"{method} needs reward_funcs: they decide which rollouts peers see.")
    if args.uses_teacher and rollout_func is not None:
        raise ValueError("rollout_func builds its own prompt ids. Use tools or environments.")
    if args.max_teacher_prompt_length is not None and environment_factory is not None:
        raise ValueError(
            f"max_teacher_prompt_length={args.max_teacher_prompt_length} with environment_factory: "
            "TRL renders whole batches, of which none can be shortened. Shorten the references."
        )
    if isinstance(dataset, Dataset):
        columns = dataset.column_names
        if "prompt" not in columns:
            raise ValueError(f"The dataset has no 'prompt' column{nearest('prompt', columns)}.")
        _check_videos(dataset)
    if args.uses_teacher and sees == methods.PRIVILEGED:
        column = args.privileged_column
        _check_column(dataset, column, method)
        if isinstance(dataset, Dataset):  # a streamed one is checked batch by batch
            contexts = dataset[column][:]
            if environment_factory is None:  # whose observations may be what makes a prompt
                prompts.check_prompts(dataset["prompt"][:], args.privileged_template)
            prompts.check_contexts(contexts, args.privileged_template, column)
            prompts.count_in_prompts(dataset["prompt"][:], contexts, column)


def check_wrong_references(dataset: Any, asked: Collection[str], args: RLSDConfig) -> list[str]:
    """The references that a wrong one is drawn from; none where nothing asks for one."""
    count, asking = args.wrong_references, sorted(methods.NEEDS_WRONG.intersection(asked))
    column = args.privileged_column
    if count > 1 and "wrong_gaps" not in asking:
        what = f"wrong_references={count}"
        raise ValueError(f"{what} means nothing where no credit asks for wrong_gaps. Set it to 1.")
    if not asking:
        return []
    if args.row.teacher_sees == methods.PEER:
        raise ValueError(
            f"peer_context=True with a credit that asks for {', '.join(asking)}: a peer's rollout "
            "differs from other rows' references in more than being right. Set it to False."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{', '.join(asking)} need wrong references, drawn from the whole {column!r} column: not "
            "of a streaming data set. Give a datasets.Dataset."
        )
    _check_column(dataset, column, ", ".join(asking))
    distinct = prompts.distinct_references(dataset[column][:])
    if len(distinct) <= count:
        raise ValueError(
            f"wrong_references={count} needs {count + 1} different references or more, {column!r} "
            f"has {len(distinct)}. Lower it, give other rows, or use a method without {asking[0]}."
        )
    return distinct


def _check_videos(dataset: Dataset) -> None:
    """Refuse rows with a video, in the prompt or in a column of its own, which TRL does not read."""
    found = {i for i, p in enumerate(dataset["prompt"][:]) if prompts.count_images(p, "video")}
    for name in {"video", "videos"} & set(dataset.column_names):
        found |= {i for i, video in enumerate(dataset[name][:]) if video}
    prompts.refuse(sorted(found), "hold a video", VIDEO_ADVICE)


def _check_column(dataset: Any, column: str, what: str) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and column not in columns:
        hint = "".join(f" (did you mean {name!r}?)" for name in alike(column, columns))
        raise ValueError(
            f"{what} needs a {column!r} column (str: what the teacher may see and the student may "
            f"not). The dataset has {columns}{hint}: set privileged_column to one of them, or add it."
        )


def check_teacher(
    student: nn.Module, teacher: nn.Module, tokenizer: Any, source: Any, args: RLSDConfig
) -> None:
    """Refuse a teacher of other tokens than the student's; a path's tokenizer is compared too."""
    if args.divergence is not None:
        _check_logits(teacher)
    heads = [states.causal_lm(model).get_output_embeddings() for model in (student, teacher)]
    sizes = [shape_of(head.weight)[0] for head in heads]
    if sizes[0] != sizes[1]:
        has = f"vocabulary has {sizes[1]} tokens and the student's {sizes[0]}"
        raise ValueError(f"The teacher's {has}. Use one with the student's tokenizer.")
    if not isinstance(source, str):
        return
    ours, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(source).get_vocab()
    if ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise ValueError(
            f"The teacher's tokenizer gives {token!r} the id {theirs.get(token)}, the student's "
            f"{ours.get(token)} (tokens: {len(theirs)} and {len(ours)}). Use a teacher with the "
            "student's tokenizer, saved beside its weights."
        )


def _check_logits(model: nn.Module) -> None:
    """Refuse models whose logits are more than head times state."""
    model = states.causal_lm(model)
    config = model.config.get_text_config()
    for name in LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(
                f"{type(model).__name__} changes its logits by config.{name}={getattr(config, name)}, "
                "unlike the divergence. Use distillation_mode='sampled_token', or another model."
            )


def check_sharding(model: nn.Module, args: RLSDConfig, accelerator: Accelerator) -> None:
    """Refuse FSDP1, and an average in weights so coarse that it would not move."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP1 is not supported with a teacher. Set fsdp_version: 2.")
    half = model.dtype in (torch.float16, torch.bfloat16)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    rounds = half or (deepspeed and accelerator.mixed_precision != "no")
    if args.teacher_model_kind == "ema" and not isinstance(model, PeftModel) and rounds:
        mixed = f"under DeepSpeed in {accelerator.mixed_precision}"
        raise ValueError(
            f"teacher_model_kind='ema' {f'with weights in {model.dtype}' if half else mixed}: steps "
            f"of {args.teacher_update_rate} of a small difference are rounded away. Load the model in "
            "float32 (under DeepSpeed with bf16=False), or use 'snapshot' or PEFT."
        )


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Raise on all ranks what a check inside raises on one, so that none waits. Collective."""
    own = None
    try:
        yield
    except Exception as error:
        own = error
    said = str(own) if isinstance(own, ValueError) else own and f"{type(own).__name__}: {own}"
    for found in gather_object([said]):
        if found is not None:
            raise own or ValueError(found)


def check_images(final: list[prompts.Prompt], accelerator: Accelerator) -> None:
    """Refuse final prompts with a video, and mixed batches where parameters are sharded.

    A rank whose rows have no image would not enter the vision tower, whose shards the other ranks
    wait for. Collective: every rank raises.
    """
    videos = sum(prompts.count_images(prompt, "video") > 0 for prompt in final)
    bare = sum(prompts.count_images(prompt) == 0 for prompt in final)
    counts = gather_object([(videos, bare, len(final))])
    videos, bare, rows = (sum(column) for column in zip(*counts, strict=True))
    if videos:
        raise ValueError(f"{videos} of {rows} prompts in a batch hold a video. {VIDEO_ADVICE}")
    if 0 < bare < rows and is_sharded(accelerator):
        raise ValueError(
            f"{bare} of {rows} prompts in a batch have no image: ranks would wait for one another in "
            "the sharded vision tower. Give every row an image, or use DDP or ZeRO-2."
        )


def _check_sampling(model: nn.Module, args: RLSDConfig) -> None:
    """Refuse generation settings of the model that would shape rollouts and not P_S; warn of ours."""
    own = getattr(states.causal_lm(model), "generation_config", None)
    given = {} if own is None or args.use_vllm else own.to_diff_dict()
    # What the arguments leave at None, `generate` takes from the model.
    free = HARMLESS | GIVEN_BY_TRL | {n for n in ("min_p",) if getattr(args, n) is not None}
    found = {name: value for name, value in given.items() if value and name not in free}
    if wrong := {k: v for k, v in found.items() if not (v == 1 and k in NEUTRAL_AT_ONE)}:
        raise ValueError(
            f"The model's generation_config has {wrong}: rollouts would be of another distribution "
            "than P_S. Set them to None."
        )
    cuts = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    if differ := {n: v for n, off in cuts.items() if (v := getattr(args, n)) not in (off, 0)}:
        size = f"up to {-math.log(args.top_p):.3f} nats a token for top_p" if args.top_p < 1 else ""
        said = "%s: rollouts come from another distribution than P_S; log-probabilities differ by "
        said += "the log of the mass that is cut, %s"
        logger.warning(said, differ, size or "which has no bound here")


def check_model(model: nn.Module, processing_class: Any, args: RLSDConfig) -> None:
    """Refuse dropout, which would put noise into the gap, and processors that pad right."""
    if args.divergence is not None:
        _check_logits(model)
    _check_sampling(model, args)
    noisy = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if getattr(model.config.get_text_config(), "attention_dropout", 0) > 0:
        noisy.append("config.attention_dropout")
    if noisy:
        raise ValueError(
            f"Dropout is active in {noisy[:3]} ({len(noisy)} places): noise in the gap. Set "
            "disable_dropout=True, lora_dropout=0, and attention_dropout=0 in the config."
        )
    own = args.row.teacher_sees != methods.PROMPT and args.teacher_model_kind != "live"
    adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    if args.use_vllm and own and getattr(adapter, "modules_to_save", None):
        raise ValueError(
            "TRL would send vLLM the teacher's copy of modules_to_save beside the student's. Train "
            "without them, without vLLM, or with teacher_model_kind='live'."
        )
    if isinstance(processing_class, ProcessorMixin):
        side = processing_class.tokenizer.padding_side
        if side != "left":
            raise ValueError(f"The processor pads {side!r}. Load it with padding_side='left'.")


# Credit functions from outside the table, and rewards


def check_credit(credit: Credit, args: RLSDConfig, signals: Any) -> tuple[str, ...]:
    """Keywords of a credit function of the caller's; refuses one that cannot or will not be called."""
    name = get_callable_name(credit)
    if methods.METHODS[args.method].teacher_sees != methods.PRIVILEGED or not args.uses_teacher:
        raise ValueError(
            f"credit={name} would never be called: method={args.method!r} with lambda_init="
            f"{args.lambda_init} has no teacher that reads the reference. Use method='rlsd' with "
            "lambda_init above 0."
        )
    replaced = {
        "weight_clip": args.weight_clip != "linear",
        "conserve_credit": args.conserve_credit,
        "credit_settings": args.credit_settings and args.row.weight is None,
        "policy_weight": args.policy_weight,
        "distillation_mode": args.distillation_mode == SAMPLED,
    }
    for option in (name for name, is_set in replaced.items() if is_set):
        raise ValueError(
            f"{option}={getattr(args, option)!r} is of the method's own credit, which credit={name} "
            "replaces. Leave it alone, and bind settings of yours by functools.partial."
        )
    args.check_keeps_token_credit(f"credit={name}")
    asked = check_asked("credit", credit, args, signals)
    if args.row.has_lambda:
        return asked
    lam = methods.keywords(credit).get("lam")
    if lam is not None and lam.default is lam.empty:
        raise ValueError(
            f"credit={name} takes lam, and method={args.method!r} has no schedule of it. Use "
            "method='rlsd', or bind lam by functools.partial."
        )
    return tuple(name for name in asked if name != "lam")


def check_asked(what: str, function: Credit, args: RLSDConfig, signals: Any) -> tuple[str, ...]:
    """The keywords that a function may be given, of `SIGNALS` or its own; `what` it is.

    Without a `signals` function, every keyword without a default must be one of `SIGNALS`.
    """
    signature, options = inspect.signature(function), methods.keywords(function)
    asked = [name for name in options if name in methods.SIGNALS]
    others = [name for name in options if name not in asked]
    first = list(signature.parameters)[:3]
    try:
        if first != ["advantages", "gap", "mask"] == sorted(first):
            raise TypeError(f"its first arguments are {', '.join(first)}, in another order")
        given = asked if signals is None else [*asked, *methods.from_caller(function)]
        signature.bind("advantages", "gap", "mask", **dict.fromkeys(given))
    except TypeError as problem:
        name = get_callable_name(function)
        raise ValueError(
            f"{what}={name}{signature} cannot be called: {problem}. Expected {name}(advantages "
            f"(N,), gap (N, T), mask (N, T), *, ...) -> (N, T), with any of {', '.join(methods.SIGNALS)}, "
            "or a name that RLSDTrainer(signals=fn) gives: fn(rows, completion_ids (N, T), mask "
            "(N, T)) -> {name: tensor (N,) or (N, T)}."
        ) from None
    for option in others if signals is None else []:
        # With a default it would never be given, and nobody would know.
        for meant in alike(option, methods.SIGNALS, cutoff=0.8):
            raise ValueError(
                f"{what}={get_callable_name(function)} has {option!r}, which is no signal: did you mean "
                f"{meant!r}? If it is a setting of yours, give it another name."
            )
    absent = {"reference_gap"} if args.beta == 0 else set()
    absent |= {"teacher_entropy", "contrast_kl"} if args.divergence is None else set()
    for name in asked:
        if name in absent:
            raise ValueError(
                f"{what}={get_callable_name(function)} asks for {name}, which nobody gives with method="
                f"{args.method!r} and beta={args.beta}. It comes from {methods.SIGNALS[name]}."
            )
    return (*asked, *others)


def check_signals_are_asked(signals: Any, asked: Collection[str]) -> None:
    """Refuse a `signals` function of which no credit function or weight takes anything."""
    if signals is not None and not set(asked) - set(methods.SIGNALS):
        name = get_callable_name(signals)
        raise ValueError(f"signals={name} would give what nothing takes. Leave it out.")


def check_signals(given: Any, shape: torch.Size, functions: Sequence[Credit]) -> None:
    """Refuse what a `signals` function returned, if it is not what credit functions ask for."""
    if not isinstance(given, Mapping):
        raise ValueError(f"signals returned {type(given).__name__}, expected a mapping of tensors.")
    for name, value in given.items():
        if name in methods.SIGNALS:
            raise ValueError(f"signals: {name!r}, which comes from {methods.SIGNALS[name]}.")
        if not isinstance(value, Tensor) or value.shape not in (shape, shape[:1]):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"signals returned {name!r} as {found}, expected a tensor (N,) or (N, T), "
                f"(N, T) = {tuple(shape)}."
            )
    for function in functions:
        if missing := sorted(methods.from_caller(function) - set(given)):
            name = get_callable_name(function)
            raise ValueError(f"{name} asks for {', '.join(missing)}, which signals did not return.")


def check_credited(credited: Any, shape: torch.Size, credit: Credit) -> None:
    """Refuse a credit function's result that is not a finite, detached (N, T) tensor. Collective."""
    returned = f"credit={get_callable_name(credit)} returned"
    with on_every_rank():
        if not isinstance(credited, Tensor) or credited.shape != shape:
            given = (
                tuple(credited.shape) if isinstance(credited, Tensor) else type(credited).__name__
            )
            expected = f"expected a tensor of shape (N, T) = {tuple(shape)}"
            raise ValueError(f"{returned} {given}, {expected}.")
        if credited.dtype == torch.bool:
            raise ValueError(f"{returned} a tensor of {credited.dtype}, expected numbers.")
        if credited.requires_grad:
            raise ValueError(f"{returned} a tensor with a gradient: detach what it computes from.")
        if not credited.isfinite().all():
            rows = (~credited.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(f"{returned} NaN or infinity in rows {rows[:10]}.")


def judged(function: Any) -> Any:
    """A plain reward function whose result is refused unless it is a number or None for each row."""
    if isinstance(function, nn.Module) or is_async_callable(function):
        return function

    def scored(**columns: Any) -> list[float | None]:
        try:
            return numbers(function(**columns), len(columns["prompts"]))
        except ValueError as problem:
            name = get_callable_name(function)
            raise ValueError(f"Reward function {name!r} {problem}") from problem

    return scored


def numbers(rewards: Any, count: int) -> list[float | None]:
    """Rewards as TRL takes them; ValueError unless they are `count` numbers or None, in order."""
    shapes = {tuple(getattr(reward, "shape", ())) for reward in rewards if reward is not None}
    if isinstance(rewards, Mapping | str) or len(rewards) != count or shapes - {()}:
        given = f"{type(rewards).__name__} {tuple(getattr(rewards, 'shape', (len(rewards),)))}"
        raise ValueError(f"returned {given}: expected a list of {count} numbers or None.")
    return [None if reward is None else float(reward) for reward in rewards]


def check_rewards(rewards: Tensor, names: Sequence[str], step: int, *, training: bool) -> float:
    """The share of rows that no function scored, of the rewards (N, functions) of all ranks.

    None (NaN here) means "not mine to judge" and is TRL's: the row's advantage is 0. Raises
    FloatingPointError for an infinite reward or, in training, not one row with a reward. TRL would
    turn both into advantages of 0.
    """
    if rewards.isinf().any():
        row, function = rewards.isinf().nonzero()[0].tolist()
        raise FloatingPointError(
            f"Reward function {names[function]!r} gave {rewards[row, function].item()} for row "
            f"{row} of all ranks' batch at step {step}. A reward is a finite number or None."
        )
    unscored = rewards.isnan().all(dim=1)
    if training and unscored.all():
        raise FloatingPointError(
            f"At step {step} none of {len(rewards)} rows got a reward: {', '.join(names)} returned "
            "None or NaN for all of them."
        )
    return unscored.float().mean().item()
