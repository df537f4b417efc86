"""`rlsd plan`: does a run fit, what does a step of GRPO and of RLSD cost, what to change if not.

Arithmetic alone. Every rollout is taken at its full length: memory is that of the worst batch, and
seconds are upper bounds at the assumed speed. Not counted: communication, weight sync, data
loading, rewards and evaluation.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rlsd_lib.experiment.presets import Preset
from rlsd_lib.experiment.shapes import BF16, FP32, ModelShape, config_named, shape_of
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.trainer.teacher_pass import WORTH_IT

GIB = 2**30
# TRL's fused head works in tiles of so many tokens by so many words (kernels/chunked_logprob.py).
TILE = (4096, 32768)
RESERVED = 2.0  # GiB per GPU: CUDA context, communication buffers, fragmentation
VLLM_WORK = 1.5  # GiB that vLLM needs beside weights and cache
ALWAYS = "always"  # the phase of what stays for the whole run
NO_TEACHER = "none"  # the `teacher_model_kind` of GRPO

MEASURED = ("tflops", "bandwidth", "mfu", "activations")
VALID = {
    "sharding": ("ddp", "fsdp2", "zero3"),
    "teacher_pass": ("auto", "plain", "shared"),
    "dtype": ("float32", "bfloat16"),
    "teacher_model_kind": ("live", "base", "ema", "snapshot", NO_TEACHER),
    "vllm_mode": ("colocate", "server"),
}


def expect(of: Any, names: Iterable[str], holds: Callable[[Any], bool], expected: str) -> None:
    """Raise ValueError for the first attribute of `of`, among `names`, that is not as expected."""
    for name in names:
        if not holds(value := getattr(of, name)):
            raise ValueError(f"{name}={value!r}: expected {expected}.")


@dataclass(frozen=True)
class Plan:
    """A run of RLSD on GPUs, and as `grpo` the same without a teacher. RLSDConfig's names are kept.

    `prompt_length` counts the tokens of the images, `image_tokens` are those of one image per
    prompt, and `privileged_length` is what the teacher's prompt has more than the student's. Speeds
    are those of an H100 SXM's data sheet, bf16 without sparsity, and guesses of what is reached.

    Raises:
        ValueError: for what no run can have, naming the field and what was expected.
    """

    shape: ModelShape
    gpus: int
    prompt_length: int
    max_completion_length: int
    rollouts: int  # per optimiser step, over all GPUs
    num_generations: int = 8
    per_device_train_batch_size: int = 1
    privileged_length: int = 128
    image_tokens: int = 0
    sharding: str = "ddp"
    dtype: str = "float32"  # of the weights; computing is in bf16
    gradient_checkpointing: bool = True
    lora_rank: int = 0  # 0 trains all weights
    teacher_model_kind: str = "snapshot"
    teacher_pass: str = "auto"
    beta: float = 0.0
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_enable_sleep_mode: bool = False
    gpu_memory: float = 80.0  # GiB of one GPU
    tflops: float = 989.0  # of one GPU
    bandwidth: float = 3.35  # TB/s
    mfu: float = 0.4  # share of `tflops` that training and prefill reach
    mbu: float = 0.6  # share of `bandwidth` that decoding reaches
    activations: float = 1.0  # measured bytes of activations over those of the arithmetic
    speeds: str = "assumed, an H100's data sheet and guesses"  # where they come from

    def __post_init__(self) -> None:
        from_1 = ("gpus", "prompt_length", "max_completion_length", "rollouts", "num_generations")
        expect(self, from_1, lambda n: n >= 1, "a number >= 1")
        expect(self, ["per_device_train_batch_size"], lambda n: n >= 1, "a number >= 1")
        from_0 = ("privileged_length", "image_tokens", "lora_rank", "beta")
        expect(self, from_0, lambda n: n >= 0, "a number >= 0")
        speeds = ("gpu_memory", "tflops", "bandwidth", "activations")
        expect(self, speeds, lambda n: n > 0, "a number > 0")
        shares = ("mfu", "mbu", "vllm_gpu_memory_utilization")
        expect(self, shares, lambda n: 0 < n < 1, "a share in (0, 1)")
        for name, valid in VALID.items():
            expect(self, [name], valid.__contains__, ", ".join(valid))
        room = f"fewer than prompt_length={self.prompt_length}, to leave room for text"
        expect(self, ["image_tokens"], lambda n: n < self.prompt_length, room)
        rows, group = self.gpus * self.per_device_train_batch_size, self.num_generations
        whole = (
            f"a multiple of {rows} (gpus x per_device_train_batch_size) and of "
            f"num_generations={group}"
        )
        expect(self, ["rollouts"], lambda n: n % rows == 0 and n % group == 0, whole)
        if self.teacher_pass == "shared" and self.sharding != "ddp":
            raise ValueError(
                f"teacher_pass='shared' with sharding={self.sharding!r}: sharded parameters are "
                "gathered by whole calls only. Use 'auto' or 'plain'."
            )

    @property
    def grpo(self) -> "Plan":
        """The same run without a teacher."""
        return replace(self, teacher_model_kind=NO_TEACHER)

    @property
    def _uses_teacher(self) -> bool:
        return self.teacher_model_kind != NO_TEACHER

    @property
    def _copies_teacher(self) -> bool:
        # Of all weights, or of an adapter.
        return self.teacher_model_kind not in (NO_TEACHER, "live")

    @property
    def _shares_gpu(self) -> bool:
        return self.use_vllm and self.vllm_mode == "colocate"

    @property
    def shares_prompts(self) -> bool:
        """Whether the teacher pass computes each prompt once for all rollouts of its group."""
        if self.teacher_pass != "auto":
            return self.teacher_pass == "shared"
        prompt = self.prompt_length + self.privileged_length
        shared = prompt / self.num_generations + self.max_completion_length
        plain = prompt + self.max_completion_length
        can_share = self.sharding == "ddp" and not self.image_tokens
        return can_share and shared <= WORTH_IT * plain

    @property
    def _width(self) -> int:
        return FP32 if self.dtype == "float32" else BF16

    @property
    def _shards(self) -> int:
        return 1 if self.sharding == "ddp" else self.gpus

    @property
    def _residual(self) -> int:
        # Bytes per number of the stream, which autocast leaves to the weights' type.
        return self._width if self._shards == 1 else BF16

    @property
    def _weight_bytes(self) -> float:
        return self.shape.parameters * self._width / self._shards

    @property
    def _length(self) -> int:
        return self.prompt_length + self.max_completion_length

    @property
    def at_once(self) -> float:
        """Rollouts of full length that one GPU decodes at a time."""
        share = self.rollouts / self.gpus
        if not self._shares_gpu:
            return share
        room = self.vllm_gpu_memory_utilization * self.gpu_memory - VLLM_WORK
        left = room * GIB - self.shape.parameters * BF16
        return min(left / self.shape.cache_bytes(self._length), share)

    @property
    def fits(self) -> bool:
        """Whether the largest phase fits, and vLLM has room for at least one rollout."""
        return self.peak() <= self.gpu_memory and self.at_once >= 1

    def peak(self) -> float:
        """GiB per GPU in the largest phase."""
        total = {phase: sum(parts.values()) for phase, parts in self.memory().items()}
        return total.pop(ALWAYS) + max(total.values())

    def memory(self) -> dict[str, dict[str, float]]:
        """GiB per GPU by phase and part: ALWAYS, and phases of which only one is there at a time.

        FSDP2 gathers two layers at a time in bf16, and keeps embedding and head gathered; ZeRO-3
        has the same bytes in another order.
        """
        shape, weights, sharded = self.shape, self._weight_bytes, self._shards > 1
        adapter = shape.lora_parameters(self.lora_rank) * FP32
        trained = adapter if self.lora_rank else weights
        vllm = self.vllm_gpu_memory_utilization * self.gpu_memory * GIB if self._shares_gpu else 0
        asleep = vllm if self.vllm_enable_sleep_mode else 0
        cache = self.rollouts / self.gpus * shape.cache_bytes(self._length, self._width)
        whole = shape.parameters * self._width
        gathered = {
            "gathered weights": (2 * shape.layer_weights + shape.ends) * BF16 if sharded else 0
        }
        phases = {
            ALWAYS: {
                "reserved": RESERVED * GIB,
                "weights": weights + adapter,
                "optimiser": 2 * trained,
                "reference model": weights if self.beta and not self.lora_rank else 0,
                "teacher": trained if self._copies_teacher else 0,
                "vLLM": vllm - asleep,
            },
            "generation": {
                "vLLM, awake": asleep,
                "KV cache": 0 if self.use_vllm else cache,
                "gathered weights": whole if sharded and not self.use_vllm else 0,
            },
            "update": {
                "gradients": trained,
                "DDP buckets": trained if not sharded and self.gpus > 1 else 0,
                **self._update(),
                **gathered,
            },
            "teacher pass": {**self._teacher_pass(), **gathered} if self._uses_teacher else {},
        }
        return {
            phase: {part: count / GIB for part, count in parts.items() if count}
            for phase, parts in phases.items()
        }

    def _update(self) -> dict[str, float]:
        """Bytes of one forward and backward. Checkpointing keeps each block's input, and one block."""
        shape, rows = self.shape, self.per_device_train_batch_size
        patches = rows * self.image_tokens * shape.vision_channels
        block = self._layer_activations(self._length)
        if self.gradient_checkpointing:
            stream = rows * self._length * shape.hidden * self._residual
            kept = shape.layers * stream + block + patches * self._residual
        else:
            kept = shape.layers * block + patches * 20 * BF16  # about 20 numbers for each
        states = rows * self.max_completion_length * shape.hidden * FP32
        head = 0 if self.lora_rank else shape.vocabulary * shape.hidden * FP32
        cast = 2 * shape.layer_weights if self.lora_rank else shape.parameters - shape.ends
        return {
            "activations": self.activations * kept,
            "LM head, in tiles": self._tile + head + states,
            "bf16 copies of autocast": cast * BF16 if self._residual > BF16 else 0,
        }

    def _teacher_pass(self) -> dict[str, float]:
        length = self._length + self.privileged_length
        cache = self.per_device_train_batch_size * self.shape.cache_bytes(length, self._width)
        return {
            "activations": self.activations * self._layer_activations(length),
            "LM head, in tiles": self._tile,
            "KV cache": cache if self.shares_prompts else 0,
        }

    def _layer_activations(self, length: int) -> float:
        rows = self.per_device_train_batch_size
        return self.shape.layer_activations(rows, length, residual=self._residual)

    @property
    def _tile(self) -> float:
        tokens = self.per_device_train_batch_size * self.max_completion_length
        return min(tokens, TILE[0]) * min(self.shape.vocabulary, TILE[1]) * BF16

    def flops(self) -> dict[str, float]:
        """FLOPs of one optimiser step by part, summed over all GPUs.

        The LM head scores completions alone, as with Triton or `completion_head=True`.
        """
        shape, rollouts, new = self.shape, self.rollouts, self.max_completion_length
        body, head = self._prefill(self._length), shape.head_flops(new)
        prompts, before = rollouts / self.num_generations, self.prompt_length
        # vLLM keeps the prefixes it has seen.
        prefills = (prompts if self.use_vllm else rollouts) * self._prefill(before)
        # The head's backward computes its logits once more. With LoRA no matrix has a gradient.
        backward = (1, 2) if self.lora_rank else (2, 3)
        parts = {
            "generation": prefills + rollouts * (shape.layer_flops(new, before + new / 2) + head),
            "policy forward": rollouts * (body + head),
            "policy backward": rollouts * (backward[0] * body + backward[1] * head),
            "policy recomputed": rollouts * body if self.gradient_checkpointing else 0,
            # For TRL's importance sampling correction.
            "old log-probabilities": rollouts * (body + head) if self.use_vllm else 0,
            "reference model": rollouts * (body + head) if self.beta else 0,
        }
        before += self.privileged_length
        if self._uses_teacher and self.shares_prompts:
            # The prompt's last token opens every completion, see trainer/shared_prompts.py.
            completions = rollouts * (shape.layer_flops(new, before - 1 + new) + head)
            parts["teacher"] = prompts * self._prefill(before - 1) + completions
        elif self._uses_teacher:
            parts["teacher"] = rollouts * (self._prefill(before + new) + head)
        return {part: count for part, count in parts.items() if count}

    def _prefill(self, tokens: int) -> float:
        """All layers over one sequence that begins with the prompt and its image."""
        image = 2 * self.image_tokens * self.shape.vision_weights
        return self.shape.layer_flops(tokens, tokens) + image

    def seconds(self) -> dict[str, float]:
        """Seconds of one optimiser step by part; generation is bound by compute or by memory."""
        rate = self.tflops * 1e12 * self.mfu * self.gpus
        parts = {part: count / rate for part, count in self.flops().items()}
        # One GPU decodes its share: weights per token and wave, and the KV cache.
        share, new = self.rollouts / self.gpus, self.max_completion_length
        waves = share / max(self.at_once, 1.0)
        weights = self.shape.parameters * (BF16 if self.use_vllm else self._width)
        cache = self.shape.cache_bytes(self.prompt_length + new / 2)
        reads = new * (waves * weights + share * cache)
        parts["generation"] = max(parts["generation"], reads / (self.bandwidth * 1e12 * self.mbu))
        return parts

    def step(self) -> float:
        """Seconds of an optimiser step."""
        return sum(self.seconds().values())


