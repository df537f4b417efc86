"""`rlsd plan`: does a run fit, and what does a step of GRPO and of RLSD cost? Arithmetic alone.

Every rollout is taken at its full length: memory is that of the worst batch, and seconds are upper
bounds at the assumed speed. Left out is what changes the figures of a shipped preset by less than
5 %: the memory of the teacher pass, which is below the update's, and what a vision tower computes.
Not counted: communication, weight sync, data loading, rewards, evaluation, a reference model (`beta`)
and vLLM on other GPUs.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlsd_lib.experiment.presets import Preset
from rlsd_lib.names import check_fields
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.tasks.models import config_named
from rlsd_lib.trainer.shared_prompts import WORTH_IT

BF16, FP32 = 2, 4  # bytes per number
WIDTH = {"bfloat16": BF16, "float32": FP32}
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GIB = 2**30
RESERVED = 2.0  # GiB per GPU: CUDA context, communication buffers, fragmentation
VLLM_WORK = 1.5  # GiB that vLLM needs beside weights and cache
ALWAYS = "always"  # the phase of what stays for the whole run
MEASURED = ("mfu", "mbu", "activations")  # fields of `Plan` that a GPU was measured to have
NO_TEACHER = "none"  # the `teacher_model_kind` of GRPO
Positive = Annotated[float, lambda value: value > 0, "a number > 0"]
FromZero = Annotated[float, lambda value: value >= 0, "a number >= 0"]
Share = Annotated[float, lambda value: 0 < value < 1, "a share in (0, 1)"]


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with a gated MLP, as Qwen's or Llama's.

    Multiplication and addition are one FLOP each; attention counts every pair of positions, as a
    kernel with a padding mask does. Of a vision tower only the parameters count.
    """

    parameters: int  # all of them; a tied head counts once
    ends: int  # of these in the embedding and the LM head
    layer_weights: int  # entries of the matrices of one layer
    layer_sides: int  # rows and columns of these matrices
    head_weights: int  # entries of the LM head
    head_dim: int
    layers: int
    text: Any  # the decoder's transformers config

    def layer_flops(self, tokens: float, keys: float) -> float:
        """FLOPs of all layers for `tokens` positions, of which each attends to `keys`."""
        attention = 4 * tokens * keys * self.text.num_attention_heads * self.head_dim
        return self.layers * (2 * tokens * self.layer_weights + attention)

    def head_flops(self, tokens: float) -> float:
        """FLOPs of the LM head for `tokens` positions."""
        return 2 * tokens * self.head_weights

    def cache_bytes(self, tokens: float, width: int = BF16) -> float:
        """KV cache of one sequence of `tokens` tokens, `width` bytes per number."""
        return 2 * self.layers * self.text.num_key_value_heads * self.head_dim * tokens * width

    def layer_activations(self, rows: int, length: int, *, residual: int) -> float:
        """Bytes that the backward of one layer keeps for `rows` sequences of `length` positions.

        In bf16 with SDPA, which keeps no scores, repeats keys and values to all heads, and has a mask
        for each layer; `residual` is bytes per number of the residual stream, 4 under autocast.
        """
        heads, kv_heads = self.text.num_attention_heads, self.text.num_key_value_heads
        casts = 5 if residual != BF16 else 2
        numbers = (
            self.text.hidden_size * (2 * FP32 + 2 * residual + casts * BF16)
            + heads * self.head_dim * (FP32 + 5 * BF16)
            + kv_heads * self.head_dim * (FP32 + BF16)
            + self.text.intermediate_size * 4 * BF16
            + (2 + 2 * heads + kv_heads) * FP32
            + length * BF16
        )
        return rows * length * numbers


