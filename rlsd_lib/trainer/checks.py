"""What `RLSDTrainer` refuses: arguments and rows before the model is loaded, models after."""

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, ProcessorMixin

from rlsd_lib import prompts as privileged
from rlsd_lib.methods import PEER, PRIVILEGED, PROMPT
from rlsd_lib.trainer import states as distillation
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.sharded import FSDP1, sharding_of
from rlsd_lib.trainer.states import IMAGE_FIELDS

VIDEO_ADVICE = (
    "GRPO in TRL 1.16 would generate with it and train without it. Drop these rows, or give chosen "
    "frames as images."
)


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
    if isinstance(dataset, Dataset):
        _check_videos(dataset)
    if args.uses_teacher and sees == PRIVILEGED:
        _check_rows(dataset, args)
    if args.include_environment_feedback:
        _check_column(dataset, "include_environment_feedback=True")


def _check_videos(dataset: Dataset) -> None:
    """Refuse rows with a video, in the prompt or in a column of its own, which TRL does not read."""
    found = set()
    if "prompt" in dataset.column_names:
        counts = (privileged.count_images(prompt, "video") for prompt in dataset["prompt"][:])
        found |= {i for i, count in enumerate(counts) if count}
    for name in {"video", "videos"} & set(dataset.column_names):
        found |= {i for i, video in enumerate(dataset[name][:]) if video}
    privileged.refuse(sorted(found), "hold a video", VIDEO_ADVICE)


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


def check_images(prompts: list[privileged.Prompt], accelerator: Accelerator) -> None:
    """Refuse final prompts that hold a video, and mixed batches where parameters are sharded.

    A rank whose rows have no image would not enter the vision tower, whose shards the other ranks
    wait for. Without sharding, rows with and without images may stand in one batch.

    Raises:
        ValueError: naming how many rows there are of each kind, on every rank.
    """
    videos = sum(privileged.count_images(prompt, "video") > 0 for prompt in prompts)
    bare = sum(privileged.count_images(prompt) == 0 for prompt in prompts)
    counts = gather_object([(videos, bare, len(prompts))])
    videos, bare, rows = (sum(column) for column in zip(*counts, strict=True))
    if videos:
        raise ValueError(f"{videos} of {rows} prompts in a batch hold a video. {VIDEO_ADVICE}")
    if 0 < bare < rows and sharding_of(accelerator) is not None:
        raise ValueError(
            f"{bare} of {rows} prompts in a batch have no image and the others have: with sharded "
            "parameters, ranks would wait for one another in the vision tower. Give every row an "
            "image, train on the two kinds apart, or use DDP or ZeRO-2."
        )


def drop_empty_images(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Forward pre-hook: a micro-batch in which no row has an image has no pixels to look at.

    TRL slices the pixels of the whole batch, and hands none of them on as an empty tensor.
    """
    pixels = kwargs.get("pixel_values")
    if pixels is not None and pixels.size(0) == 0:
        kwargs = {k: v for k, v in kwargs.items() if k not in IMAGE_FIELDS}
    return args, kwargs


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