FIELDS = tuple(f.name for f in fields(Plan) if f.name not in ("shape", "gpus", "speeds"))


def plan_of(preset: Preset, *, gpus: int, measured: Path | None = None, **changes: Any) -> Plan:
    """The plan of a preset on `gpus` GPUs, with `changes` of `FIELDS` on top.

    `rollouts` are the preset's `rollouts_per_step` where it has them, and otherwise what its batch
    size and accumulation make on so many GPUs. Speeds are those that `rlsd bench --gpu` measured on
    its largest model, from the table `measured`, by default the project's bench_gpu.csv if there is
    one, and otherwise the assumptions of `Plan`.

    Raises:
        ValueError: naming what the preset does not say and no change gives.
        FileNotFoundError: for a table `measured` that is not there.
    """
    shape, training = shape_of(config_named(preset.model)), preset.training
    rows = training.get("per_device_train_batch_size", 8)
    made = rows * training.get("gradient_accumulation_steps", 1) * gpus
    found = {name: training[name] for name in FIELDS if name in training} | {
        "sharding": "fsdp2" if preset.accelerate and gpus > 1 else "ddp",
        "dtype": str(preset.model_options.get("dtype", "float32")).removeprefix("torch."),
        "lora_rank": preset.lora.get("r", 0),
        "prompt_length": preset.max_prompt_length,
        "rollouts": preset.rollouts_per_step or made,
        # 1,048,576 pixels, the largest image of the released script.
        "image_tokens": 1024 if shape.vision_weights and preset.sees_images else 0,
    }
    if not found["prompt_length"] and "prompt_length" not in changes:
        raise ValueError(
            "The preset does not say how long a prompt is. Add -p prompt_length=TOKENS."
        )
    table = measured or outputs_root() / "tables" / "bench_gpu.csv"
    if measured or table.is_file():
        for speeds in pd.read_csv(table)[[*MEASURED]].dropna().tail(1).to_dict("records"):
            found |= {"speeds": f"measured, {table}"} | speeds
    return Plan(shape=shape, gpus=gpus, **(found | changes))


