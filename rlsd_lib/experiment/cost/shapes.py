"""Sizes of a model, and what one pass over it costs: parameters, FLOPs, activations, cache.

Plain arithmetic without torch. tests/test_plan.py holds it against transformers' own modules,
torch's FLOP counter and the tensors that autograd keeps. A multiplication and an addition are one
FLOP each: an (m, k) by (k, n) product is 2 m k n. Attention counts every pair of positions, as a
kernel does that is given a padding mask.
"""

from dataclasses import dataclass
from typing import Any

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class VisionShape:
    """A vision tower as Qwen3-VL's: patches, blocks, and a merger after the last block and each tap."""

    hidden: int
    layers: int
    intermediate: int
    output: int  # the decoder's hidden size
    taps: int = 3  # blocks whose features also enter the decoder (DeepStack)
    positions: int = 2304
    patch_values: int = 3 * 2 * 16 * 16  # channels, frames, height, width of a patch
    merged: int = 4  # patches that become one token

    @property
    def parameters(self) -> int:
        """All parameters, biases and norms included."""
        h, wide = self.hidden, self.hidden * self.merged
        embedding = self.patch_values * h + h + self.positions * h
        block = 4 * h * h + 4 * h + 2 * h * self.intermediate + self.intermediate + h + 4 * h
        merger = wide * wide + wide + wide * self.output + self.output
        norms = 2 * h + 2 * wide * self.taps  # the taps normalise after merging
        return embedding + self.layers * block + (1 + self.taps) * merger + norms

    def forward_flops(self, tokens: int) -> int:
        """FLOPs of encoding one image that becomes `tokens` tokens."""
        h, wide, patches = self.hidden, self.hidden * self.merged, tokens * self.merged
        block = 4 * h * h + 2 * h * self.intermediate
        merger = (1 + self.taps) * (wide * wide + wide * self.output)
        weights = patches * (self.patch_values * h + self.layers * block) + tokens * merger
        return 2 * weights + self.layers * 4 * patches * patches * h


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder as Qwen3's or Llama's; `vision` is its tower, None for a text model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # whether the LM head is the embedding
    qk_norm: bool = True
    vision: VisionShape | None = None

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices of one layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def ends(self) -> int:
        """Parameters of the embedding and the LM head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        decoder = self.layers * (self.layer_weights + norms) + self.hidden + self.ends
        return decoder + (self.vision.parameters if self.vision else 0)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of an adapter of this rank on every matrix of the decoder's layers."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 4 * self.hidden + 2 * queries + 2 * keys
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))

    def layer_flops(self, tokens: float, keys: float) -> float:
        """FLOPs of all layers for `tokens` positions, of which each attends to `keys`."""
        attention = 4 * tokens * keys * self.heads * self.head_dim
        return self.layers * (2 * tokens * self.layer_weights + attention)

    def head_flops(self, tokens: float) -> float:
        """FLOPs of the LM head for `tokens` positions."""
        return 2 * tokens * self.hidden * self.vocabulary

    def vision_flops(self, tokens: int) -> float:
        """FLOPs of encoding one image of `tokens` tokens; 0 for a text model."""
        return self.vision.forward_flops(tokens) if self.vision and tokens else 0

    def cache_bytes(self, tokens: float, width: int = BF16) -> float:
        """Keys and values of one sequence of `tokens` tokens, `width` bytes per number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width

    def layer_activations(self, rows: int, length: int, *, residual: int, compute: int) -> float:
        """Bytes that the backward of one layer keeps for `rows` sequences of `length` positions.

        `residual` and `compute` are bytes per number of the residual stream and of the matrix
        products; under autocast they differ. With SDPA: scores are never kept, keys and values are
        repeated to all heads, and each layer keeps its own padding mask.
        """
        casts = 5 if residual != compute else 2
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        numbers = (
            self.hidden * (2 * FP32 + 2 * residual + casts * compute)
            + queries * (FP32 + 5 * compute)
            + keys * (FP32 + compute)
            + self.intermediate * 4 * compute
            + (2 + 2 * self.heads + self.kv_heads) * FP32
            + length * compute
        )
        return rows * length * numbers


def shape_of(config: Any) -> ModelShape:
    """The sizes in a transformers configuration of a Qwen3, Qwen3-VL or Llama-like model.

    Raises:
        ValueError: for an architecture whose sizes this module does not know.
    """
    text = config.get_text_config()
    known = ("qwen3", "qwen3_vl_text", "llama")
    if text.model_type not in known:
        raise ValueError(
            f"model_type={text.model_type!r}: the planner knows dense decoders of the kinds "
            f"{', '.join(known)}. Plan with a model of those, of a similar size."
        )
    vision = getattr(config, "vision_config", None)
    return ModelShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,
        qk_norm=text.model_type != "llama",
        vision=_vision_of(vision) if vision is not None else None,
    )


def _vision_of(config: Any) -> VisionShape:
    return VisionShape(
        hidden=config.hidden_size,
        layers=config.depth,
        intermediate=config.intermediate_size,
        output=config.out_hidden_size,
        taps=len(config.deepstack_visual_indexes),
        positions=config.num_position_embeddings,
        patch_values=config.in_channels * config.temporal_patch_size * config.patch_size**2,
        merged=config.spatial_merge_size**2,
    )


_TOWER_8B = VisionShape(hidden=1152, layers=27, intermediate=4304, output=4096)
_TOWER_4B = VisionShape(hidden=1024, layers=24, intermediate=4096, output=2560)

# From the config.json of each model on the hub, so that a plan needs no download.
SHAPES: dict[str, ModelShape] = {
    "smollm2": ModelShape(576, 30, 1536, 9, 3, 64, 49152, tied=True, qk_norm=False),
    "Qwen/Qwen3-0.6B": ModelShape(1024, 28, 3072, 16, 8, 128, 151936, tied=True),
    "Qwen/Qwen3-1.7B": ModelShape(2048, 28, 6144, 16, 8, 128, 151936, tied=True),
    "Qwen/Qwen3-4B": ModelShape(2560, 36, 9728, 32, 8, 128, 151936, tied=True),
    "Qwen/Qwen3-8B": ModelShape(4096, 36, 12288, 32, 8, 128, 151936),
    "Qwen/Qwen3-VL-4B-Instruct": ModelShape(
        2560, 36, 9728, 32, 8, 128, 151936, tied=True, vision=_TOWER_4B
    ),
    "Qwen/Qwen3-VL-8B-Instruct": ModelShape(4096, 36, 12288, 32, 8, 128, 151936, vision=_TOWER_8B),
}
