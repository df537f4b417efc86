"""What a card can show: `pytest -m gpu` on a machine with CUDA, at most 150 s, no network.

Without CUDA every test is skipped; with `--on-cpu` the same bodies run there at the same tiny size,
as `make test` does, so that none of them can rot between two visits to a GPU.
"""

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sharded_worker
import tiny
import tiny_vlm
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlsd_lib import RLSDTrainer
from rlsd_lib.experiment import launch
from rlsd_lib.trainer import shared_prompts

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
PLAIN = "{prompt}{privileged_context}"  # shows an empty reference as nothing
LONG = "{prompt}" + " so" * 40 + "{privileged_context}"  # a prompt that is worth sharing
KINDS = ("live", "base", "snapshot", "ema")
# Between the shared and the plain pass a log-probability differs by rounding, over two layers and
# logits of size 10: in nats at most this much, on the mean over all tokens and for any of them.
TOLERANCE = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (0.01, 0.1)}
FLASH = importlib.util.find_spec("flash_attn") is not None
FLASH_2 = "flash_attention_2"
BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if request.config.getoption("--on-cpu"):
        return "cpu"
    pytest.skip("no CUDA device; --on-cpu runs this on the CPU")


def build(folder: Path, device: str, student: Any = None, **overrides: Any) -> RLSDTrainer:
    """A trainer of the tiny model on the device under test."""
    return tiny.trainer(folder, student, **{"use_cpu": device == "cpu", **overrides})


def lora() -> PreTrainedModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False))


@contextmanager
def rollouts_of(trainer: RLSDTrainer):
    """Collect TRL's dictionary of every rollout batch that is scored inside."""
    found: list[dict[str, Any]] = []
    score = trainer._generate_and_score_completions

    def keep(inputs: list) -> dict[str, Any]:
        output = score(inputs)
        found.append({k: v.clone() for k, v in output.items() if isinstance(v, torch.Tensor)})
        return output

    trainer._generate_and_score_completions = keep
    yield found


def steps(trainer: RLSDTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def with_empty_references(count: int = 32) -> Any:
    return tiny.dataset(count, privileged_context=[""] * count)


# --- the gap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_teacher_that_sees_the_same_has_a_gap_of_exactly_zero(
    tmp_path, device, bf16, checkpointing
):
    settings = {"bf16": bf16, "gradient_checkpointing": checkpointing, "max_steps": 2}
    settings |= {"privileged_template": PLAIN, "teacher_model_kind": "live"}
    trainer = build(tmp_path, device, data=with_empty_references(), **settings)
    assert [row["rlsd/gap_abs_mean"] for row in steps(trainer)] == [0.0, 0.0]


