"""`rlsd plan`: does a run fit, what does a step of GRPO and of RLSD cost, what to change if not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rlsd_lib.experiment.cost.budget import Memory, Setting, concurrency, memory
from rlsd_lib.experiment.cost.shapes import SHAPES, ModelShape
from rlsd_lib.experiment.cost.step import Cost, Speed, cost

SETTING_FIELDS = tuple(f.name for f in fields(Setting) if f.name not in ("shape", "gpus"))
SPEED_FIELDS = tuple(f.name for f in fields(Speed))

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


@dataclass(frozen=True)
class Plan:
    """A setting on GPUs of `gpu_memory` GiB, with memory and cost of GRPO and of RLSD."""

    setting: Setting
    gpu_memory: float
    speed: Speed

    def memory(self, method: str) -> Memory:
        """GiB per GPU; `method` is "grpo" or "rlsd"."""
        return memory(self.setting, self.gpu_memory, teacher=method == "rlsd")

    def cost(self, method: str) -> Cost:
        """FLOPs and seconds of a step; `method` is "grpo" or "rlsd"."""
        return cost(self.setting, self.speed, self.gpu_memory, teacher=method == "rlsd")

    @property
    def ratio(self) -> float:
        """Seconds of an RLSD step over those of a GRPO step."""
        return self.cost("rlsd").total / self.cost("grpo").total

    @property
    def at_once(self) -> float:
        """Rollouts of full length that one GPU decodes at a time."""
        return concurrency(self.setting, self.gpu_memory)

    @property
    def fits(self) -> bool:
        """Whether RLSD's peak fits, and vLLM can hold at least one rollout."""
        return self.memory("rlsd").peak <= self.gpu_memory and self.at_once >= 1


def make_plan(setting: Setting, *, gpu_memory: float, speed: Speed | None = None) -> Plan:
    """A plan for GPUs of `gpu_memory` GiB.

    Raises:
        ValueError: for a memory that is no size of a GPU.
    """
    if gpu_memory <= 0:
        raise ValueError(f"gpu_memory={gpu_memory}: expected GiB per GPU, such as 80.")
    return Plan(setting, gpu_memory, speed or Speed())


def setting_of(
    preset: Mapping[str, Any], *, shape: ModelShape, gpus: int, changes: Mapping[str, Any]
) -> Setting:
    """The setting of a preset's fields on `gpus` GPUs, with `changes` on top.

    `rollouts` are the preset's `rollouts_per_step` where it has them, and otherwise what its batch
    size and accumulation make on so many GPUs.

    Raises:
        ValueError: naming what the preset does not say and no change gives.
    """
    training = preset["training"]
    found = {name: training[name] for name in SETTING_FIELDS if name in training}
    found["dtype"] = str(preset["model_options"].get("dtype", "float32")).removeprefix("torch.")
    if rank := preset.get("lora", {}).get("r"):
        found["lora_rank"] = rank
    if length := preset.get("max_prompt_length"):
        found["prompt_length"] = length
    each = training.get("per_device_train_batch_size", 8)
    made = each * training.get("gradient_accumulation_steps", 1) * gpus
    found["rollouts"] = preset.get("rollouts_per_step") or made
    if preset.get("sees_images"):
        found["image_tokens"] = 1024  # 1,048,576 pixels, the largest image of the released script
    found |= changes
    if "prompt_length" not in found:
        raise ValueError(
            "The preset does not say how long a prompt is. Add -p prompt_length=TOKENS."
        )
    if not shape.vision:
        found["image_tokens"] = 0
    return Setting(shape=shape, gpus=gpus, **found)


def shape_named(model: str) -> ModelShape:
    """The sizes of a model that the planner knows by name.

    Raises:
        ValueError: naming the models it knows.
    """
    if model not in SHAPES:
        raise ValueError(f"No sizes are known for model {model!r}. Known: {', '.join(SHAPES)}.")
    return SHAPES[model]


