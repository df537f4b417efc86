"""Memory of a training step on one GPU, from arithmetic alone; no torch.

Every rollout is taken at its full length, so memory is that of the worst batch. Weights, optimiser,
teacher and activations are held against real tensors in tests/test_plan.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rlsd_lib.experiment.cost.shapes import BF16, FP32, ModelShape

GIB = 2**30
SHARDINGS = ("ddp", "fsdp2", "zero3")
TEACHER_PASSES = ("auto", "plain", "shared")
WORTH_IT = 0.75  # share of the plain pass's positions up to which teacher_pass="auto" shares
# TRL's fused head works in tiles of so many tokens by so many words (kernels/chunked_logprob.py).
TILE = (4096, 32768)
RESERVED = 2.0  # GiB per GPU: CUDA context, communication buffers, fragmentation
VLLM_WORK = 1.5  # GiB that vLLM needs beside weights and cache


@dataclass(frozen=True)
class Setting:
    """What decides memory and time. Names that RLSDConfig has mean the same here.

    `prompt_length` counts the tokens of the images, `image_tokens` are those of one image per
    prompt, and `privileged_length` is what the teacher's prompt has more than the student's.
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
    vllm_importance_sampling_correction: bool = True

    def __post_init__(self) -> None:
        _check(self)

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
    def length(self) -> int:
        """Positions of one rollout with its prompt."""
        return self.prompt_length + self.max_completion_length

    @property
    def teacher_prompt(self) -> int:
        """Tokens before the completion in the teacher's pass."""
        return self.prompt_length + self.privileged_length

    @property
    def trained(self) -> int:
        """Parameters that have gradients."""
        rank = self.lora_rank
        return self.shape.lora_parameters(rank) if rank else self.shape.parameters

    @property
    def copies_teacher(self) -> bool:
        """Whether the teacher is a second set of all weights."""
        return self.teacher_model_kind != "live" and not self.lora_rank

    @property
    def shares_prompts(self) -> bool:
        """Whether the teacher reads each prompt once for all rollouts of its group."""
        if self.teacher_pass != "auto":
            return self.teacher_pass == "shared"
        shared = self.teacher_prompt / self.num_generations + self.max_completion_length
        plain = self.teacher_prompt + self.max_completion_length
        return self.sharding == "ddp" and shared <= WORTH_IT * plain

    @property
    def shares_gpu(self) -> bool:
        """Whether vLLM lives on the training GPUs."""
        return self.use_vllm and self.vllm_mode == "colocate"


