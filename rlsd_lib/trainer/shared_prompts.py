"""The teacher pass with each distinct prompt computed once, however many rollouts it has.

Plain scoring computes N (P + T) token positions; D distinct prompts and N completions make
D (P - 1) + N T. A prompt's KV cache leaves out its last token, which then opens every completion:
its state predicts the first sampled token, so that one call of TRL's fused head scores all T.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from rlsd_lib.trainer import upstream
from rlsd_lib.trainer.sharded import SHARDS
from rlsd_lib.trainer.states import causal_lm, hidden_states

# Shown equal to the plain pass by tests. A family may take its positions from the attention mask
# (OPT), so membership is by test and not by looks.
LLAMA_LIKE = ("gemma", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "smollm3")
TEXT_FAMILIES = ("gpt_neox", *LLAMA_LIKE, "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
IMAGE_FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
ATTENTION = ("eager", "sdpa")
# Frequencies that depend on the length of the call would differ between prompt and completion.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


Images = tuple[Tensor, Tensor]  # of one row: patches (n, C) and grids (images, 3)


class Prompts(NamedTuple):
    """The teacher's N prompts as token ids, left-padded (N, P), and type ids (N, P + T)."""

    texts: list[list[int]]
    ids: Tensor
    mask: Tensor
    type_ids: dict[str, Tensor]
    shortened: int = 0  # those whose context was cut to fit


class Rollouts(NamedTuple):
    """What is scored: prompts, sampled tokens (N, T) with their mask, and images by row."""

    prompts: Prompts
    ids: Tensor
    mask: Tensor
    images: list[Images] | None


class Batch(NamedTuple):
    """Rows scored in one call, and for each the prompt of its chunk that it follows."""

    rows: list[int]
    prompts: list[int]
    width: int


class Chunk(NamedTuple):
    """Prompts computed in one call, each by a row that has it, and the batches that need them."""

    rows: list[int]
    width: int
    batches: list[Batch]


def why_not(model: nn.Module, accelerator: Accelerator) -> str | None:
    """Why the model's prompts cannot be shared, None if they can."""
    if accelerator.distributed_type in SHARDS:
        return f"under {accelerator.distributed_type} parameters are gathered by whole calls only"
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter]
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            return f"the adapter {config.peft_type} changes what the model reads"
    config = causal_lm(model).config
    if config.model_type not in TEXT_FAMILIES + IMAGE_FAMILIES:
        return f"it has not been shown exact for model_type={config.model_type!r}"
    text = config.get_text_config()
    kinds = {type(layer).__name__ for layer in DynamicCache(config=text).layers}
    if kinds != {DynamicLayer.__name__}:
        return f"it needs full attention in every layer, and the cache has {sorted(kinds)}"
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in LENGTH_DEPENDENT_ROPE:
        return f"positions depend on the length of a call (rope_type={rope!r})"
    if text._attn_implementation not in ATTENTION:
        return f"it was tested with {ATTENTION} attention, not {text._attn_implementation!r}"
    return None


def why_not_batch(prompts: Prompts, images: dict[str, Any]) -> str | None:
    """Why the prompts of this batch cannot be shared, None if they can."""
    if min(map(len, prompts.texts)) < 2:
        return "a prompt of one token leaves nothing to share"
    last = prompts.ids.size(1) - 1
    if any(types[:, last:].any() for types in prompts.type_ids.values()):
        return "a completion holds images, or a prompt ends in one"
    if "pixel_values" in images and "image_grid_thw" not in images:
        return "images come without image_grid_thw"
    return None


def images_by_row(images: dict[str, Any]) -> list[Images] | None:
    """The images of each row, from TRL's flat tensors; None for a batch without any."""
    if "pixel_values" not in images:
        return None
    grids = images["image_grid_thw"].split(images["num_images"])
    sizes = torch.stack([grid.prod(dim=-1).sum() for grid in grids]).tolist()
    return list(zip(images["pixel_values"].split(sizes), grids, strict=True))


