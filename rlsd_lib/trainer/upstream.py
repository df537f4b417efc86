"""Workarounds for other libraries, each with what it mends, where, and for which version.

A test fails when a library is newer than a note in `NOTES`: then read the place that it names, and
delete the workaround or renew the note. Those that only a sharded teacher needs stand in `sharded`,
those of a workbook run in `experiment.workbook_trainer`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import sdpa_attention
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels import chunked_logprob

from rlsd_lib.trainer import sharded
from rlsd_lib.trainer.states import IMAGE_FIELDS, causal_lm


class Note(NamedTuple):
    """A workaround by name, the newest version of the library that needs it, the report or line."""

    workaround: str
    library: str
    version: str
    where: str


NOTES: list[Note] = []


def mends(library: str, version: str, where: str) -> Callable[[Any], Any]:
    """Enter the decorated function or class into `NOTES`."""

    def enter(workaround: Any) -> Any:
        NOTES.append(Note(workaround.__name__, library, version, where))
        return workaround

    return enter


# --- TRL: the LM head on a CPU -------------------------------------------------------------------

TILES = chunked_logprob, "TOKEN_CHUNK_SIZE"
TILE = 128  # tokens per logits tile: the fastest and smallest of those measured, outputs/LOG.md


@mends("trl", "1.16.0", "trl/trainer/utils.py, add_fused_lm_head: all positions without Triton")
class CompletionHead:
    """Runs the fused LM head on completion tokens only, on a CPU. Active inside `applied()`.

    Without Triton, TRL's head scores prompts too and keeps several copies of a tile of 4,096 tokens.
    This cuts hidden states and labels to the completion and the tile to a CPU's cache: the same
    numbers up to rounding, in two thirds of a step's time.
    """

    def __init__(self, device: torch.device) -> None:
        self.applies = False
        self.saves = device.type == "cpu"

    @contextmanager
    def applied(self, wanted: bool) -> Iterator[None]:
        """Cut inside, if `wanted` and on a CPU, where the backward pass, which recomputes, belongs."""
        self.applies = wanted and self.saves
        try:
            with patch.object(*TILES, TILE) if self.applies else nullcontext():
                yield
        finally:
            self.applies = False

    def wrap(self, model: nn.Module, length: int) -> Callable[..., Any]:
        """`model`, or a function that calls it with the head on its last `length` tokens."""
        return completions_only(model, length) if self.applies and can_cut(model) else model


def can_cut(model: nn.Module) -> bool:
    """Whether a new hook on the backbone runs, and labels are as long as the backbone's output."""
    while not isinstance(model, PreTrainedModel | PeftModel):
        if is_compiled_module(model):
            return False
        model = model.module
    return not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning)


def completions_only(model: nn.Module, length: int) -> Callable[..., Any]:
    """`model` with the fused head on its last tokens only: outputs are (N, `length` or more)."""

    def call(*, labels: Tensor, **inputs: Any) -> Any:
        scored, tile = scored_and_tile(length, labels.size(1) - 1)
        kept = slice(-scored - 1, None)  # the position before the first scored token predicts it

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, kept]
            return output

        handle = causal_lm(model).base_model.register_forward_hook(cut)
        try:
            with patch.object(*TILES, tile):
                return model(labels=labels[:, kept], **inputs)
        finally:
            handle.remove()

    return call


