"""What `RLSDTrainer` refuses: arguments and rows before the model is loaded, models after."""

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, ProcessorMixin

from rlsd_lib import distillation, privileged
from rlsd_lib.config import RLSDConfig
from rlsd_lib.methods import PEER, PRIVILEGED, PROMPT
from rlsd_lib.sharded import FSDP1, sharding_of


def check_arguments(
    reward_funcs: Any, args: RLSDConfig, dataset: Any, teacher_model: Any, kwargs: dict[str, Any]
) -> None:
    """Judge what a trainer is given, before any model is loaded.

    Raises:
        ValueError: for a missing or misplaced teacher, reward, column or row.
    """
    sees = args.row.teacher_sees
    if (teacher_model is not None) != (sees == PROMPT):
        raise ValueError(
            f"method={args.method!r} "
            + (
                "needs teacher_model=, the model to distil from."
                if sees == PROMPT
                else "teaches itself: teacher_model= is for method='opd' only."
            )
        )
    if sees == PEER and not reward_funcs:
        raise ValueError(
            f"method={args.method!r} needs reward_funcs: they decide which rollouts are shown to "
            "their peers."
        )
    if args.uses_teacher and kwargs.get("rollout_func") is not None:
        raise ValueError(
            "rollout_func builds its own prompt ids, which the teacher's prompt cannot be matched "
            "to. Use tools or environment_factory instead."
        )
    if args.uses_teacher and sees == PRIVILEGED:
        _check_rows(dataset, args)
    if args.include_environment_feedback:
        _check_column(dataset, "include_environment_feedback=True")


def _check_rows(dataset: Any, args: RLSDConfig) -> None:
    """Check every row of a map-style dataset; a streamed one is checked batch by batch."""
    _check_column(dataset, f"method={args.method!r}")
    if isinstance(dataset, Dataset):
        contexts = dataset[privileged.COLUMN][:]
        privileged.check_contexts(contexts, args.privileged_template)
        privileged.count_in_prompts(dataset["prompt"][:], contexts)


def _check_column(dataset: Any, what: str) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and privileged.COLUMN not in columns:
        raise ValueError(
            f"{what} needs a {privileged.COLUMN!r} column (str: what the teacher may see and the "
            f"student may not). The dataset has {columns}."
        )


def check_teacher(
    student: nn.Module, teacher: nn.Module, tokenizer: Any, source: Any, args: RLSDConfig
) -> None:
    """Refuse another model as teacher whose probabilities are not of the student's tokens.

    `source` is what the user gave: a path, whose tokenizer is compared, or a model, whose
    tokenizer nobody can know.

    Raises:
        ValueError: naming the config field, the sizes, or the first token that differs.
    """
    if args.divergence is not None:
        distillation.check_logits(teacher)
    other = AutoTokenizer.from_pretrained(source) if isinstance(source, str) else None
    distillation.check_vocabularies(student, teacher, tokenizer, other)


def check_sharding(model: nn.Module, args: RLSDConfig, accelerator: Accelerator) -> None:
    """Refuse what has not been shown to work when parameters are sharded over ranks.

    Raises:
        ValueError: naming the setting and what does work.
    """
    kind = args.teacher_model_kind
    copies = kind != "live" and not isinstance(model, PeftModel)
    dense = args.divergence is not None or args.row.teacher_sees == PROMPT
    if sharding_of(accelerator) == FSDP1 and (copies or dense):
        raise ValueError(
            f"FSDP1 with method={args.method!r} and teacher_model_kind={kind!r}: a sharded copy of "
            "the teacher and full-vocabulary divergences need FSDP2. Set fsdp_version: 2, or use "
            "rlsd or sampled_token with teacher_model_kind='live' or a PEFT student."
        )
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed and copies and kind == "ema" and accelerator.mixed_precision != "no":
        raise ValueError(
            f"teacher_model_kind='ema' under DeepSpeed in {accelerator.mixed_precision}: DeepSpeed "
            f"keeps the teacher in half precision, where an average that moves by "
            f"{args.teacher_update_rate} of a small difference is rounded away. Set bf16=False, use "
            "FSDP2, whose weights stay in float32, or use 'snapshot' or PEFT."
        )


def check_images(prompts: list[privileged.Prompt]) -> None:
    """Refuse a batch of final prompts of which some have images and others none.

    TRL 1.16.0 generates for such a batch and then fails in its call of the processor.

    Raises:
        ValueError: naming how many have none.
    """
    bare = sum(privileged.count_images(prompt) == 0 for prompt in prompts)
    if 0 < bare < len(prompts):
        raise ValueError(
            f"{bare} of {len(prompts)} prompts in a batch have no image and the others have. TRL "
            "cannot mix them: give every row an image, or train on the two kinds apart."
        )


def check_model(model: nn.Module, processing_class: Any, args: RLSDConfig) -> None:
    """Refuse dropout, which would put noise into the gap, and processors that pad right.

    Raises:
        ValueError: naming the modules, the padding side, or what a divergence cannot handle.
    """
    if args.divergence is not None:
        distillation.check_logits(model)
    noisy = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    text = model.config.get_text_config()
    noisy += [f"config.{k}" for k in ("attention_dropout",) if getattr(text, k, 0) > 0]
    if noisy:
        raise ValueError(
            f"Dropout is active in {noisy[:3]} ({len(noisy)} places) and would put noise into the "
            "gap. Set disable_dropout=True, lora_dropout=0, and attention_dropout=0 in the config."
        )
    half = model.dtype in (torch.float16, torch.bfloat16)
    if args.teacher_model_kind == "ema" and half and not isinstance(model, PeftModel):
        raise ValueError(
            f"teacher_model_kind='ema' with weights in {model.dtype}: an average that moves by "
            f"{args.teacher_update_rate} of a small difference is rounded away. Load the model in "
            "float32 (with bf16=True for the compute), or use 'snapshot'."
        )
    if isinstance(processing_class, ProcessorMixin):
        side = processing_class.tokenizer.padding_side
        if side != "left":
            raise ValueError(
                f"The processor pads {side!r}; prompts must be padded on the left. Load it with "
                "padding_side='left'."
            )