def shape_of(config: Any) -> ModelShape:
    """Sizes of a transformers config, counted on the meta device; ValueError for other layers."""
    text, sees_images = config.get_text_config(), hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    layer = next(iter(getattr(model.get_decoder(), "layers", ())), nn.Identity())
    linear = {n: m.weight for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if {name.split(".")[-1] for name in linear} != MATRICES:
        raise ValueError(
            f"model_type={config.model_type!r}: the planner knows decoders whose layers hold "
            f"{', '.join(sorted(MATRICES))}. Plan with a model of those, of a similar size."
        )
    head = model.get_output_embeddings().weight
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        ends=sum(p.numel() for p in {model.get_input_embeddings().weight, head}),
        layer_weights=sum(matrix.numel() for matrix in linear.values()),
        layer_sides=sum(sum(matrix.shape) for matrix in linear.values()),
        head_weights=head.numel(),
        head_dim=layer.self_attn.head_dim,
        layers=text.num_hidden_layers,
        text=text,
    )


@dataclass(frozen=True)
class Plan:
    """A run of RLSD on GPUs, and as `grpo` the same without a teacher. RLSDConfig's names are kept.

    Speeds are those of an H100 SXM's data sheet, bf16 without sparsity, and guesses of what is
    reached. Raises ValueError for what no run can have, naming the field.
    """

    shape: ModelShape
    gpus: Positive
    prompt_length: Positive  # tokens, those of images too
    max_completion_length: Positive
    rollouts: Positive  # per optimiser step, over all GPUs
    num_generations: Positive = 8
    per_device_train_batch_size: Positive = 1
    privileged_length: FromZero = 128  # what the teacher's prompt has more
    sees_images: bool = False
    sharding: Literal["ddp", "fsdp2", "zero3"] = "ddp"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; computing is in bf16
    gradient_checkpointing: bool = True
    lora_rank: FromZero = 0  # 0 trains all weights
    teacher_model_kind: Literal["live", "base", "ema", "snapshot", "none"] = "snapshot"
    use_vllm: bool = False  # on the training GPUs
    vllm_gpu_memory_utilization: Share = 0.3
    vllm_enable_sleep_mode: bool = False
    gpu_memory: Positive = 80.0  # GiB of one GPU
    tflops: Positive = 989.0  # of one GPU
    bandwidth: Positive = 3.35  # TB/s
    mfu: Share = 0.4  # share of `tflops` that training and prefill reach
    mbu: Share = 0.6  # share of `bandwidth` that decoding reaches
    activations: Positive = 1.0  # bytes that backward passes keep, over those counted here
    speeds: str = "assumed, an H100's data sheet and guesses"  # where they come from

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def grpo(self) -> "Plan":
        """The same run without a teacher."""
        return replace(self, teacher_model_kind=NO_TEACHER)

    @property
    def shares_prompts(self) -> bool:
        """Whether `teacher_pass="auto"` computes each prompt once for all rollouts of its group."""
        prompt, new = self.prompt_length + self.privileged_length, self.max_completion_length
        is_worth_it = prompt / self.num_generations + new <= WORTH_IT * (prompt + new)
        return self.sharding == "ddp" and not self.sees_images and is_worth_it

    @property
    def _length(self) -> int:
        return self.prompt_length + self.max_completion_length

    @property
    def at_once(self) -> float:
        """Rollouts of full length that one GPU decodes at a time."""
        share = self.rollouts / self.gpus
        if not self.use_vllm:
            return share
        room = self.vllm_gpu_memory_utilization * self.gpu_memory - VLLM_WORK
        left = room * GIB - self.shape.parameters * BF16
        return min(left / self.shape.cache_bytes(self._length), share)

    @property
    def fits(self) -> bool:
        """Whether the largest phase fits, and vLLM has room for at least one rollout."""
        return self.peak() <= self.gpu_memory and self.at_once >= 1

    def peak(self, *phases: str) -> float:
        """GiB per GPU in the largest of these phases, or of all."""
        total = {phase: sum(parts.values()) for phase, parts in self.memory().items()}
        return total.pop(ALWAYS) + max(total[phase] for phase in phases or total)

    def memory(self) -> dict[str, dict[str, float]]:
        """GiB per GPU by phase and part: ALWAYS, and phases of which only one is there at a time.

        FSDP2, as ZeRO-3, gathers two layers at a time in bf16, and keeps embedding and head.
        Checkpointing keeps each layer's input, and one layer.
        """
        shape, rows, sharded = self.shape, self.per_device_train_batch_size, self.sharding != "ddp"
        whole = shape.parameters * WIDTH[self.dtype]
        weights = whole / self.gpus if sharded else whole
        adapter = shape.layers * self.lora_rank * shape.layer_sides * FP32
        trained = adapter if self.lora_rank else weights
        vllm = self.vllm_gpu_memory_utilization * self.gpu_memory * GIB if self.use_vllm else 0
        asleep = vllm if self.vllm_enable_sleep_mode else 0
        cache = self.rollouts / self.gpus * shape.cache_bytes(self._length, WIDTH[self.dtype])
        # Autocast leaves the residual stream to the weights' type.
        residual = BF16 if sharded else WIDTH[self.dtype]
        layer = shape.layer_activations(rows, self._length, residual=residual)
        inputs = shape.layers * rows * self._length * shape.text.hidden_size * residual
        kept = inputs + layer if self.gradient_checkpointing else shape.layers * layer
        phases = {
            ALWAYS: {
                "reserved": RESERVED * GIB,
                "weights": weights + adapter,
                "optimiser": 2 * trained,
                "teacher": 0 if self.teacher_model_kind in (NO_TEACHER, "live") else trained,
                "vLLM": vllm - asleep,
            },
            "generation": {
                "vLLM, awake": asleep,
                "KV cache": 0 if self.use_vllm else cache,
                "gathered weights": whole if sharded and not self.use_vllm else 0,
            },
            "update": {
                "gradients": trained,
                "activations": kept * self.activations,
                "gradient of the LM head": 0 if self.lora_rank else shape.head_weights * FP32,
                "gathered weights": (2 * shape.layer_weights + shape.ends) * BF16 * sharded,
            },
        }
        return {when: {k: n / GIB for k, n in parts.items() if n} for when, parts in phases.items()}

    def flops(self) -> dict[str, float]:
        """FLOPs of one optimiser step by part, over all GPUs; the LM head scores completions alone."""
        shape, rollouts, new = self.shape, self.rollouts, self.max_completion_length
        body, head = shape.layer_flops(self._length, self._length), shape.head_flops(new)
        prompts, before = rollouts / self.num_generations, self.prompt_length
        # vLLM keeps the prefixes it has seen.
        prefills = (prompts if self.use_vllm else rollouts) * shape.layer_flops(before, before)
        # The head's backward computes its logits once more. With LoRA no matrix has a gradient.
        backward = (1, 2) if self.lora_rank else (2, 3)
        parts = {
            "generation": prefills + rollouts * (shape.layer_flops(new, before + new / 2) + head),
            "policy forward": rollouts * (body + head),
            "policy backward": rollouts * (backward[0] * body + backward[1] * head),
            "policy recomputed": rollouts * body if self.gradient_checkpointing else 0,
            # For TRL's importance sampling correction.
            "old log-probabilities": rollouts * (body + head) if self.use_vllm else 0,
        }
        before += self.privileged_length
        if self.teacher_model_kind != NO_TEACHER and self.shares_prompts:
            # The prompt's last token opens every completion, see trainer/shared_prompts.py.
            completions = rollouts * (shape.layer_flops(new, before - 1 + new) + head)
            parts["teacher"] = prompts * shape.layer_flops(before - 1, before - 1) + completions
        elif self.teacher_model_kind != NO_TEACHER:
            parts["teacher"] = rollouts * (shape.layer_flops(before + new, before + new) + head)
        return {part: count for part, count in parts.items() if count}

    def seconds(self) -> dict[str, float]:
        """Seconds of one optimiser step by part; generation is bound by compute or by memory."""
        rate = self.tflops * 1e12 * self.mfu * self.gpus
        parts = {part: count / rate for part, count in self.flops().items()}
        # One GPU decodes its share: weights per token and wave, and the KV cache.
        share, new = self.rollouts / self.gpus, self.max_completion_length
        waves = share / max(self.at_once, 1.0)
        weights = self.shape.parameters * (BF16 if self.use_vllm else WIDTH[self.dtype])
        cache = self.shape.cache_bytes(self.prompt_length + new / 2)
        reads = new * (waves * weights + share * cache)
        parts["generation"] = max(parts["generation"], reads / (self.bandwidth * 1e12 * self.mbu))
        return parts

    def step(self) -> float:
        """Seconds of an optimiser step."""
        return sum(self.seconds().values())