@pytest.mark.parametrize("variant", ["full", "LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_teacher_trains(tmp_path, device, kind, variant):
    student = lora() if variant == "LoRA" else tiny.model()
    settings = {"teacher_model_kind": kind, "teacher_sync_steps": 1, "bf16": device == "cuda"}
    trainer = build(tmp_path, device, student, max_steps=2, **settings)
    before = weights(trainer.model)
    logged = steps(trainer)
    assert [row["rlsd/teacher_age"] for row in logged] == [0, 1 if kind == "base" else 0]
    assert all(row["rlsd/gap_abs_mean"] > 0 for row in logged)
    moved = [k for k, v in weights(trainer.model).items() if not torch.equal(v, before[k])]
    trained = [k for k, p in trainer.model.named_parameters() if p.requires_grad]
    assert set(trained) <= set(moved), "a trained parameter did not move"


def _attention(name: str, device: str):
    """The context that forces an attention kernel of torch's sdpa; skips where it does not run."""
    if name not in BACKENDS:
        return nullcontext()
    if name != "math" and device == "cpu":
        pytest.skip(f"the {name} kernel of sdpa runs on CUDA")
    # A mask rules some kernels out: the next best takes over, as in training.
    next_best = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([BACKENDS[name], *next_best], set_priority=True)


class Ran(TorchDispatchMode):
    """How often each fused attention kernel ran inside, whatever was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        if found := re.match(r"aten::_scaled_dot_product_(\w+)", func.name()):
            self.kernels[found[1]] += 1
        return func(*args, **kwargs or {})


def _scored(folder: Path, device: str, attention: str, data: Any, **settings: Any):
    """One rollout batch that the teacher has scored, and the kernels that ran for its scores."""
    student = tiny.model(attn_implementation="eager" if attention == "eager" else "sdpa")
    settings |= {"privileged_template": LONG, "num_generations": 2, "max_steps": 1}
    trainer = build(folder, device, student, data=data, **settings)
    score, ran = trainer.teacher_scores, Ran()

    def watched(*args: Any, **kwargs: Any) -> Any:
        with ran:
            return score(*args, **kwargs)

    trainer.teacher_scores = watched
    with _attention(attention, device), rollouts_of(trainer) as found:
        trainer.train()
    return found[0], dict(ran.kernels)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", *BACKENDS, "eager"])
def test_the_shared_pass_agrees_with_the_plain_one(tmp_path, device, attention, dtype):
    """Prompts of one length have no mask in the plain pass, and completions always in the shared.

    Ragged prompts are padded on the left in both: groups of two, of which four rows hold two.
    """
    lengths = {"even": [4] * 32, "ragged": range(1, 33)}
    for name, digits in lengths.items():
        prompts = [[{"role": "user", "content": str(i % 7) * n}] for i, n in enumerate(digits)]
        data, scored = tiny.dataset(prompt=prompts, privileged_context=["7"] * 32), {}
        for how in ("plain", "shared"):
            settings = {"teacher_pass": how, "bf16": dtype == torch.bfloat16}
            scored[how] = _scored(tmp_path / how, device, attention, data, **settings)
        (plain, ran_plain), (shared, ran_shared) = scored.values()
        padded = plain["prompt_mask"].eq(0).any().item()
        assert padded == (name == "ragged")
        if attention in ("math", "eager"):
            assert ran_plain == ran_shared == {}, "another kernel took over"
        assert torch.equal(plain["completion_ids"], shared["completion_ids"])
        key, mask = "teacher_per_token_logps", plain["completion_mask"].bool()
        off = (plain[key] - shared[key])[mask].abs()
        print(
            f"{attention}, {dtype}, {name}: mean {off.mean():.2e}, max {off.max():.2e} nats; fused "
            f"kernels that ran: plain {ran_plain or 'none'}, shared {ran_shared or 'none'}"
        )
        mean, largest = TOLERANCE[dtype]
        assert off.mean() < mean, name
        assert off.max() < largest, name


def test_flash_attention_2_is_refused_by_the_shared_pass_alone(tmp_path, device, monkeypatch):
    """Where flash_attn is not installed, sdpa's kernel runs under its name."""
    student = tiny.model(attn_implementation="sdpa")
    if FLASH and device == "cuda":
        student.set_attn_implementation(FLASH_2)
    else:
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            monkeypatch.setitem(table._global_mapping, FLASH_2, table["sdpa"])
        student.config._attn_implementation = FLASH_2
    settings = {"privileged_template": LONG, "bf16": True, "max_steps": 1}
    with pytest.raises(ValueError, match=f"teacher_pass='shared' cannot .* not '{FLASH_2}'"):
        build(tmp_path, device, student, teacher_pass="shared", **settings)
    score = Mock(wraps=shared_prompts.score)
    monkeypatch.setattr(shared_prompts, "score", score)
    for model, calls in ((student, 0), (tiny.model(attn_implementation="sdpa"), 1)):
        [logged] = steps(build(tmp_path, device, model, teacher_pass="auto", **settings))
        assert score.call_count == calls
        assert logged["rlsd/gap_abs_mean"] > 0


def test_what_rounding_of_the_head_adds_to_the_gap(tmp_path, device):
    """In bf16 the logits are rounded; TRL's `cast_lm_head_to_fp32` should take that part away."""
    errors = {}
    for cast in (False, True):
        student = tiny.model(tie_word_embeddings=False)
        reference = tiny.model(tie_word_embeddings=False).to(device).eval()
        settings = {"bf16": True, "cast_lm_head_to_fp32": cast, "teacher_model_kind": "live"}
        trainer = build(tmp_path / str(cast), device, student, max_steps=1, **settings)
        with rollouts_of(trainer) as found:
            trainer.train()
        batch = found[0]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length, mask = batch["completion_ids"].size(1), batch["completion_mask"].bool()
        head = reference.lm_head.weight.float()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            states = reference.model(ids, attention_mask=attention).last_hidden_state
        exact = states[:, -length - 1 : -1].float() @ head.T
        rounded = exact.bfloat16().float()
        chosen = batch["completion_ids"][..., None]
        logps = [x.log_softmax(-1).gather(-1, chosen)[..., 0][mask] for x in (exact, rounded)]
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            ours, _, _ = trainer._get_per_token_logps_and_entropies(
                _untrained(trainer, reference), ids, attention, length
            )
        errors[cast] = (ours[mask] - logps[0]).abs().mean().item()
        errors["logits rounded once"] = (logps[1] - logps[0]).abs().mean().item()
    print(
        "mean error of a log-probability, nats:", json.dumps({str(k): v for k, v in errors.items()})
    )
    assert errors[True] < errors[False]


def _untrained(trainer: RLSDTrainer, reference: PreTrainedModel) -> torch.nn.Module:
    """The trainer's own patched model with the weights from before the step."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.load_state_dict(reference.state_dict())
    return model.eval()


# --- memory and life ---------------------------------------------------------------------------------


def test_a_full_copy_is_freed_when_lambda_reaches_zero(tmp_path, device):
    trainer = build(tmp_path, device, max_steps=3, lambda_decay_steps=2)
    copy = weakref.ref(trainer.accelerator.unwrap_model(trainer.teacher.model))
    size = sum(p.numel() * p.element_size() for p in copy().parameters())
    lives: list[bool] = []
    held: list[int] = []

    def measure(*_: Any, **__: Any) -> None:
        gc.collect()
        lives.append(copy() is not None)
        held.append(torch.cuda.memory_allocated() if device == "cuda" else 0)

    # Registered after the teacher's own callback, so it sees what that has released.
    trainer.callback_handler.callbacks[-1].on_step_begin = measure
    steps(trainer)
    assert lives == [True, True, False], "something still refers to the copy"
    if device == "cuda":
        assert held[1] - held[2] >= 0.9 * size


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["full", "LoRA"])
def test_a_run_resumes_bit_by_bit(tmp_path, device, variant, bf16):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "cuBLAS may sum in another order"
    settings = {"max_steps": 4, "teacher_sync_steps": 2, "save_strategy": "steps", "save_steps": 3}
    states = []
    for name in ("whole", "resumed"):
        student = lora() if variant == "LoRA" else tiny.model()
        trainer = build(tmp_path / name, device, student, bf16=bf16, **settings)
        checkpoint = tmp_path / "whole" / "checkpoint-3" if name == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        last = [row for row in trainer.state.log_history if "loss" in row][-1]
        metrics = {key: x for key, x in last.items() if key != "step_time"}
        states.append((weights(trainer.model), weights(trainer.teacher.model), metrics))
    (student, teacher, metrics), expected = states
    assert metrics["step"] == 4
    assert metrics == expected[2]
    for ours, theirs in ((student, expected[0]), (teacher, expected[1])):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- images, several processes, vLLM -----------------------------------------------------------------


def test_a_vision_language_model_trains_with_an_exact_null_gap(tmp_path, device):
    data = tiny_vlm.dataset([1, 2, 1, 1] * 4, privileged_context=[""] * 16)
    settings = {"use_cpu": device == "cpu", "bf16": device == "cuda", "max_steps": 2}
    settings |= {"privileged_template": PLAIN, "teacher_model_kind": "live"}
    trainer = tiny_vlm.trainer(tmp_path, data, **settings)
    assert [row["rlsd/gap_abs_mean"] for row in steps(trainer)] == [0.0, 0.0]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_sharded_parameters_train_as_one_process_does(tmp_path, device, sharding, processes):
    """Also the teacher, refreshed at each step: in fp32 the gap is that of one process."""
    cards = torch.cuda.device_count()
    if sharding == "zero3" and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install '.[deepspeed]'")
    if sharding == "zero3" and processes > cards:
        pytest.skip("DeepSpeed's collectives are NCCL's, which refuses two ranks on one card")
    if processes == 2 and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("on torch 2.11 FSDP2 over two processes cannot refresh its teacher")
    if processes == 1 and device == "cpu":
        pytest.skip("two processes show on a CPU what one would, at half a minute each")
    config = Path(launch.__file__).parent / "accelerate" / f"{sharding}.yaml"
    backend = "gloo" if processes > cards else "nccl"
    command = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    worker = [str(HERE / "sharded_worker.py"), str(tmp_path), device, backend, str(processes)]
    paths = [str(HERE.parent), str(HERE.parent / "trainer"), *sys.path]
    done = subprocess.run(
        [sys.executable, *command, *worker],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads((tmp_path / "steps.json").read_text())
    alone = sharded_worker.train(tmp_path / "alone", 1, use_cpu=device == "cpu")
    # FSDP2 casts weights to bf16, and autocast the inputs of a multiplication.
    for dtype, rel in (("fp32", 1e-3), ("bf16", 0.1)):
        assert len(ours[dtype]) == 3
        for row, expected in zip(ours[dtype], alone[dtype], strict=True):
            assert row["rlsd/teacher_age"] == 0
            for name in ("reward", "rlsd/lambda", "rlsd/gap_abs_mean", "loss", "grad_norm"):
                near = pytest.approx(expected[name], rel=rel, abs=rel / 10)
                assert row[name] == near, (dtype, name)


@pytest.mark.vllm
def test_rollouts_of_colocated_vllm_are_the_policys(tmp_path, device):
    """`make test-vllm` runs this too. There is a ratio between both engines, and it is near 1."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install '.[vllm]'")
    if device == "cpu":
        import vllm_cpu

        vllm_cpu.keep_weights_loadable()
    folder = tmp_path / "student"
    # vLLM's CPU kernels know no head of 16 numbers.
    tiny.model(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}
    settings |= {"vllm_max_model_length": 256, "max_steps": 2}
    trainer = build(tmp_path, device, str(folder), **settings)
    for row in steps(trainer):
        # vLLM serves fp32 weights in half precision.
        assert 0 < row["sampling/sampling_logp_difference/mean"] < 0.08
        ratios = [row[f"sampling/importance_sampling_ratio/{x}"] for x in ("min", "mean", "max")]
        assert 0.5 < ratios[0] < ratios[2] < 1.5, ratios
        assert ratios[1] == pytest.approx(1, abs=0.08)
        assert row["rlsd/gap_abs_mean"] > 0
