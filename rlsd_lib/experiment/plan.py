"""`rlsd plan`: does a run fit, what does a step of GRPO and of RLSD cost, what to change if not.

Arithmetic alone. Every rollout is taken at its full length: memory is that of the worst batch, and
seconds are upper bounds at the assumed speed. Not counted: communication, weight sync, data
loading, rewards and evaluation.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from rlsd_lib.experiment.shapes import BF16, FP32, ModelShape, shape_named
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.trainer.teacher_pass import WORTH_IT

GIB = 2**30
# TRL's fused head works in tiles of so many tokens by so many words (kernels/chunked_logprob.py).
TILE = (4096, 32768)
RESERVED = 2.0  # GiB per GPU: CUDA context, communication buffers, fragmentation
VLLM_WORK = 1.5  # GiB that vLLM needs beside weights and cache
HOST_LINK = 50e9  # bytes per second between a GPU and the host, PCIe 5
ALWAYS = "always"  # the phase of what stays for the whole run


# Plans

LEAST = {
    **dict.fromkeys(("gpus", "prompt_length", "max_completion_length", "rollouts"), 1),
    **dict.fromkeys(("num_generations", "per_device_train_batch_size"), 1),
    **dict.fromkeys(("privileged_length", "image_tokens", "lora_rank", "beta"), 0),
}
MEASURED = ("tflops", "bandwidth", "mfu", "activations")
ABOVE_0 = ("gpu_memory", "tflops", "bandwidth", "activations")
SHARES = ("mfu", "mbu", "vllm_gpu_memory_utilization")
VALID = {
    "sharding": ("ddp", "fsdp2", "zero3"),
    "teacher_pass": ("auto", "plain", "shared"),
    "dtype": ("float32", "bfloat16"),
    "teacher_model_kind": ("live", "base", "ema", "snapshot"),
    "vllm_mode": ("colocate", "server"),
}


@dataclass(frozen=True)
class Plan:
    """A run on GPUs. Names that RLSDConfig has mean the same here.

    `prompt_length` counts the tokens of the images, `image_tokens` are those of one image per
    prompt, and `privileged_length` is what the teacher's prompt has more than the student's. Speeds
    are those of an H100 SXM's data sheet, bf16 without sparsity, and guesses of what is reached.
    The methods' `teacher` is True for RLSD and False for GRPO.

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
    teacher_offload: bool = False
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
        for name, least in LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value}: expected a number >= {least}.")
        for name in ABOVE_0:
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"{name}={value}: expected a number > 0.")
        for name in SHARES:
            if not 0 < (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: expected a share in (0, 1).")
        for name, valid in VALID.items():
            if (value := getattr(self, name)) not in valid:
                raise ValueError(f"{name}={value!r}: expected {', '.join(valid)}.")
        rows = self.gpus * self.per_device_train_batch_size
        if self.rollouts % rows or self.rollouts % self.num_generations:
            raise ValueError(
                f"rollouts={self.rollouts} per step: expected a multiple of {rows} (gpus x "
                f"per_device_train_batch_size) and of num_generations={self.num_generations}."
            )
        if self.teacher_pass == "shared" and self.sharding != "ddp":
            raise ValueError(
                f"teacher_pass='shared' with sharding={self.sharding!r}: sharded parameters are "
                "gathered by whole calls only. Use 'auto' or 'plain'."
            )
        if self.image_tokens >= self.prompt_length:
            raise ValueError(
                f"image_tokens={self.image_tokens} leave no room for text in prompt_length="
                f"{self.prompt_length}."
            )

    @property
    def width(self) -> int:
        """Bytes per weight as stored."""
        return FP32 if self.dtype == "float32" else BF16

    @property
    def residual(self) -> int:
        """Bytes per number of the residual stream: autocast leaves it to the weights' type."""
        return self.width if self.shards == 1 else BF16

    @property
    def shards(self) -> int:
        """GPUs over which weights, gradients and optimiser are spread."""
        return 1 if self.sharding == "ddp" else self.gpus

    @property
    def weight_bytes(self) -> float:
        """Bytes of one copy of the weights on one GPU."""
        return self.shape.parameters * self.width / self.shards

    @property
    def length(self) -> int:
        """Positions of one rollout with its prompt."""
        return self.prompt_length + self.max_completion_length

    @property
    def moves_teacher(self) -> bool:
        """Whether the teacher is a second copy of all weights that waits in CPU memory."""
        return self.teacher_offload and self.teacher_model_kind != "live" and not self.lora_rank

    @property
    def shares_gpu(self) -> bool:
        """Whether vLLM lives on the training GPUs."""
        return self.use_vllm and self.vllm_mode == "colocate"

    @property
    def shares_prompts(self) -> bool:
        """Whether the teacher pass computes each prompt once for all rollouts of its group."""
        if self.teacher_pass != "auto":
            return self.teacher_pass == "shared"
        prompt = self.prompt_length + self.privileged_length
        shared = prompt / self.num_generations + self.max_completion_length
        plain = prompt + self.max_completion_length
        return self.sharding == "ddp" and shared <= WORTH_IT * plain

    @property
    def at_once(self) -> float:
        """Rollouts of full length that one GPU decodes at a time."""
        if not self.shares_gpu:
            return self.rollouts / self.gpus
        room = self.vllm_gpu_memory_utilization * self.gpu_memory - VLLM_WORK
        left = room * GIB - self.shape.parameters * BF16
        return left / self.shape.cache_bytes(self.length)

    @property
    def ratio(self) -> float:
        """Seconds of an RLSD step over those of a GRPO step."""
        return self.step() / self.step(teacher=False)

    @property
    def fits(self) -> bool:
        """Whether RLSD's peak fits, and vLLM can hold at least one rollout."""
        return self.peak() <= self.gpu_memory and self.at_once >= 1

    def peak(self, *, teacher: bool = True) -> float:
        """GiB per GPU in the largest phase."""
        memory = self.memory(teacher=teacher)
        total = {phase: sum(parts.values()) for phase, parts in memory.items()}
        return total.pop(ALWAYS) + max(total.values())

    def memory(self, *, teacher: bool = True) -> dict[str, dict[str, float]]:
        """GiB per GPU by phase and part: ALWAYS, and phases of which only one is there at a time.

        FSDP2 gathers two layers at a time in bf16, and keeps embedding and head gathered; ZeRO-3
        has the same bytes in another order.
        """
        shape, weights, rank = self.shape, self.weight_bytes, self.lora_rank
        adapter = shape.lora_parameters(rank) * FP32
        trained = adapter if rank else weights
        vllm = self.vllm_gpu_memory_utilization * self.gpu_memory * GIB if self.shares_gpu else 0
        asleep = vllm if self.vllm_enable_sleep_mode else 0
        copied = teacher and self.teacher_model_kind != "live" and not self.moves_teacher
        sharded, whole = self.shards > 1, shape.parameters * self.width
        cache = self.rollouts / self.gpus * shape.cache_bytes(self.length, self.width)
        gathered = {
            "gathered weights": (2 * shape.layer_weights + shape.ends) * BF16 if sharded else 0
        }
        phases = {
            ALWAYS: {
                "reserved": RESERVED * GIB,
                "weights": weights + adapter,
                "optimiser": 2 * trained,
                "reference model": weights if self.beta and not rank else 0,
                "teacher": trained if copied else 0,
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
            "teacher pass": {**self._teacher_pass(), **gathered} if teacher else {},
        }
        return {
            phase: {part: count / GIB for part, count in parts.items() if count}
            for phase, parts in phases.items()
        }

    def _update(self) -> dict[str, float]:
        """Bytes of one forward and backward. Checkpointing keeps each block's input, and one block."""
        shape, rows, autocast = self.shape, self.per_device_train_batch_size, self.residual > BF16
        copied = 2 * shape.layer_weights if self.lora_rank else shape.parameters - shape.ends
        stream = rows * self.length * shape.hidden * self.residual
        blocks = [(shape.layers, stream, self._layer_activations(self.length))]
        if tower := shape.vision:
            channels = rows * self.image_tokens * tower.merged * tower.hidden
            # About 20 numbers per patch and channel.
            blocks.append((tower.layers, channels * self.residual, channels * 20 * BF16))
        states = rows * self.max_completion_length * shape.hidden * FP32
        head = 0 if self.lora_rank else shape.vocabulary * shape.hidden * FP32
        return {
            "activations": self.activations
            * sum(
                count * stream + block if self.gradient_checkpointing else count * block
                for count, stream, block in blocks
            ),
            "LM head, in tiles": self._tile + head + states,
            "bf16 copies of autocast": copied * BF16 if autocast else 0,
        }

    def _teacher_pass(self) -> dict[str, float]:
        length = self.length + self.privileged_length
        cache = self.per_device_train_batch_size * self.shape.cache_bytes(length, self.width)
        return {
            "activations": self.activations * self._layer_activations(length),
            "LM head, in tiles": self._tile,
            "KV cache": cache if self.shares_prompts else 0,
            "teacher": self.weight_bytes if self.moves_teacher else 0,
        }

    def _layer_activations(self, length: int) -> float:
        rows = self.per_device_train_batch_size
        return self.shape.layer_activations(rows, length, residual=self.residual, compute=BF16)

    @property
    def _tile(self) -> float:
        tokens = self.per_device_train_batch_size * self.max_completion_length
        return min(tokens, TILE[0]) * min(self.shape.vocabulary, TILE[1]) * BF16

    def flops(self, *, teacher: bool = True) -> dict[str, float]:
        """FLOPs of one optimiser step by part, summed over all GPUs.

        The LM head scores completions alone, as with Triton or `completion_head=True`.
        """
        shape, rollouts, new = self.shape, self.rollouts, self.max_completion_length
        body, head = self._prefill(self.length), shape.head_flops(new)
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
        if teacher and self.shares_prompts:
            # The prompt's last token opens every completion, see trainer/shared_prompts.py.
            completions = rollouts * (shape.layer_flops(new, before - 1 + new) + head)
            parts["teacher"] = prompts * self._prefill(before - 1) + completions
        elif teacher:
            parts["teacher"] = rollouts * (self._prefill(before + new) + head)
        return {part: count for part, count in parts.items() if count}

    def _prefill(self, tokens: int) -> float:
        """All layers over one sequence that begins with the prompt and its image."""
        tower, image = self.shape.vision, self.image_tokens
        return self.shape.layer_flops(tokens, tokens) + (tower.flops(image) if tower else 0)

    def seconds(self, *, teacher: bool = True) -> dict[str, float]:
        """Seconds of one optimiser step by part; generation is bound by compute or by memory."""
        rate = self.tflops * 1e12 * self.mfu * self.gpus
        parts = {part: count / rate for part, count in self.flops(teacher=teacher).items()}
        # One GPU decodes its share: weights per token and wave, and the KV cache.
        share, new = self.rollouts / self.gpus, self.max_completion_length
        waves = share / min(share, max(self.at_once, 1.0))
        weights = self.shape.parameters * (BF16 if self.use_vllm else self.width)
        cache = self.shape.cache_bytes(self.prompt_length + new / 2)
        reads = new * (waves * weights + share * cache)
        parts["generation"] = max(parts["generation"], reads / (self.bandwidth * 1e12 * self.mbu))
        if teacher and self.moves_teacher:
            parts["teacher to the GPU and back"] = 2 * self.weight_bytes / HOST_LINK
        return parts

    def step(self, *, teacher: bool = True) -> float:
        """Seconds of an optimiser step."""
        return sum(self.seconds(teacher=teacher).values())


FIELDS = tuple(f.name for f in fields(Plan) if f.name not in ("shape", "gpus", "speeds"))


def measured_speeds(path: Path) -> dict[str, Any]:
    """Fields of a plan as `rlsd bench --gpu` measured them on its largest model."""
    table = pd.read_csv(path).dropna(subset=list(MEASURED))
    if table.empty:
        return {}
    return {"speeds": f"measured, {path}"} | table[list(MEASURED)].iloc[-1].to_dict()


def plan_of(
    preset: Mapping[str, Any], *, gpus: int, measured: Path | None = None, **changes: Any
) -> Plan:
    """The plan of a preset's fields on `gpus` GPUs, with `changes` of `FIELDS` on top.

    `rollouts` are the preset's `rollouts_per_step` where it has them, and otherwise what its batch
    size and accumulation make on so many GPUs. Speeds are those of the table `measured`, by default
    the project's bench_gpu.csv if there is one, and otherwise the assumptions of `Plan`.

    Raises:
        ValueError: naming what the preset does not say and no change gives.
        FileNotFoundError: for a table `measured` that is not there.
    """
    shape, training = shape_named(preset["model"]), preset["training"]
    rows = training.get("per_device_train_batch_size", 8)
    made = rows * training.get("gradient_accumulation_steps", 1) * gpus
    sharded = preset.get("accelerate") and gpus > 1
    found = {name: training[name] for name in FIELDS if name in training} | {
        "sharding": "fsdp2" if sharded else "ddp",
        "dtype": str(preset["model_options"].get("dtype", "float32")).removeprefix("torch."),
        "lora_rank": preset.get("lora", {}).get("r", 0),
        "prompt_length": preset.get("max_prompt_length", 0),
        "rollouts": preset.get("rollouts_per_step") or made,
        # 1,048,576 pixels, the largest image of the released script.
        "image_tokens": 1024 if shape.vision and preset.get("sees_images") else 0,
    }
    if not found["prompt_length"] and "prompt_length" not in changes:
        raise ValueError(
            "The preset does not say how long a prompt is. Add -p prompt_length=TOKENS."
        )
    table = measured or outputs_root() / "tables" / "bench_gpu.csv"
    speeds = measured_speeds(table) if measured or table.is_file() else {}
    return Plan(shape=shape, gpus=gpus, **(found | speeds | changes))


# Advice

# What may be changed when a run does not fit: what changes least about the run comes first.
CHANGES: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"vllm_enable_sleep_mode": True}, "vLLM gives its share back while training"),
    ({"gradient_checkpointing": True}, "activations are computed again in the backward"),
    ({"sharding": "fsdp2"}, "weights, gradients, optimiser and teacher are spread over the GPUs"),
    ({"teacher_offload": True}, "the teacher waits in CPU memory between its passes"),
    ({"per_device_train_batch_size": 1}, "more gradient accumulation, the same rollouts per step"),
    ({"dtype": "bfloat16"}, "weights and optimiser in half precision: small updates are rounded"),
    ({"lora_rank": 64}, "an adapter is trained and the teacher is a second one"),
)


