"""FSDP2 and ZeRO-3 on two processes, for real on a CPU: the same run as one process that shares.

Accelerate shards on accelerators only. `on_a_cpu` passes the CPU off as one; what follows is what
runs on a GPU: DTensors and partitions, hooks, and collectives, here over gloo. All runs of a kind
share one start-up. ZeRO-3 is tested where DeepSpeed is installed, see `pyproject.toml`.
"""

import gc
import importlib.util
import os
import weakref
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
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from rlsd_lib import RLSDTrainer
from rlsd_lib.trainer import sharded
from rlsd_lib.trainer.teacher import WEIGHTS_FILE

EMA = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3}
RUNS: dict[str, dict[str, Any]] = {
    "snapshot": {},
    "ema": EMA,
    "live": {"teacher_model_kind": "live"},
    "base": {"teacher_model_kind": "base"},
    "null": {"privileged_template": "{prompt}{privileged_context}"},
    "ema lora": EMA,
    "opsd from a path": {"method": "opsd"},
    "opsd tied": {"method": "opsd", "gradient_accumulation_steps": 2},
    "sdpo live": {"method": "sdpo", "teacher_model_kind": "live"},
    "opd from a path": {"method": "opd"},
    "grpo_opsd": {"method": "grpo_opsd", "distillation_weight": 0.3},
}
RESUMED = ("snapshot", "ema lora")

# What a launcher sets. Rank 0 alone loads the weights, as is usual for large models.
FSDP2_ENV = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
ZERO3_ENV = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
ZERO3_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        # As on a model of ordinary size: norms stay whole, matrices do not, nothing is fetched
        # before its turn.
        "stage3_param_persistence_threshold": 100,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs pip install -e '.[deepspeed]'"
)

# --- what every process does ---------------------------------------------------------------------


def saved(folder: Path, seed: int) -> str:
    """The path of a model that one rank has saved."""
    if int(os.environ.get("RANK", "0")) == 0:
        tiny.model(seed).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return str(folder)


def student(name: str, folder: Path) -> Any:
    if name.endswith("path"):
        return saved(folder / "student", 0)
    model = tiny.model(tie_word_embeddings=name.endswith("tied"))
    if not name.endswith("lora"):
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))


def build(folder: Path, name: str, world: int, **overrides: Any) -> RLSDTrainer:
    zero3 = "ACCELERATE_USE_DEEPSPEED" in os.environ
    settings = {
        "per_device_train_batch_size": 12 // world,
        "gradient_accumulation_steps": 1,
        "max_steps": len(ranks.GOOD),
        # Bounded below, or Adam would turn a rounding error of a vanishing gradient into a step.
        "optim": "adamw_torch",
        "adam_epsilon": 1.0,
        "learning_rate": 0.5,
        **({} if name.startswith("opd ") else {"teacher_sync_steps": 2}),
        "use_cpu": not zero3,
        "deepspeed": ZERO3_CONFIG if zero3 else None,
    }
    # A configuration comes first, as in every script: it tells transformers how to load.
    config = tiny.config(folder, **{**settings, **RUNS[name], **overrides})
    extra = {"teacher_model": saved(folder / "teacher", 1)} if name.startswith("opd ") else {}
    data = tiny.dataset(privileged_context=[""] * 32) if name == "null" else tiny.dataset()
    trainer = RLSDTrainer(
        student(name, folder),
        ranks.reward,
        config,
        data,
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
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()


def result(trainer: RLSDTrainer) -> dict[str, Any]:
    """What must not depend on how the run is spread."""
    prefixes = ("rlsd/", "loss", "reward", "grad_norm")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    with torch.no_grad():
        models = trainer.model, trainer.accelerator.unwrap_model(trainer.teacher.model)
        weights = [{n: whole(p) for n, p in model.named_parameters()} for model in models]
    return {
        "student": weights[0],
        "teacher": weights[1],
        "metrics": [{k: v for k, v in row.items() if k.startswith(prefixes)} for row in rows],
    }


def train(folder: Path, name: str, world: int) -> tuple[RLSDTrainer, dict[str, Any]]:
    saves = {"save_strategy": "steps", "save_steps": 3} if name in RESUMED else {}
    trainer = build(folder, name, world, **saves)
    trainer.train()
    return trainer, result(trainer)


def resume(folder: Path, name: str, world: int) -> dict[str, Any]:
    """The last step once more, from the checkpoint of the third."""
    trainer = build(folder, name, world)
    # Rollouts are a function of the call, and three calls lie before the checkpoint.
    for call in range(3):
        trainer._generate_single_turn([[call]])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return result(trainer)


def gathered(model: torch.nn.Module) -> int:
    """Elements that this rank holds beyond its parts."""
    return sum(p.data.numel() for p in model.parameters() if not isinstance(p, DTensor))


def gathered_in_a_pass(trainer: RLSDTrainer) -> dict[str, Any]:
    teacher = trainer.teacher.model
    base = trainer.accelerator.unwrap_model(teacher)
    seen: list[int] = []
    for layer in base.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(gathered(base)))
    ids = torch.arange(6, 14)[None]
    with torch.no_grad(), trainer.teacher.active(trainer.model) as model:
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    return {"in layers": seen, "after": gathered(base)}


def refreshed_alone(trainer: RLSDTrainer) -> bool:
    """Each rank refreshes while the other waits: communication would hang."""
    teacher, rank = trainer.teacher, trainer.accelerator.process_index
    for turn in range(2):
        if rank == turn:
            teacher.sync(trainer.model, 100)
        torch.distributed.barrier()
    pairs = teacher._parameter_pairs(trainer.model)
    return all(torch.equal(*map(sharded.local, pair)) for pair in pairs)