# What may be changed when a run does not fit: what changes least about the run comes first.
CHANGES: tuple[Mapping[str, Any], ...] = (
    {"vllm_enable_sleep_mode": True},
    {"gradient_checkpointing": True},
    {"sharding": "fsdp2", "teacher_pass": "auto"},
    {"per_device_train_batch_size": 1},
    {"dtype": "bfloat16"},
    {"lora_rank": 64},
)


def advice(plan: Plan) -> Plan:
    """The plan with `CHANGES` on top of each other until it fits, without those that do not help.

    The share of the GPU for vLLM is the one with the fastest step: more KV cache is more rollouts
    decoded at a time. A plan that fits is changed for a tenth of its step or more.
    """

    def lack(of: Plan) -> float:
        return of.peak() if of.at_once >= 1 else math.inf

    best = plan
    for change in ({}, *CHANGES):
        tries = [replace(best, **change)]
        if plan._shares_gpu:
            shares = (percent / 100 for percent in range(5, 95, 5))
            tries += [replace(tries[0], vllm_gpu_memory_utilization=share) for share in shares]
        if fitting := [tried for tried in tries if tried.fits]:
            fastest = min(fitting, key=Plan.step)
            return plan if plan.fits and fastest.step() > 0.9 * plan.step() else fastest
        best = min([best, *tries], key=lack)
    return best