def advice(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes on top of each other until the plan fits, and the share for vLLM if it saves time."""
    for change, why in (*CHANGES, ({}, "")):
        best = _best_share(plan)
        if best is not None and (not plan.fits or best.step() < 0.9 * plan.step()):
            share = best.vllm_gpu_memory_utilization
            yield f"vllm_gpu_memory_utilization={share:g}: room for vLLM's weights and cache", best
        if best is not None or plan.fits:
            return
        changed = _changed(plan, change)
        if _need(changed) < _need(plan) - 0.05:
            plan = changed
            yield f"{', '.join(f'{name}={value}' for name, value in change.items())}: {why}", plan


def _best_share(plan: Plan) -> Plan | None:
    """The share for vLLM with the least step time of those that fit, None if none does.

    More cache is more rollouts decoded at a time, so weights are read for fewer waves of them.
    """
    if not plan.shares_gpu:
        return None
    shares = [percent / 100 for percent in range(5, 95, 5)]
    plans = [replace(plan, vllm_gpu_memory_utilization=share) for share in shares]
    return min((p for p in plans if p.fits), key=Plan.step, default=None)


def _changed(plan: Plan, change: Mapping[str, Any]) -> Plan:
    """The plan with a change, or as it is where the change cannot be."""
    if "sharding" in change:
        if plan.gpus == 1 or plan.sharding != "ddp":
            return plan
        change = {**change, "teacher_pass": "plain"}
    if "lora_rank" in change and plan.lora_rank:
        return plan
    return replace(plan, **change)


def _need(plan: Plan) -> float:
    """What a change must lower: the peak, or where that fits, what is kept beside vLLM."""
    peak = plan.peak()
    return peak if peak > plan.gpu_memory else sum(plan.memory()[ALWAYS].values())


# Text


def describe(plan: Plan, title: str) -> str:
    """The plan as text: setting, memory by phase, cost by part, verdict, and what to change."""
    named = ", ".join(f"{name}={getattr(plan, name)}" for name in ("gpus", *FIELDS))
    decoded = min(plan.at_once, plan.rollouts / plan.gpus)
    room, work, time = (
        [call(teacher=teacher) for teacher in (False, True)]
        for call in (plan.memory, plan.flops, plan.seconds)
    )
    peta = [{part: count / 1e15 for part, count in column.items()} for column in work]
    lines = [
        title,
        *textwrap.wrap(f"{plan.shape.parameters / 1e9:.2f} B parameters; {named}", 100),
        f"{'shared' if plan.shares_prompts else 'plain'} teacher pass; {decoded:.0f} rollouts "
        "decoded at a time per GPU; all of full length, no communication",
        "",
        _table("GiB per GPU", *map(_by_phase, room)),
        "",
        _table("PFLOP per step, all GPUs", *(c | {"= all": sum(c.values())} for c in peta)),
        "",
        _table("seconds per step", *(c | {"= step": sum(c.values())} for c in time)),
        f"RLSD / GRPO: {plan.ratio:.3f} in time; speeds: {plan.speeds}",
        "",
        f"RLSD {'fits' if plan.fits else 'does NOT fit'}: peak {plan.peak():.1f} of "
        f"{plan.gpu_memory:g} GiB per GPU.",
    ]
    if plan.at_once < 1:
        lines.append(
            f"vLLM's share of {plan.vllm_gpu_memory_utilization:g} holds its weights and not one "
            f"rollout of {plan.length} tokens."
        )
    return "\n".join([*lines, *_advice_lines(plan)])


def _by_phase(memory: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    always = memory[ALWAYS]
    column = dict(always)
    for phase, parts in memory.items():
        if parts is not always and parts:
            column |= {f"{phase}: {part}": value for part, value in parts.items()}
            column[f"= peak, {phase}"] = sum(always.values()) + sum(parts.values())
    return column


def _table(title: str, grpo: Mapping[str, float], rlsd: Mapping[str, float]) -> str:
    """Two columns; RLSD's rows are GRPO's and more, so they give the order."""
    table = pd.DataFrame({"GRPO": grpo, "RLSD": rlsd}).reindex(list(rlsd))
    shown = table.map(lambda v: f"{v:.1f}" if v >= 1 else "-" if pd.isna(v) else f"{v:.2g}")
    return shown.rename_axis(columns=title).to_string()


def _advice_lines(plan: Plan) -> list[str]:
    lines, last = [], plan
    for text, changed in advice(plan):
        lines += [
            f"  {text}",
            f"    peak {last.peak():.1f} -> {changed.peak():.1f} GiB, step {last.step():.0f} -> "
            f"{changed.step():.0f} s, RLSD / GRPO {changed.ratio:.3f}",
        ]
        last = changed
    if lines:
        lines.insert(0, "Faster:" if plan.fits else "To make it fit, in this order:")
    if not last.fits:
        lines.append("  and more or larger GPUs, or shorter rollouts: these changes do not suffice")
    return lines
