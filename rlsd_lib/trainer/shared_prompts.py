"""The teacher pass with each distinct prompt computed once, however many rollouts it has.

Plain scoring computes N (P + T) token positions; D distinct prompts and N completions make
D (P - 1) + N T. A prompt's KV cache leaves out its last token, which then opens every completion:
its state predicts the first sampled token, so that one call of TRL's fused head scores all T. Of a
prompt's last layer only keys and values are computed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from rlsd_lib.trainer import upstream
from rlsd_lib.trainer.config import AUTO, PLAIN, RLSDConfig
from rlsd_lib.trainer.sharded import SHARDS
from rlsd_lib.trainer.states import causal_lm, hidden_states

# Shown equal to the plain pass by tests. A family may take its positions from the attention mask
# (OPT), so membership is by test and not by looks.
LLAMA_LIKE = ("gemma", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "smollm3")
FAMILIES = ("gpt_neox", *LLAMA_LIKE, "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
ATTENTION = ("eager", "sdpa")
# Token positions of the shared pass over those of the plain one, up to which "auto" shares.
WORTH_IT = 0.75
# Frequencies that depend on the length of the call would differ between prompt and completion.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Prompts(NamedTuple):
    """The teacher's N prompts as token ids, left-padded (N, P), and type ids (N, P + T)."""

    texts: list[list[int]]
    ids: Tensor
    mask: Tensor
    type_ids: dict[str, Tensor]
    shortened: int = 0  # those whose context was cut to fit


class Rollouts(NamedTuple):
    """What is scored: prompts, and sampled tokens (N, T) with their mask."""

    prompts: Prompts
    ids: Tensor
    mask: Tensor


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
    if config.model_type not in FAMILIES:
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


def try_score(
    teacher: nn.Module,
    seen: Prompts,
    output: dict[str, Any],
    args: RLSDConfig,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor | None] | None:
    """What `score` returns for TRL's dictionary; None where the plain pass is to be taken."""
    # The same prompts as the student's: only the same computation gives a gap of exactly 0.
    same = torch.equal(seen.ids, output["prompt_ids"])
    same = same and torch.equal(seen.mask, output["prompt_mask"])
    one_token = min(map(len, seen.texts)) == 1  # which leaves nothing to share
    if args.teacher_pass == PLAIN or why_not(teacher, accelerator) or same or one_token:
        return None
    ids, mask = output["completion_ids"], output["completion_mask"]
    rollouts = Rollouts(seen, ids, mask)
    chunks = plan(rollouts, args.per_device_train_batch_size)
    if not chunks:  # every rollout was truncated and masked: only the plain pass keeps shapes
        return None
    most = WORTH_IT * len(ids) * (seen.ids.size(1) + ids.size(1))
    if args.teacher_pass == AUTO and positions_of(chunks) > most:
        return None
    want_hidden, autocast = args.divergence is not None, accelerator.autocast
    bare = accelerator.unwrap_model(teacher)
    with upstream.grouped_attention(ids.device):
        return score(bare, rollouts, chunks, autocast=autocast, want_hidden=want_hidden)


def plan(rollouts: Rollouts, batch_size: int) -> list[Chunk]:
    """Chunks of about `batch_size` rows with a completion, whole groups of like prompt length."""
    prompts = [len(text) for text in rollouts.prompts.texts]
    ends = torch.arange(1, rollouts.mask.size(1) + 1, device=rollouts.mask.device)
    completions = (rollouts.mask * ends).amax(dim=1).tolist()  # the pass waits for the device here
    chunks: list[list[list[int]]] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, text in enumerate(rollouts.prompts.texts):
        groups.setdefault(tuple(text), []).append(row)
    for group in sorted(groups.values(), key=lambda rows: prompts[rows[0]]):
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
    """log P (N, T) of the completions, 0 on padding, and the states (N, T, H) that predicted them.

    `model` has TRL's fused head and no data-parallel wrapper: ranks may differ in their calls.
    """
    shape = rollouts.ids.shape
    logps = rollouts.ids.new_zeros(shape, dtype=torch.float32)
    hidden: Tensor | None = None
    # TRL's head adds a load-balancing loss where the config asks for it, over whole sequences.
    text = causal_lm(model).config.get_text_config()
    router = {"output_router_logits": False} if hasattr(text, "output_router_logits") else {}
    for chunk in chunks:
        with autocast():
            cache = _read_prompts(model, chunk, rollouts.prompts)
        for batch in chunk.batches:
            # To the device once: lists as indices would go there at every use, in every layer.
            rows, which = torch.tensor([batch.rows, batch.prompts], device=logps.device)
            cached = Cache(layers=[_SharedLayer(layer, which) for layer in cache.layers])
            with autocast(), hidden_states(model, want_hidden) as states:
                inputs = _inputs(rollouts, rows, chunk.width, batch.width)
                output = model(**inputs, past_key_values=cached, fused_lm_head=True, **router)
            logps[rows, : batch.width] = output.log_probs.to(logps)
            for found in states:
                hidden = found.new_zeros(*shape, found.size(-1)) if hidden is None else hidden
                hidden[rows, : batch.width] = found
    return logps, hidden


def _inputs(rollouts: Rollouts, rows: Tensor, before: int, width: int) -> dict[str, Tensor]:
    """Completions but for their last token, each opened by the last of its prompt (`before` wide)."""
    prompts = rollouts.prompts
    ids, mask = rollouts.ids[rows, :width], rollouts.mask[rows, :width]
    # Positions count from the uncut width, as in the plain pass.
    first = prompts.ids.size(1) - 1
    return {
        "input_ids": torch.cat([prompts.ids[rows, -1:], ids[:, :-1]], dim=1),
        "attention_mask": torch.cat([prompts.mask[rows, -before:], mask[:, :-1]], dim=1),
        "position_ids": torch.arange(first, first + width, device=ids.device)[None],
        "shift_labels": ids.masked_fill(mask == 0, -100),
    }


def _read_prompts(model: nn.Module, chunk: Chunk, prompts: Prompts) -> DynamicCache:
    """Keys and values of a chunk's prompts but for their last token."""
    backbone = causal_lm(model).base_model
    end = prompts.ids.size(1) - 1
    start = end + 1 - chunk.width
    rows = torch.tensor(chunk.rows, device=prompts.ids.device)
    cache = DynamicCache(config=backbone.config.get_text_config())
    cache.layers[-1] = _LastLayer()
    with suppress(_AllRead):
        backbone(
            input_ids=prompts.ids[rows, start:end],
            attention_mask=prompts.mask[rows, start:end],
            position_ids=torch.arange(start, end, device=rows.device)[None],
            past_key_values=cache,
            use_cache=True,
        )
    return cache


class _AllRead(Exception):
    """Every layer has the prompts' keys and values."""


class _LastLayer(DynamicLayer):
    """Ends a forward whose output nobody reads: the last layer's attention and MLP are not run."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(*args, **kwargs)
        raise _AllRead


class _SharedLayer(DynamicLayer):
    """Keys and values (D, heads, P, H) of prompts, read by N rows; what rows add is not kept."""

    def __init__(self, layer: DynamicLayer, prompts: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.prompts = prompts

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values for each row, followed by the row's own."""
        keys = torch.cat([self.keys[self.prompts], keys], dim=-2)
        return keys, torch.cat([self.values[self.prompts], values], dim=-2)
