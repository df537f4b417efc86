"""Sizes of a model, and what one pass over it costs: parameters, FLOPs, activations, KV cache.

Parameters are counted on the model itself, on the meta device; the rest is arithmetic. A
multiplication and an addition are one FLOP each, and attention counts every pair of positions, as a
kernel does that is given a padding mask.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

BF16, FP32 = 2, 4  # bytes per number
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Of each model's config.json on the hub, so that a plan needs no network.
SHAPES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with a gated MLP, as Qwen's or Llama's.

    Of a vision tower only the parameters count: what it computes is a few percent of a step.
    """

    parameters: int  # all of them; a tied head counts once
    ends: int  # of these in the embedding and the LM head
    layer_weights: int  # entries of the matrices of one layer
    layer_sides: int  # rows and columns of these matrices
    head_weights: int  # entries of the LM head
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def lora_parameters(self, rank: int) -> int:
        """Parameters of an adapter of this rank on every matrix of the decoder's layers."""
        return self.layers * rank * self.layer_sides

    def layer_flops(self, tokens: float, keys: float) -> float:
        """FLOPs of all layers for `tokens` positions, of which each attends to `keys`."""
        attention = 4 * tokens * keys * self.heads * self.head_dim
        return self.layers * (2 * tokens * self.layer_weights + attention)

    def head_flops(self, tokens: float) -> float:
        """FLOPs of the LM head for `tokens` positions."""
        return 2 * tokens * self.head_weights

    def cache_bytes(self, tokens: float, width: int = BF16) -> float:
        """KV cache of one sequence of `tokens` tokens, `width` bytes per number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width

    def layer_activations(self, rows: int, length: int, *, residual: int) -> float:
        """Bytes that the backward of one layer keeps for `rows` sequences of `length` positions.

        Matrix products are in bf16; `residual` is bytes per number of the residual stream, 4 under
        autocast. With SDPA: scores are never kept, keys and values are repeated to all heads, and
        each layer keeps its own padding mask.
        """
        casts = 5 if residual != BF16 else 2
        numbers = (
            self.hidden * (2 * FP32 + 2 * residual + casts * BF16)
            + self.heads * self.head_dim * (FP32 + 5 * BF16)
            + self.kv_heads * self.head_dim * (FP32 + BF16)
            + self.intermediate * 4 * BF16
            + (2 + 2 * self.heads + self.kv_heads) * FP32
            + length * BF16
        )
        return rows * length * numbers


def config_named(model: str) -> Any:
    """The transformers config of a model in `SHAPES`; raises ValueError for any other."""
    if model not in SHAPES:
        raise ValueError(f"No sizes are known for model {model!r}. Known: {', '.join(SHAPES)}.")
    return AutoConfig.for_model(**SHAPES[model])


def shape_of(config: Any) -> ModelShape:
    """The sizes in a transformers config, counted on the model itself on the meta device.

    Raises:
        ValueError: for layers that this arithmetic does not describe.
    """
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
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=layer.self_attn.head_dim,
    )