def describe(plan: Plan, title: str) -> str:
    """The plan as text: setting, memory by part, seconds by phase, verdict, and what to change."""
    named = ", ".join(f"{name}={getattr(plan, name)}" for name in ("gpus", *FIELDS))
    memory = [
        {(phase, part): gib for phase, parts in p.memory().items() for part, gib in parts.items()}
        for p in (plan.grpo, plan)
    ]
    seconds = [p.seconds() | {"all": p.step()} for p in (plan.grpo, plan)]
    lines = [
        title,
        *textwrap.wrap(f"{plan.shape.parameters / 1e9:.2f} B parameters; {named}", 100),
        f"{'shared' if plan.shares_prompts else 'plain'} teacher pass; {plan.at_once:.0f} rollouts "
        "decoded at a time per GPU; all of full length, no communication",
        "",
        _table("GiB per GPU", *memory),
        "",
        _table("seconds per step", *seconds),
        f"RLSD / GRPO: {plan.step() / plan.grpo.step():.3f} in time; speeds: {plan.speeds}",
        "",
        f"RLSD {'fits' if plan.fits else 'does NOT fit'}: peak {plan.peak():.1f} of "
        f"{plan.gpu_memory:g} GiB per GPU.",
    ]
    if plan.at_once < 1:
        lines.append(
            f"vLLM's share of {plan.vllm_gpu_memory_utilization:g} holds its weights and not one "
            f"rollout of {plan.prompt_length + plan.max_completion_length} tokens."
        )
    better = advice(plan)
    if better != plan:
        changed = [name for name in FIELDS if getattr(better, name) != getattr(plan, name)]
        lines.append(
            f"{'Faster' if plan.fits else 'Change'}: "
            f"{', '.join(f'{name}={getattr(better, name)}' for name in changed)}: peak "
            f"{better.peak():.1f} GiB, step {plan.step():.0f} -> {better.step():.0f} s"
        )
    if not better.fits:
        lines.append("More or larger GPUs, or shorter rollouts: no such change suffices.")
    return "\n".join(lines)


def _table(title: str, grpo: Mapping[Any, float], rlsd: Mapping[Any, float]) -> str:
    """Two columns; RLSD's rows are GRPO's and more, so they give the order."""
    table = pd.DataFrame({"GRPO": pd.Series(grpo), "RLSD": pd.Series(rlsd)}).reindex([*rlsd])
    shown = table.rename_axis(columns=title)
    return shown.to_string(float_format="{:.2f}".format, na_rep="-")