def is_freed_by_release(trainer: RLSDTrainer) -> bool:
    teacher = trainer.accelerator.unwrap_model(trainer.teacher.model)
    parameters = [weakref.ref(p) for p in teacher.parameters()]
    del teacher
    trainer.teacher.release()
    gc.collect()
    left = [ref() for ref in parameters if ref() is not None]
    return sum(p.data.numel() + getattr(p, "ds_tensor", p).numel() for p in left) == 0


def head_gradient_error() -> float:
    """A head that is in parts where the loss needs it, against the mean over both ranks' losses."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    head, inputs = torch.nn.Linear(8, 6), torch.randn(2, 5, 8)
    losses = [(rows @ head.weight.T).square().sum() for rows in inputs]
    expected = torch.autograd.grad(sum(losses) / 2, head.weight)[0]
    fully_shard(head)
    weight = sharded.outside_forward(head, head.weight)
    (inputs[torch.distributed.get_rank()] @ weight.T).square().sum().backward()
    return (head.weight.grad.full_tensor() - expected).abs().max().item()


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Let accelerate shard on a CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    patched = {
        "_prepare_backend": lambda *_: ("gloo", DistributedType.MULTI_GPU),
        "set_device": lambda self: setattr(self, "device", torch.device("cpu")),
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, function in patched.items():
            monkeypatch.setattr(PartialState, name, function)
        yield


def train_all(folder: Path, world: int) -> None:
    """Entry of each process."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with on_a_cpu():
        torch.distributed.init_process_group("gloo")
        for name in RUNS:
            trainer, done = train(folder / name, name, world)
            if name in RESUMED:
                done["resumed"] = resume(folder / name, name, world)
            if name == "snapshot":
                done["pass"] = gathered_in_a_pass(trainer)
                done["refreshed alone"] = refreshed_alone(trainer)
                done["freed"] = is_freed_by_release(trainer)
            torch.save(done, folder / f"{name}-{rank}.pt")
        torch.save(head_gradient_error(), folder / f"head gradient-{rank}.pt")


# --- and what comes out --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["FSDP2", pytest.param("ZeRO-3", marks=needs_deepspeed)])
def two(request, tmp_path_factory) -> Path:
    """Folder with the results of two processes."""
    env = FSDP2_ENV if request.param == "FSDP2" else ZERO3_ENV
    return ranks.run_once(tmp_path_factory, request.param, "test_sharded", env)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Folder and result of one process that holds everything, by name of the run."""

    def run(name: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("one")
        return folder, train(folder, name, 1)[1]

    return cache(run)


def load(two: Path, name: str, rank: int = 0) -> Any:
    return torch.load(two / f"{name}-{rank}.pt", weights_only=False)


def assert_close(ours: dict, theirs: dict, name: str = "") -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value - theirs[key]).abs().max() <= 1e-5, (name, key)


def test_sharded_over_two_processes_gives_the_result_of_one(one, two):
    for name in RUNS:
        assert_same_result(two, name, one(name)[1])


def assert_same_result(two: Path, name: str, expected: dict[str, Any]) -> None:
    done = load(two, name)
    assert_close(done["student"], expected["student"], name)
    assert_close(done["teacher"], expected["teacher"], name)
    for key, value in load(two, name, rank=1)["teacher"].items():
        assert torch.equal(value, done["teacher"][key]), (name, key)
    if "tied" in name:  # a micro-step of an accumulated run holds other rows
        return
    for ours, theirs in zip(done["metrics"], expected["metrics"], strict=True):
        assert {k for k, v in ours.items() if v is None} == {
            k for k, v in theirs.items() if v is None
        }
        numbers = [{k: v for k, v in m.items() if v is not None} for m in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5), name


def test_the_same_prompt_leaves_no_gap_between_two_sharded_models(two):
    fresh = [row for row in load(two, "null")["metrics"] if row["rlsd/teacher_age"] == 0]
    assert [row["rlsd/gap_abs_mean"] for row in fresh] == [0, 0]


def test_a_sharded_run_resumes_exactly(two):
    for name in RESUMED:
        done = load(two, name)
        for model in ("student", "teacher"):
            for key, value in done[model].items():
                assert torch.equal(value, done["resumed"][model][key]), (name, key)
        assert done["metrics"][-1] == done["resumed"]["metrics"][-1], name


def test_the_saved_teacher_is_that_of_one_process(one, two):
    files = [
        folder / "checkpoint-3" / WEIGHTS_FILE for folder in (two / "snapshot", one("snapshot")[0])
    ]
    assert_close(*map(load_file, files))


def test_a_teacher_pass_gathers_layer_by_layer_and_gives_back(two):
    held = load(two, "snapshot")["pass"]
    model = tiny.model()
    total = sum(p.numel() for p in model.parameters())
    first, second = (sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    heads = 2 * model.lm_head.weight.numel()
    assert max(held["in layers"]) <= max(first, second) + norms + heads < total
    assert held["after"] <= norms


def test_a_refresh_needs_no_communication(two):
    assert all(load(two, "snapshot", rank)["refreshed alone"] for rank in range(2))


def test_a_released_copy_frees_its_memory(two):
    assert load(two, "snapshot")["freed"]


def test_a_head_in_parts_gets_the_gradient_of_all_ranks(two):
    assert load(two, "head gradient") < 1e-5


def test_models_that_are_not_spread_alike_are_never_mixed():
    with pytest.raises(RuntimeError, match=r"differ in their parameters, e\.g\. .*layers\.2"):
        sharded.pairs(tiny.model(), tiny.model(num_hidden_layers=3))
    model, wider = tiny.model(), tiny.model(intermediate_size=128)
    with pytest.raises(RuntimeError, match=r"not sharded alike.*\(64, 32.*\(128, 32"):
        for target, source in sharded.pairs(model, wider):
            sharded.move(target, source)