FIELDS = tuple(f.name for f in fields(Plan) if f.name not in ("shape", "gpus", "speeds"))


def plan_of(preset: Preset, *, gpus: int, **changes: Any) -> Plan:
    """The plan of a preset on `gpus` GPUs, with `changes` of `FIELDS` on top of what was `measured`.

    Raises ValueError where neither the preset nor a change says how long a prompt is.
    """
    training = preset.training
    rows = training.get("per_device_train_batch_size", 8)
    made = rows * training.get("gradient_accumulation_steps", 1) * gpus
    found = {name: training[name] for name in FIELDS if name in training} | {
        "sharding": "fsdp2" if preset.accelerate and gpus > 1 else "ddp",
        "dtype": str(preset.model_options.get("dtype", "float32")).removeprefix("torch."),
        "lora_rank": preset.lora.get("r", 0),
        "prompt_length": preset.max_prompt_length,
        "rollouts": preset.rollouts_per_step or made,
        "sees_images": preset.sees_images,
    }
    shape = shape_of(config_named(preset.model))
    if not found["prompt_length"] and "prompt_length" not in changes:
        raise ValueError("The preset does not say how long a prompt is. Add -p prompt_length=N.")
    return Plan(shape=shape, gpus=gpus, **(found | measured(found | changes) | changes))


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """The largest `MEASURED` of all models in outputs/tables/bench_gpu.csv, if it is there."""
    unfit = {*settings, "mbu" if settings.get("use_vllm") else ""}  # transformers generated
    names = [name for name in MEASURED if name not in unfit]
    file = outputs_root() / "tables" / "bench_gpu.csv"
    if not file.is_file():
        return {}
    table = pd.read_csv(file).reindex(columns=names).apply(pd.to_numeric, errors="coerce")
    found = {k: float(f"{v:.3g}") for k, v in table[table > 0].max().dropna().items()}
    source = {"speeds": f"{', '.join(found)} measured, {file}; others assumed"}
    return found and found | source


