"""Models whose parameters are spread over ranks: FSDP2's DTensors, DeepSpeed ZeRO-3's partitions.

The teacher's copy is spread as the policy is, so a refresh moves each rank's own part and needs no
communication; saving and restoring make one parameter whole at a time. Functions marked
*collective* must be called by every rank, in the same order.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from trl.models.utils import prepare_deepspeed

FSDP1, FSDP2, ZERO3 = "FSDP1", "FSDP2", "ZeRO-3"


def sharding_of(accelerator: Accelerator) -> str | None:
    """How parameters are spread over ranks; None if every rank holds them whole."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return FSDP2 if accelerator.is_fsdp2 else FSDP1
    plugin = accelerator.state.deepspeed_plugin
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and plugin.zero_stage == 3
    return ZERO3 if zero3 else None


# Models


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that is not wrapped yet, though ZeRO-3 may have loaded it in parts.

    Collective for a model in parts, which a deep copy would leave without its weights.
    """
    if not any(_is_partitioned(p) for p in model.parameters()):
        return copy.deepcopy(model)
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    # Parameters are partitioned as they are made: no rank ever holds the whole copy.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
        twin = type(model)(copy.deepcopy(model.config))
    twin.tie_weights()
    for target, source in pairs(twin, model):
        move(target, source)
    buffers = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        buffer.data = buffers[name].clone()
    return twin


def prepare(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Wrap a frozen model for scoring, spread as the policy will be. Collective.

    TRL's `prepare_fsdp` shards the root alone, so that a forward gathers the whole model, and it
    keeps what each rank holds, which is nothing where only rank 0 has loaded the weights.
    Accelerate's own preparation of the policy goes layer by layer and starts from rank 0.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    plugin = accelerator.state.fsdp_plugin
    # Filled in from the first model seen; the policy must still find them as they were.
    policy = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    try:
        return fsdp2_prepare_model(accelerator, teacher).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 keeps gathered after a forward: the root's parameters and the head's.

    It waits for a backward pass to do so, which a teacher never has. Only then does a module hold
    the parameters that last, which may be read, refreshed or frozen.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def free(model: nn.Module) -> None:
    """Let go of the parts, though DeepSpeed keeps every module it has prepared for good."""
    for parameter in model.parameters():
        if _is_partitioned(parameter):
            parameter.partition([parameter])
            parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


@contextmanager
def before_backward(model: nn.Module) -> Iterator[None]:
    """Within, gradients can be taken of a loss whose backward pass is still to come.

    FSDP2 would take it for that pass, and free the head that the real one needs.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        model.set_is_last_backward(True)
        model.set_reshard_after_backward(True)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before activation checkpointing or compilation."""
    reshard(model)
    return fsdp2_canonicalize_names(dict(model.named_parameters()))


def pairs(target: nn.Module, source: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
    """(target, source) parameters, matched by name.

    Raises:
        RuntimeError: if the names are not the same, naming some that differ.
    """
    targets, sources = named(target), named(source)
    if sources.keys() != targets.keys():
        differ = sorted(sources.keys() ^ targets.keys())[:5]
        raise RuntimeError(f"Teacher and student differ in their parameters, e.g. {differ}.")
    return [(targets[name], sources[name]) for name in targets]


# Parameters


@torch.no_grad()
def move(target: nn.Parameter, source: nn.Parameter, rate: float = 1.0) -> None:
    """target <- (1 - rate) target + rate source, by each rank for its own part of both.

    Raises:
        RuntimeError: if the two are not spread alike, so that the parts hold different entries.
    """
    if _layout(target) != _layout(source):
        raise RuntimeError(
            f"Teacher and student are not spread alike over the ranks: {_layout(target)} and "
            f"{_layout(source)}. Prepare both with one accelerator."
        )
    if _is_partitioned(target):
        # ZeRO-3 keeps small parameters whole as well; the next forward gathers them anew.
        target.partition([target])
    ours, theirs = _local(target), _local(source)
    if rate == 1.0:
        ours.copy_(theirs)
    else:
        ours.lerp_(theirs.to(ours), rate)


@torch.no_grad()
def whole(parameter: nn.Parameter, accelerator: Accelerator) -> Tensor:
    """The whole of a parameter, on the CPU of every rank. Collective."""
    if _is_partitioned(parameter):
        with _gathered([parameter]):
            return parameter.data.cpu().clone()
    if isinstance(parameter, DTensor):
        # On the device, because parts offloaded to the CPU have no backend to gather them there.
        return parameter.detach().to(accelerator.device).full_tensor().cpu()
    return parameter.detach().cpu()


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor, accelerator: Accelerator) -> None:
    """Set a parameter to a whole tensor that every rank has. Collective."""
    if _is_partitioned(parameter):
        with _gathered([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    elif isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = value.to(accelerator.device)
        # Every rank has the value: none is sent.
        part = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        parameter.to_local().copy_(part)
    else:
        parameter.data.copy_(value)


def outside_forward(model: nn.Module, parameter: Tensor | None) -> Tensor | None:
    """The whole of a parameter of `model` right after its forward, attached to it. Collective.

    Without gradients a copy, if the parameter will be taken apart again.
    """
    if parameter is None:
        return None
    if _is_partitioned(parameter):
        # Whole already where embeddings are tied: apart again, the next use would miss it.
        is_whole = parameter.data.numel() == parameter.ds_numel
        with nullcontext() if is_whole else _gathered([parameter]):
            # The copy is what a backward pass finds later.
            return parameter.clone()
    if isinstance(parameter, DTensor):
        # Ranks have different rollouts, and FSDP2 averages their gradients.
        averages = [Partial("avg")] * parameter.device_mesh.ndim
        return parameter.full_tensor(grad_placements=averages)
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return parameter.clone() if sharded and not torch.is_grad_enabled() else parameter


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def _gathered(parameters: list[Tensor], modifier_rank: int | None = None):
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def _local(parameter: nn.Parameter) -> Tensor:
    if _is_partitioned(parameter):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def _layout(parameter: nn.Parameter) -> tuple:
    spread = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else ()
    return (*shape_of(parameter), tuple(_local(parameter).shape), *spread)