def advice(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that help, in order and on top of each other, until the plan fits."""
    for change, why in (*CHANGES, ({}, "")):
        if plan.fits:
            return
        if plan.at_once < 1 and (roomy := _best_share(plan)) is not None:
            share = roomy.setting.vllm_gpu_memory_utilization
            yield (
                f"vllm_gpu_memory_utilization={share:g}: vLLM's weights and cache need room",
                roomy,
            )
            return
        changed = _changed(plan, change)
        if changed is not None and _helps(changed, plan):
            named = ", ".join(f"{name}={value}" for name, value in change.items())
            plan = changed
            yield f"{named}: {why}", plan


def _changed(plan: Plan, change: Mapping[str, Any]) -> Plan | None:
    """The plan with a change, None where it changes nothing or cannot be."""
    setting = plan.setting
    if all(getattr(setting, name) == value for name, value in change.items()):
        return None
    if change.get("sharding") and (setting.gpus == 1 or setting.sharding != "ddp"):
        return None
    if change.get("lora_rank") and setting.lora_rank:
        return None
    if change.get("sharding") and setting.teacher_pass == "shared":
        setting = replace(setting, teacher_pass="auto")
    return replace(plan, setting=replace(setting, **change))


def faster(plan: Plan) -> Plan | None:
    """The plan with the best share of the GPU for vLLM, None if that saves less than a tenth."""
    best = _best_share(plan)
    slow = best is None or best.cost("rlsd").total > 0.9 * plan.cost("rlsd").total
    return None if slow else best


def _best_share(plan: Plan) -> Plan | None:
    """The share for vLLM with the least step time of those that fit, None if none does.

    More cache is more rollouts decoded at a time, so weights are read for fewer waves of them.
    """
    if not plan.setting.shares_gpu:
        return None
    shares = [percent / 100 for percent in range(5, 95, 5)]
    plans = [
        replace(plan, setting=replace(plan.setting, vllm_gpu_memory_utilization=share))
        for share in shares
    ]
    return min((p for p in plans if p.fits), key=lambda p: p.cost("rlsd").total, default=None)


def _helps(new: Plan, old: Plan) -> bool:
    """Whether a change lowers the peak, or, where only vLLM lacks room, what is kept beside it."""
    memories = [plan.memory("rlsd") for plan in (new, old)]
    if old.memory("rlsd").peak <= old.gpu_memory:
        after, before = (sum(m.kept.values()) for m in memories)
    else:
        after, before = (m.peak for m in memories)
    return after < before - 0.05


def describe(plan: Plan, title: str) -> str:
    """The plan as text: setting, memory by phase, cost by part, verdict, and what to change."""
    parts = [title, *_setting_lines(plan), "", *_memory_lines(plan), "", *_cost_lines(plan), ""]
    verdict = "fits" if plan.fits else "does NOT fit"
    peak = plan.memory("rlsd").peak
    parts.append(f"RLSD {verdict}: peak {peak:.1f} of {plan.gpu_memory:g} GiB per GPU.")
    if plan.at_once < 1:
        parts.append(
            f"vLLM's share of {plan.setting.vllm_gpu_memory_utilization:g} holds its weights and "
            f"not one rollout of {plan.setting.length} tokens."
        )
    parts += _advice_lines(plan) if not plan.fits else _faster_lines(plan)
    return "\n".join(parts)


def _setting_lines(plan: Plan) -> list[str]:
    s = plan.setting
    micro = s.rollouts // (s.gpus * s.per_device_train_batch_size)
    trained = f"LoRA rank {s.lora_rank}" if s.lora_rank else "all weights trained"
    images = f", {s.image_tokens} of them an image's" if s.image_tokens else ""
    engine = f"vLLM {s.vllm_mode}" if s.use_vllm else "transformers"
    decoded = min(plan.at_once, s.rollouts / s.gpus)
    return [
        f"  {s.shape.parameters / 1e9:.2f} B parameters in {s.dtype}, {trained}; GPUs: {s.gpus} of "
        f"{plan.gpu_memory:g} GiB, {s.sharding}",
        f"  {s.rollouts} rollouts per step ({s.rollouts // s.num_generations} prompts x "
        f"{s.num_generations}); prompt {s.prompt_length} tokens{images}, completion "
        f"{s.max_completion_length}",
        f"  {s.per_device_train_batch_size} rollouts per forward, {micro} of them per GPU and step;"
        f" rollouts by {engine}, {decoded:.0f} at a time per GPU",
        f"  teacher: {s.teacher_model_kind}, {'shared' if s.shares_prompts else 'plain'} pass"
        f"{', offloaded' if s.teacher_offload and s.copies_teacher else ''}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    columns = [plan.memory("grpo"), plan.memory("rlsd")]
    rows = _table("GiB per GPU", [m.kept for m in columns])
    for phase in columns[1].phases:
        found = [m.phases.get(phase, {}) for m in columns]
        peaks = [m.peaks.get(phase, 0.0) for m in columns]
        rows += [f"while in: {phase}"] if any(found) else []
        rows += _rows({part: [f.get(part, 0.0) for f in found] for part in _union(found)})
        rows += _rows({f"= peak, {phase}": peaks})
    return rows


def _cost_lines(plan: Plan) -> list[str]:
    columns = [plan.cost("grpo"), plan.cost("rlsd")]
    petaflops = [{k: v / 1e15 for k, v in c.flops.items()} for c in columns]
    rows = _table("PFLOP per step, all GPUs", petaflops)
    rows += _rows({"= all": [sum(p.values()) for p in petaflops]})
    rows += ["", *_table("seconds per step", [c.seconds for c in columns])]
    rows += _rows({"= step": [c.total for c in columns]})
    speed = plan.speed
    return [
        *rows,
        f"RLSD / GRPO: {plan.ratio:.3f} in time",
        f"  assumed: {speed.tflops:g} TFLOP/s per GPU at {speed.mfu:.0%}, {speed.bandwidth:g} TB/s "
        f"at {speed.mbu:.0%}; full-length rollouts; no communication",
    ]


def _advice_lines(plan: Plan) -> list[str]:
    lines, last = ["To make it fit, in this order:"], plan
    for text, changed in advice(plan):
        peaks = [p.memory("rlsd").peak for p in (last, changed)]
        seconds = changed.cost("rlsd").total
        lines.append(f"  {text}")
        lines.append(f"    peak {peaks[0]:.1f} -> {peaks[1]:.1f} GiB, step {seconds:.0f} s")
        last = changed
    if not last.fits:
        lines.append("  and more or larger GPUs, or shorter rollouts: these changes do not suffice")
    return lines


def _faster_lines(plan: Plan) -> list[str]:
    quicker = faster(plan)
    if quicker is None:
        return []
    seconds = [p.cost("rlsd").total for p in (plan, quicker)]
    return [
        f"Faster: vllm_gpu_memory_utilization={quicker.setting.vllm_gpu_memory_utilization:g} "
        f"decodes {min(quicker.at_once, quicker.setting.rollouts / quicker.setting.gpus):.0f} "
        f"rollouts at a time: step {seconds[0]:.0f} -> {seconds[1]:.0f} s, peak "
        f"{quicker.memory('rlsd').peak:.1f} GiB, RLSD / GRPO {quicker.ratio:.3f}."
    ]


def _table(title: str, columns: list[Mapping[str, float]]) -> list[str]:
    head = f"{title:<34}{'GRPO':>10}{'RLSD':>10}"
    return [head, *_rows({part: [c.get(part, 0.0) for c in columns] for part in _union(columns)})]


def _rows(rows: Mapping[str, list[float]]) -> list[str]:
    return [f"  {name:<32}{_short(a):>10}{_short(b):>10}" for name, (a, b) in rows.items()]


def _short(value: float) -> str:
    return "-" if not value else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _union(columns: list[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for column in columns for name in column))