def find_groups(prompts: Prompts, images: Sequence[Images] | None) -> list[list[int]]:
    """Rows with the same prompt, and the same images where there are any: N rows in D lists."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for row, text in enumerate(map(tuple, prompts.texts)):
        same_text = groups.setdefault(text, [])
        for rows in same_text:
            if images is None or all(map(torch.equal, images[row], images[rows[0]])):
                rows.append(row)
                break
        else:
            same_text.append([row])
    return [rows for same_text in groups.values() for rows in same_text]


def plan(rollouts: Rollouts, batch_size: int) -> list[Chunk]:
    """Chunks of about `batch_size` rows.

    A chunk has whole groups of similar prompt length, at least one, so that the keys and values
    alive at a time are those of few prompts. Rows without a completion are left out.
    """
    prompts = [len(text) for text in rollouts.prompts.texts]
    ends = torch.arange(1, rollouts.mask.size(1) + 1, device=rollouts.mask.device)
    completions = (rollouts.mask * ends).amax(dim=1).tolist()  # the pass waits for the device here
    chunks: list[list[list[int]]] = []
    groups = find_groups(rollouts.prompts, rollouts.images)
    for group in sorted(groups, key=lambda rows: prompts[rows[0]]):
        rows = sorted((row for row in group if completions[row]), key=completions.__getitem__)
        if not rows:
            continue
        if not chunks or sum(map(len, chunks[-1])) + len(rows) > batch_size:
            chunks.append([])
        chunks[-1].append(rows)
    return [_chunk(groups, prompts, completions, batch_size) for groups in chunks]


def _chunk(
    groups: list[list[int]], prompts: list[int], completions: list[int], batch_size: int
) -> Chunk:
    pairs = [(row, prompt) for prompt, rows in enumerate(groups) for row in rows]
    batches = []
    for start in range(0, len(pairs), batch_size):
        rows, which = map(list, zip(*pairs[start : start + batch_size], strict=True))
        batches.append(Batch(rows, which, max(completions[row] for row in rows)))
    firsts = [rows[0] for rows in groups]
    return Chunk(firsts, max(prompts[row] for row in firsts), batches)


def positions_of(chunks: Sequence[Chunk]) -> int:
    """Token positions that a plan sends through the model, padding included."""
    prompts = sum(len(chunk.rows) * (chunk.width - 1) for chunk in chunks)
    return prompts + sum(len(b.rows) * b.width for chunk in chunks for b in chunk.batches)


@torch.no_grad()
def score(
    model: nn.Module,
    rollouts: Rollouts,
    chunks: Sequence[Chunk],
    *,
    autocast: Callable[[], AbstractContextManager],
    want_hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """log P (N, T) of the completions, and the states (N, T, H) that predicted them.

    `model` has TRL's fused head and no data-parallel wrapper: ranks may differ in their number of
    calls, so a call must not be a collective. Padding scores 0, as in TRL.
    """
    shape = rollouts.ids.shape
    logps = rollouts.ids.new_zeros(shape, dtype=torch.float32)
    hidden: Tensor | None = None
    # TRL's head adds a load-balancing loss where the config asks for it, over whole sequences.
    text = causal_lm(model).config.get_text_config()
    router = {"output_router_logits": False} if hasattr(text, "output_router_logits") else {}
    for chunk in chunks:
        with autocast():
            cache, positions = _read_prompts(model, chunk, rollouts)
        for batch in chunk.batches:
            # To the device once: lists as indices would go there at every use, in every layer.
            rows, which = torch.tensor([batch.rows, batch.prompts], device=logps.device)
            cached = Cache(layers=[_SharedLayer(layer, which) for layer in cache.layers])
            grouped = upstream.grouped_attention(logps.device)
            with autocast(), grouped, hidden_states(model, want_hidden) as states:
                last = positions[..., which, -1:]
                inputs = _inputs(rollouts, rows, last, chunk.width, batch.width, model.dtype)
                output = model(**inputs, past_key_values=cached, fused_lm_head=True, **router)
            logps[rows, : batch.width] = output.log_probs.to(logps)
            for found in states:
                hidden = found.new_zeros(*shape, found.size(-1)) if hidden is None else hidden
                hidden[rows, : batch.width] = found
    return logps, hidden


def _inputs(
    rollouts: Rollouts, rows: Tensor, last: Tensor, before: int, width: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Completions, shifted: the prompt's last token opens each, its own last is left out.

    `last` are the positions of that opening token (..., N, 1), `before` the prompts' width.
    """
    prompts = rollouts.prompts
    ids, mask = rollouts.ids[rows, :width], rollouts.mask[rows, :width]
    seen = torch.cat([prompts.mask[rows, -before:], mask[:, :-1]], dim=1)
    # What attention adds, (N, 1, width, K): made here, where each layer would make it anew.
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
    causal = torch.ones(width, seen.size(1), dtype=torch.bool, device=seen.device).tril(before - 1)
    seen = seen[:, None, None, :].bool() & causal
    added = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return {
        "input_ids": torch.cat([prompts.ids[rows, -1:], ids[:, :-1]], dim=1),
        "attention_mask": added,
        "position_ids": last + torch.arange(width, device=ids.device),
        "shift_labels": ids.masked_fill(mask == 0, -100),
    }


def _read_prompts(
    model: nn.Module, chunk: Chunk, rollouts: Rollouts
) -> tuple[DynamicCache, Tensor]:
    """Keys and values of a chunk's prompts but for their last token, and all positions (..., D, P)."""
    prompts, backbone = rollouts.prompts, causal_lm(model).base_model
    end = prompts.ids.size(1)
    start = end - chunk.width
    rows = torch.tensor(chunk.rows, device=prompts.ids.device)
    ids, mask = prompts.ids[rows, start:], prompts.mask[rows, start:]
    # Counted from the uncut width, as in the plain pass.
    positions = torch.arange(start, end, device=ids.device).expand(len(ids), -1)
    images: dict[str, Tensor] = {}
    if rollouts.images is not None:
        patches, grids = zip(*(rollouts.images[row] for row in chunk.rows), strict=True)
        images = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}
        positions, _ = backbone.get_rope_index(
            ids,
            mm_token_type_ids=prompts.type_ids["mm_token_type_ids"][rows, start:end],
            image_grid_thw=images["image_grid_thw"],
            attention_mask=mask,
        )
        if not len(images["pixel_values"]):  # rows without an image, in a batch with images
            images = {}
    cache = DynamicCache(config=backbone.config.get_text_config())
    backbone(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[..., :-1],
        past_key_values=cache,
        use_cache=True,
        **images,
    )
    return cache, positions


class _SharedLayer(DynamicLayer):
    """Keys and values (D, heads, P, H) of prompts, read by N rows; what rows add is not kept."""

    def __init__(self, layer: DynamicLayer, prompts: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.prompts = prompts

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values for each row, followed by the row's own."""
        return self._followed_by(self.keys, keys), self._followed_by(self.values, values)

    def _followed_by(self, shared: Tensor, own: Tensor) -> Tensor:
        one = len(shared) == 1
        rows = shared.expand(len(own), -1, -1, -1) if one else shared[self.prompts]
        return torch.cat([rows, own], dim=-2)
