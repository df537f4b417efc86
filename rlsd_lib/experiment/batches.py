"""How several processes share the batch of one."""

import math
from collections.abc import Mapping
from typing import Any

from rlsd_lib.experiment.paper_presets import Preset
from rlsd_lib.trainer.config import RLSDConfig


def shared_batch(settings: Mapping[str, Any], num_processes: int) -> dict[str, int]:
    """The batch settings of each of `num_processes` that together make the batch of one.

    The rows of a micro-batch are shared first; what they do not divide by is taken from the number
    of micro-batches. Then every optimiser step and every generation batch has the same rows.

    Raises:
        ValueError: the batch does not divide; the message names the values.
    """
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    batch = {name: settings.get(name) or getattr(RLSDConfig, name) for name in names}
    rows = batch.pop("per_device_train_batch_size")
    by_rows = math.gcd(rows, num_processes)
    by_steps = num_processes // by_rows
    counts = {name: count for name, count in batch.items() if count}
    generated = settings.get("generation_batch_size") or rows * by_steps
    shares = (*counts.values(), generated // rows)
    if num_processes < 1 or any(count % by_steps for count in shares):
        values = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise ValueError(
            f"num_processes={num_processes} does not divide the batch of "
            f"per_device_train_batch_size={rows}, {values}, generation_batch_size="
            f"{settings.get('generation_batch_size')}: choose a number that divides the first, or "
            "whose remaining factor divides the others."
        )
    shared = {name: count // by_steps for name, count in counts.items()}
    return {"per_device_train_batch_size": rows // by_rows, **shared}


def split_rollouts(preset: Preset, settings: Mapping[str, Any], processes: int) -> dict[str, int]:
    """The gradient accumulation by which `processes` make one step of the preset's rollouts."""
    if "gradient_accumulation_steps" in settings:
        return {}
    rollouts, each = preset.rollouts_per_step, settings["per_device_train_batch_size"]
    if rollouts % (processes * each):
        raise ValueError(
            f"{rollouts} rollouts per step cannot be shared by {processes} processes with "
            f"per_device_train_batch_size={each}: choose numbers whose product divides {rollouts}, "
            "or set gradient_accumulation_steps."
        )
    return {"gradient_accumulation_steps": rollouts // (processes * each)}