@dataclass(frozen=True)
class Memory:
    """GiB per GPU. `kept` stays for the whole run; of the phases only one is there at a time."""

    kept: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def peaks(self) -> dict[str, float]:
        """The peak of each phase."""
        kept = sum(self.kept.values())
        return {name: kept + sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        """The largest of them."""
        return max(self.peaks.values())


def concurrency(setting: Setting, gpu_memory: float) -> float:
    """Rollouts of full length that one GPU can decode at a time."""
    if not setting.shares_gpu:
        return setting.rollouts / setting.gpus
    room = setting.vllm_gpu_memory_utilization * gpu_memory * GIB
    room -= setting.shape.parameters * BF16 + VLLM_WORK * GIB
    return room / setting.shape.cache_bytes(setting.length)


def memory(setting: Setting, gpu_memory: float, *, teacher: bool) -> Memory:
    """GiB per GPU by part, with or without RLSD's teacher. `gpu_memory` is the GPU's, in GiB.

    Sharded weights are stored in `dtype` and gathered in bf16, the mixed precision of FSDP2; ZeRO-3
    keeps the same 16 bytes per parameter in another order.
    """
    weights = setting.shape.parameters * setting.width / setting.shards
    adapter = setting.trained * FP32 if setting.lora_rank else 0.0
    vllm = setting.vllm_gpu_memory_utilization * gpu_memory * GIB if setting.shares_gpu else 0.0
    has_copy = teacher and setting.copies_teacher
    kept = {
        "weights": weights + adapter,
        "optimiser": 2 * adapter if adapter else 2 * weights,
        "reference model": weights if setting.beta and not adapter else 0.0,
        "teacher": weights if has_copy and not setting.teacher_offload else 0.0,
        "vLLM": 0.0 if setting.vllm_enable_sleep_mode else vllm,
    }
    if teacher and adapter and setting.teacher_model_kind != "live":
        kept["teacher"] = adapter
    phases = {"generation": _generation(setting, vllm), "update": _update(setting)}
    if teacher:
        phases["teacher pass"] = _scoring(setting)
    named = {name: _in_gib(parts) for name, parts in phases.items()}
    return Memory({"reserved": RESERVED} | _in_gib(kept), named)


def _generation(setting: Setting, vllm: float) -> dict[str, float]:
    if setting.use_vllm:
        return {"vLLM, awake": vllm if setting.vllm_enable_sleep_mode else 0.0}
    rows = setting.rollouts / setting.gpus
    whole = setting.shape.parameters * setting.width if setting.shards > 1 else 0.0
    cache = setting.shape.cache_bytes(setting.length, setting.width)
    return {"keys and values": rows * cache, "gathered weights": whole}


def _update(setting: Setting) -> dict[str, float]:
    shape, rows = setting.shape, setting.per_device_train_batch_size
    full = not setting.lora_rank
    gradients = setting.trained * (setting.width / setting.shards if full else FP32)
    head = shape.vocabulary * shape.hidden * FP32 if full else 0
    states = rows * setting.max_completion_length * shape.hidden * FP32
    layer = _layer_activations(setting, rows, setting.length)
    layers = shape.layers
    inputs = layers * rows * setting.length * shape.hidden * setting.residual
    kept = inputs + layer if setting.gradient_checkpointing else layers * layer
    parts = {
        "gradients": gradients,
        "activations": kept + _vision_activations(setting, rows),
        "LM head, in tiles": _tile(setting) + head + states,
    }
    bodies = shape.parameters - shape.ends
    if setting.shards > 1:
        # Two layers at a time, and the ends, which stay gathered.
        parts["gathered weights"] = (2 * shape.layer_weights + shape.ends) * BF16
    elif setting.width > BF16:
        parts["bf16 copies of autocast"] = (bodies if full else 2 * shape.layer_weights) * BF16
    if setting.shards == 1 and setting.gpus > 1:
        parts["DDP buckets"] = gradients
    return parts


def _scoring(setting: Setting) -> dict[str, float]:
    shape, rows = setting.shape, setting.per_device_train_batch_size
    length = setting.teacher_prompt + setting.max_completion_length
    parts = {
        "activations": _layer_activations(setting, rows, length),
        "LM head, in tiles": _tile(setting),
    }
    if setting.shares_prompts:
        parts["keys and values"] = rows * shape.cache_bytes(length, setting.width)
    if setting.copies_teacher and setting.teacher_offload:
        parts["teacher"] = shape.parameters * setting.width / setting.shards
    if setting.shards > 1:
        parts["gathered weights"] = (2 * shape.layer_weights + shape.ends) * BF16
    return parts


def _layer_activations(setting: Setting, rows: int, length: int) -> float:
    return setting.shape.layer_activations(rows, length, residual=setting.residual, compute=BF16)


def _vision_activations(setting: Setting, rows: int) -> float:
    """Inputs of every block of the tower, and one block: about 20 numbers per patch and channel."""
    tower = setting.shape.vision
    if tower is None:
        return 0.0
    channels = rows * setting.image_tokens * tower.merged * tower.hidden
    blocks = 1 if setting.gradient_checkpointing else tower.layers
    inputs = tower.layers if setting.gradient_checkpointing else 0
    return channels * (inputs * setting.residual + blocks * 20 * BF16)


def _tile(setting: Setting) -> float:
    tokens = setting.per_device_train_batch_size * setting.max_completion_length
    return min(tokens, TILE[0]) * min(setting.shape.vocabulary, TILE[1]) * BF16


def _in_gib(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value / GIB for name, value in parts.items() if value}


def _check(setting: Setting) -> None:
    """Refuse what no run can have, naming the field and what was expected."""
    whole = ("gpus", "prompt_length", "max_completion_length", "rollouts", "num_generations")
    for name in (*whole, "per_device_train_batch_size"):
        if getattr(setting, name) < 1:
            raise ValueError(f"{name}={getattr(setting, name)}: expected a whole number >= 1.")
    for name in ("privileged_length", "image_tokens", "lora_rank", "beta"):
        if getattr(setting, name) < 0:
            raise ValueError(f"{name}={getattr(setting, name)}: expected a number >= 0.")
    kinds = {
        "sharding": SHARDINGS,
        "teacher_pass": TEACHER_PASSES,
        "dtype": ("float32", "bfloat16"),
        "teacher_model_kind": ("live", "base", "ema", "snapshot"),
        "vllm_mode": ("colocate", "server"),
    }
    for name, valid in kinds.items():
        if getattr(setting, name) not in valid:
            raise ValueError(f"{name}={getattr(setting, name)!r}: expected {', '.join(valid)}.")
    share = setting.vllm_gpu_memory_utilization
    if not 0 < share < 1:
        raise ValueError(f"vllm_gpu_memory_utilization={share}: expected a share in (0, 1).")
    if setting.rollouts % (setting.gpus * setting.per_device_train_batch_size):
        raise ValueError(
            f"rollouts={setting.rollouts} per step do not divide among {setting.gpus} GPUs with "
            f"per_device_train_batch_size={setting.per_device_train_batch_size}."
        )
    if setting.rollouts % setting.num_generations:
        raise ValueError(
            f"rollouts={setting.rollouts} are not a multiple of num_generations="
            f"{setting.num_generations}."
        )
    if setting.teacher_pass == "shared" and setting.sharding != "ddp":
        raise ValueError(
            f"teacher_pass='shared' with sharding={setting.sharding!r}: sharded parameters are "
            "gathered by whole calls only. Use 'auto' or 'plain'."
        )
    if setting.image_tokens >= setting.prompt_length:
        raise ValueError(
            f"image_tokens={setting.image_tokens} leave no room for text in prompt_length="
            f"{setting.prompt_length}."
        )