def scored_and_tile(length: int, most: int) -> tuple[int, int]:
    """How many of the last `most` tokens to score, at least `length`, and the rows of one tile.

    A matrix product rounds a row by how many rows there are and where it lies. Every sequence fills
    whole tiles of one size, so that its log-probabilities do not depend on its place in the batch:
    a teacher that sees what the student sees must agree to the bit.
    """
    pieces = -(-length // TILE)
    tile = -(-length // pieces)
    return (pieces * tile, tile) if pieces * tile <= most else (length, length)


@contextmanager
@mends("trl", "1.16.0", "trl/trainer/utils.py, add_fused_lm_head: the forward is a closure")
def without_fused_head(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Take TRL's patched `forward` off inside: a deep copy of that would run the original model."""
    patched = model.__dict__.pop("forward", None)
    try:
        yield model
    finally:
        if patched is not None:
            model.forward = patched


# --- TRL: the model card ------------------------------------------------------------------------


@mends("trl", "1.16.0", "trl/trainer/utils.py, generate_model_card: names that may be None")
def complete_card(card: Path) -> None:
    """Say nothing in a model card where TRL knows no name; the folder's model is the card's own."""
    text = card.read_text("utf-8").replace("Model Card for None", "Model Card")
    text = text.replace("a fine-tuned version of [None](https://huggingface.co/None)", "fine-tuned")
    card.write_text(text.replace('model="None"', 'model="."'), "utf-8")


# --- TRL: images ---------------------------------------------------------------------------------


@mends("trl", "1.16.0", "trl/trainer/grpo_trainer.py, _generate: `prompt_images or None`")
def for_processor(images: list[list | None] | None) -> list[list] | None:
    """Images of each row as processors take them: a row without one is [], where TRL says None."""
    return images and [found or [] for found in images]


@mends("trl", "1.16.0", "trl/trainer/grpo_trainer.py, _get_per_token_logps_and_entropies")
def drop_empty_images(model: nn.Module) -> None:
    """Let a model leave image fields out where a micro-batch has none: TRL passes empty tensors."""

    def drop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        pixels = kwargs.get("pixel_values")
        if pixels is not None and pixels.size(0) == 0:
            kwargs = {k: v for k, v in kwargs.items() if k not in IMAGE_FIELDS}
        return args, kwargs

    model.register_forward_pre_hook(drop, with_kwargs=True)


# --- TRL: weights on their way to vLLM -----------------------------------------------------------


@mends("trl", "1.16.0", "https://github.com/huggingface/trl/issues/6688")
def keep_base_exact(model: nn.Module, backend: VLLMGeneration) -> None:
    """Restore the frozen half-precision weights of a PEFT model after each sync with vLLM.

    TRL adds the adapter to them and subtracts it again, which rounds twice at every step. Costs a
    copy in CPU memory and one transfer per sync.
    """
    if not isinstance(model, PeftModel):
        return
    sync = backend.sync_weights
    exact: dict[str, Tensor] = {}

    @torch.no_grad()
    def exact_sync() -> None:
        # Taken at the first sync, when the weights have been sharded if they are to be.
        exact.update({} if exact else _frozen_halves(model))
        sync()
        for name, value in exact.items():
            sharded.local(model.get_parameter(name)).copy_(value)

    backend.sync_weights = exact_sync


def _frozen_halves(model: PeftModel) -> dict[str, Tensor]:
    half = (torch.bfloat16, torch.float16)
    return {
        name: sharded.local(parameter).cpu().clone()
        for name, parameter in model.named_parameters()
        if ".base_layer." in name and parameter.dtype in half and not parameter.requires_grad
    }


# --- transformers and accelerate -----------------------------------------------------------------


@mends("transformers", "5.17.0", "transformers/integrations/sdpa_attention.py, use_gqa_in_sdpa")
def grouped_attention(device: torch.device) -> AbstractContextManager:
    """Read grouped keys in place, on a CPU, where transformers repeats them if there is a mask."""
    if device.type != "cpu":
        return nullcontext()
    allowed = sdpa_attention.use_gqa_in_sdpa
    return patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda _, *kv: allowed(None, *kv))


@mends("transformers", "5.17.0", "transformers/trainer.py, _save_checkpoint: rotates at its end")
def without_rotation() -> AbstractContextManager:
    """Keep older checkpoints inside: the parent deletes them before the new one has its mark."""
    return patch("transformers.trainer.rotate_checkpoints")


@mends("trl", "1.16.0", "trl/trainer/utils.py, RepeatSampler: resumed with the first order")
def order_of_epoch(sampler: Any, epoch: int) -> None:
    """Set a `RepeatSampler` to the order that an uninterrupted run gives `epoch`, from 0."""
    if getattr(sampler, "shuffle", False):
        sampler.generator.manual_seed(sampler.seed)
        for _ in range(epoch):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


@mends("transformers", "5.17.0", "transformers/trainer.py, Trainer._load_from_checkpoint")
def load_trained_adapter(student: PeftModel, checkpoint: str | Path) -> None:
    """Restore the trained adapter: beside a sub-folder with one, transformers restores only that."""
    student.load_adapter(str(checkpoint), "default", is_trainable=True)


@mends("accelerate", "1.15.0", "accelerate/state.py, PartialState.set_device: cpu:0")
def restorable_device(args: TrainingArguments) -> None:
    """Name the CPU "cpu": several processes get "cpu:0", where torch.load restores no optimiser."""
    if args.device.type == "cpu":
        args._setup_devices = torch.device("cpu")


@mends("accelerate", "1.15.0", "accelerate/utils/fsdp_utils.py, fsdp2_prepare_model")
@mends("trl", "1.16.0", "trl/models/utils.py, prepare_fsdp: shards the root alone")
def prepare_fsdp2(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a frozen model layer by layer, as the policy will be. Collective.

    TRL's `prepare_fsdp` shards the root alone and keeps what each rank has loaded, nothing but on
    rank 0. Accelerate's fills its plugin's wrapping policy, which the policy must find unset.
    """
    plugin = accelerator.state.fsdp_plugin
    unset = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    try:
        return fsdp2_prepare_model(accelerator, teacher).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = unset


# --- torch and DeepSpeed: these workarounds stand in sharded.py, which is imported here ----------

fsdp, zero = "torch/distributed/fsdp/_fully_shard/_fsdp_state.py", "deepspeed/runtime/zero/"
mends("torch", "2.13.0", f"{fsdp}, _lazy_init: the root")(sharded.reshard)
mends("deepspeed", "0.19.8", f"{zero}parameter_offload.py, FWD_MODULE_STACK")(sharded.free)