def describe(plan: Plan, title: str) -> str:
    """The plan as text: setting, memory by part, seconds by phase, and whether it fits."""
    named = ", ".join(f"{name}={getattr(plan, name)}" for name in ("gpus", *FIELDS))
    how = f"{'shared' if plan.shares_prompts else 'plain'} teacher pass; no communication"
    how += f"; {plan.at_once:.0f} rollouts, all of full length, decoded at a time per GPU"
    lines = [
        title,
        *textwrap.wrap(f"{plan.shape.parameters / 1e9:.2f} B parameters; {named}", 79),
        *textwrap.wrap(how, 79),
        _beside("GiB per GPU", plan, lambda p: pd.DataFrame(p.memory()).T.stack().dropna()),
        _beside("seconds per step", plan, lambda p: pd.Series(p.seconds() | {"all": p.step()})),
        f"RLSD / GRPO: {plan.step() / plan.grpo.step():.3f} in time; speeds: {plan.speeds}",
        f"\nRLSD {'fits' if plan.fits else 'does NOT fit'}: peak {plan.peak():.1f} of "
        f"{plan.gpu_memory:g} GiB per GPU.",
    ]
    if plan.at_once < 1:
        lines.append(f"vLLM's share has no room for one rollout of {plan._length} tokens.")
    return "\n".join(lines)


def _beside(what: str, plan: Plan, cost: Callable[[Plan], pd.Series]) -> str:
    """A cost by part, of GRPO beside RLSD."""
    rlsd = cost(plan)
    table = pd.DataFrame({"GRPO": cost(plan.grpo).reindex(rlsd.index), "RLSD": rlsd})
    shown = table.rename_axis(columns=what).to_string(float_format="{:.2f}".format, na_rep="-")
    return f"\n{shown}"
