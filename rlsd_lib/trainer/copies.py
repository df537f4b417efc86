"""How a teacher's network is made: a frozen copy of the student, another model, or an adapter."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from rlsd_lib.trainer import sharded
from rlsd_lib.trainer.config import RLSDConfig

ADAPTER = "teacher"


def copy_for_scoring(student: PreTrainedModel, args: RLSDConfig) -> PreTrainedModel:
    """A frozen copy of the student that scores tokens through TRL's fused LM head.

    The head's patch keeps the original forward in a closure, so a plain deep copy would answer with
    the student's live weights. The patch is taken off for the copy and put on anew.

    Raises:
        ValueError: if the student is spread over several devices.
    """
    if len(set(getattr(student, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"A model split by device_map ({student.hf_device_map}) cannot be copied for a teacher. "
            "Use teacher_model_kind='live', PEFT, or a single device per process."
        )
    patched = student.__dict__.pop("forward")
    try:
        teacher = sharded.copy_of(student)
    finally:
        student.forward = patched
    return _for_scoring(teacher, args)


def external_for_scoring(
    external: PreTrainedModel | str, args: RLSDConfig, student: PreTrainedModel | PeftModel
) -> PreTrainedModel:
    """Another model that scores tokens, or a path to it, in the student's precision."""
    if not isinstance(external, str):
        # A copy: the caller's model keeps its forward, its mode and its gradients.
        return _for_scoring(sharded.copy_of(external), args)
    settings = {"dtype": student.dtype, **(args.model_init_kwargs or {}), "device_map": None}
    return _for_scoring(create_model_from_path(external, **settings), args)


def _for_scoring(teacher: PreTrainedModel, args: RLSDConfig) -> PreTrainedModel:
    """Freeze a model and give it the fused head, at the student's temperature."""
    add_fused_lm_head(
        teacher, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32
    )
    return teacher.requires_grad_(False).eval()


def add_teacher_adapter(student: PeftModel) -> None:
    """Add a frozen adapter that starts as a copy of the active one.

    Raises:
        ValueError: if the active adapter is not called "default", the name TRL trains.
    """
    if student.active_adapter != "default":
        raise ValueError(
            f"The active adapter is {student.active_adapter!r}; the teacher copies 'default'. "
            "Load the adapter to train under the name 'default'."
        )
    if ADAPTER not in student.peft_config:
        # Adapter initialisation draws random numbers; rollouts must not depend on it.
        with torch.random.fork_rng():
            student.add_adapter(ADAPTER, student.peft_config["default"])
    for target, source in adapter_pairs(student):
        sharded.move(target, source)
        target.requires_grad_(False)


def adapter_pairs(student: PeftModel) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """(teacher, trained) adapter parameters, matched by name."""
    parameters = sharded.named(student)
    for name, source in parameters.items():
        if ".default." in name:
            yield parameters[name.replace(".default.", f".{ADAPTER}.")], source
