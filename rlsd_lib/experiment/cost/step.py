"""FLOPs and seconds of a training step, from arithmetic alone; no torch.

Every rollout is taken at its full length, so seconds are upper bounds at the assumed speed.
Communication, weight sync, data loading, rewards and evaluation are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlsd_lib.experiment.cost.budget import Setting, concurrency
from rlsd_lib.experiment.cost.shapes import BF16

HOST_LINK = 50e9  # bytes per second between a GPU and the host, PCIe 5


@dataclass(frozen=True)
class Speed:
    """Assumed speed of one GPU; the defaults are an H100 SXM's data sheet, bf16 without sparsity."""

    tflops: float = 989.0
    bandwidth: float = 3.35  # TB/s
    mfu: float = 0.4  # share of `tflops` that training and prefill reach
    mbu: float = 0.6  # share of `bandwidth` that decoding reaches

    def __post_init__(self) -> None:
        for name in ("tflops", "bandwidth"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"{name}={value}: expected a number > 0.")
        for name in ("mfu", "mbu"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value}: expected a share in (0, 1].")


@dataclass(frozen=True)
class Cost:
    """FLOPs of one optimiser step over all GPUs, and its seconds, by part."""

    flops: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


def flops(setting: Setting, *, teacher: bool) -> dict[str, float]:
    """FLOPs of one optimiser step by part, summed over all GPUs.

    The LM head scores completions alone, as with Triton or `completion_head=True`.
    """
    shape, rollouts = setting.shape, setting.rollouts
    new, length = setting.max_completion_length, setting.length
    head = shape.head_flops(new)
    body = _prefill(setting, length)
    # vLLM keeps the prefixes it has seen.
    prefills = rollouts / setting.num_generations if setting.use_vllm else rollouts
    decode = shape.layer_flops(new, setting.prompt_length + new / 2) + shape.head_flops(new)
    # The head's backward computes its logits once more. With LoRA no weight matrix has a gradient.
    backward = (2, 3) if not setting.lora_rank else (1, 2)
    parts = {
        "generation": prefills * _prefill(setting, setting.prompt_length) + rollouts * decode,
        "policy forward": rollouts * (body + head),
        "policy backward": rollouts * (backward[0] * body + backward[1] * head),
    }
    if setting.gradient_checkpointing:
        parts["policy recomputed"] = rollouts * body
    if setting.use_vllm and setting.vllm_importance_sampling_correction:
        parts["old log-probabilities"] = rollouts * (body + head)
    if setting.beta:
        parts["reference model"] = rollouts * (body + head)
    if teacher:
        parts["teacher"] = _teacher_flops(setting)
    return parts


def _prefill(setting: Setting, tokens: int) -> float:
    """All layers over one sequence that begins with the prompt and its image."""
    shape = setting.shape
    return shape.layer_flops(tokens, tokens) + shape.vision_flops(setting.image_tokens)


def _teacher_flops(setting: Setting) -> float:
    shape, rollouts, prompt = setting.shape, setting.rollouts, setting.teacher_prompt
    new = setting.max_completion_length
    if setting.shares_prompts:
        # The prompt's last token opens every completion, see rlsd_lib/prefix.py.
        once = setting.rollouts / setting.num_generations * _prefill(setting, prompt - 1)
        return once + rollouts * (shape.layer_flops(new, prompt - 1 + new) + shape.head_flops(new))
    return rollouts * (_prefill(setting, prompt + new) + shape.head_flops(new))


def cost(setting: Setting, speed: Speed, gpu_memory: float, *, teacher: bool) -> Cost:
    """One optimiser step: its FLOPs, and its seconds at the assumed speed."""
    work = flops(setting, teacher=teacher)
    rate = speed.tflops * 1e12 * speed.mfu * setting.gpus
    seconds = {part: count / rate for part, count in work.items()}
    reads = _decode_bytes(setting, gpu_memory) / (speed.bandwidth * 1e12 * speed.mbu)
    seconds["generation"] = max(seconds["generation"], reads)
    if teacher and setting.copies_teacher and setting.teacher_offload:
        weights = setting.shape.parameters * setting.width / setting.shards
        seconds["teacher to the GPU and back"] = 2 * weights / HOST_LINK
    return Cost(work, seconds)


def _decode_bytes(setting: Setting, gpu_memory: float) -> float:
    """Bytes that one GPU reads while it decodes its share: weights per token and wave, and cache."""
    share = setting.rollouts / setting.gpus
    new = setting.max_completion_length
    at_once = min(share, max(concurrency(setting, gpu_memory), 1.0))
    weights = setting.shape.parameters * (BF16 if setting.use_vllm else setting.width)
    cache = setting.shape.cache_bytes(setting.prompt_length + new / 2)
    return share / at_once * new * weights + share * new * cache
