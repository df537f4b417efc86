"""FSDP2 and ZeRO-3 on two processes, for real on a CPU: the same run as one whole process.

Accelerate shards on accelerators only; `on_a_cpu` tells it that the CPU is one, and everything
after that (DTensors, partitions, hooks, collectives over gloo) is what a GPU machine runs. All
runs of a kind of sharding share one start-up. ZeRO-3 needs `pip install -e ".[deepspeed]"`.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import dense
import pytest
import test_distributed as ranks
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

from rlsd_lib import RLSDTrainer
from rlsd_lib.sharded import FSDP2, ZERO3, sharding_of
from rlsd_lib.teacher import STATE_FILE, WEIGHTS_FILE

EMA = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3}
RUNS: dict[str, dict[str, Any]] = {
    "snapshot": {},
    "ema": EMA,
    "live": {"teacher_model_kind": "live"},
    "base": {"teacher_model_kind": "base"},
    "snapshot lora": {},
    "ema lora": EMA,
    "snapshot tied": {},
    "opsd": {"method": "opsd"},
    "opsd live": {"method": "opsd", "teacher_model_kind": "live"},
    "opsd tied": {"method": "opsd"},
    "sdpo": {"method": "sdpo"},
    "opd": {"method": "opd"},
    "grpo_opsd": {"method": "grpo_opsd", "distillation_weight": 0.3},
}
RESUMED = ("snapshot", "ema", "snapshot lora")

# What `accelerate launch` sets for configs/fsdp2.yaml.
FSDP2_ENV = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
ZERO3_CONFIG = {
    # Norms are kept whole and matrices are not, as on a model of ordinary size.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


def student(name: str) -> torch.nn.Module:
    model = tiny.model(tie_word_embeddings=name.endswith("tied"))
    if not name.endswith("lora"):
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))


def build(folder: Path, name: str, world: int, **overrides: Any) -> RLSDTrainer:
    settings = {
        "per_device_train_batch_size": 12 // world,
        "gradient_accumulation_steps": 1,
        "max_steps": len(ranks.GOOD),
        "optim": "sgd",
        "learning_rate": 0.5,
        "teacher_sync_steps": 2,
        "use_cpu": "ACCELERATE_USE_DEEPSPEED" not in os.environ,
    }
    extra = {"teacher_model": tiny.model(1)} if name == "opd" else {}
    trainer = RLSDTrainer(
        student(name),
        ranks.reward,
        tiny.config(folder, **{**settings, **RUNS[name], **overrides}),
        tiny.dataset(),
        processing_class=tiny.tokenizer(),
        **extra,
    )
    assert trainer.accelerator.num_processes == world
    return dense.script(trainer, ranks.marked_ids)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().clone()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: whole(p) for p in model.parameters()}


def result(trainer: RLSDTrainer) -> dict[str, Any]:
    """What must not depend on how the run is spread."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    logged = [
        {k: v for k, v in row.items() if k.startswith(("rlsd/", "loss", "reward", "grad_norm"))}
        for row in rows
    ]
    teacher = trainer.accelerator.unwrap_model(trainer.teacher.model)
    return {"weights": weights(trainer.model), "teacher": weights(teacher), "metrics": logged}


def train(folder: Path, name: str, world: int) -> dict[str, Any]:
    trainer = build(folder, name, world)
    trainer.train()
    return result(trainer)


def train_and_resume(folder: Path, name: str) -> dict[str, Any]:
    """The whole run and its second half, from the checkpoint of its third step."""
    saves = {"save_strategy": "steps", "save_steps": 3}
    first = build(folder, name, 2, **saves)
    first.train()
    second = build(folder, name, 2, **saves)
    second_calls = iter(range(3, 10**6))
    second._generate_single_turn = scripted_from(second, second_calls)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return {"first": result(first), "second": result(second)}


def scripted_from(trainer: RLSDTrainer, calls: Iterator[int]) -> Callable:
    def generate(prompt_ids: list, *_: Any) -> tuple[list[list[int]], None]:
        first, call = trainer.accelerator.process_index * len(prompt_ids), next(calls)
        return [ranks.marked_ids(row, first + i, call) for i, row in enumerate(prompt_ids)], None

    return generate


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Let accelerate shard on a CPU: its own code refuses nothing else."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    backend, device = PartialState._prepare_backend, PartialState.set_device

    def gloo(self: PartialState, *_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def cpu(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = gloo, cpu
    try:
        yield
    finally:
        PartialState._prepare_backend, PartialState.set_device = backend, device


def train_all(folder: Path, world: int) -> None:
    """Entry of each process."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with on_a_cpu():
        torch.distributed.init_process_group("gloo")
        for name in RUNS:
            torch.save(train(folder / "scratch", name, world), folder / f"{name}-{rank}.pt")
        for name in RESUMED:
            done = train_and_resume(folder / f"resume {name}", name)
            torch.save(done, folder / f"resume {name}-{rank}.pt")
