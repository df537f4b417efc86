"""Presets: model, task and sizes of a run. A run is a preset, a method, a seed, and overrides."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from rlsd_lib.config import METHODS, RLSDConfig, look_up


@dataclass(frozen=True)
class Preset:
    """One row of the presets table.

    `training` holds `RLSDConfig` fields; `num_samples` completions per held-out problem are drawn
    at temperature 1 for each accuracy. `data_seed` fixes the rows, so that runs with different
    seeds share train and test problems and differ in order and sampling only.
    """

    summary: str
    model: str
    task: str
    training: Mapping[str, Any]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)
    train_size: int = 2000
    test_size: int = 200
    num_samples: int = 4
    data_seed: int = 0
    save_model: bool = False


PRESETS: dict[str, Preset] = {}


def resolve_config(
    method: str,
    preset: str,
    seed: int,
    output_dir: Path,
    *,
    template: str | None = None,
    max_steps: int = -1,
    overrides: Mapping[str, Any] | None = None,
) -> RLSDConfig:
    """The full configuration of a run: preset, then the task's template, then overrides.

    Raises:
        ValueError: for an unknown method, preset or override, naming the nearest valid one.
    """
    look_up(method, METHODS, "method")
    chosen = PRESETS[look_up(preset, PRESETS, "preset")]
    known = [f.name for f in fields(RLSDConfig) if f.init]
    for name in overrides or {}:
        look_up(name, known, "override")
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "method": method,
        "seed": seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **chosen.training,
    }
    if template is not None:
        settings["privileged_template"] = template
    if max_steps > 0:
        settings["max_steps"] = max_steps
    return RLSDConfig(**{**settings, **(overrides or {})})
