"""Models whose parameters are sharded over ranks: FSDP2's DTensors, DeepSpeed ZeRO-3's partitions.

The teacher's copy is sharded as the policy is, so a refresh needs no communication. *Collective*
functions must be called by every rank, in the same order.
"""

import copy
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

Pairs = Iterable[tuple[nn.Parameter, nn.Parameter]]
SHARDS = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no rank has the policy's parameters whole: under FSDP and under ZeRO-3."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that is not wrapped yet; collective if ZeRO-3 has loaded it in partitions."""
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


def reshard(model: nn.Module) -> None:
    """Shard again what FSDP2 keeps gathered after a forward, root and head, until a backward pass.

    Until then parameters are temporary: refreshing or freezing them would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def free(model: nn.Module) -> None:
    """Free a model's partitions, since DeepSpeed keeps every module that it has prepared."""
    for parameter in model.parameters():
        if _is_partitioned(parameter):
            parameter.partition([parameter])
            parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before activation checkpointing or compilation."""
    reshard(model)
    return fsdp2_canonicalize_names(dict(model.named_parameters()))


def pairs(target: nn.Module, source: nn.Module) -> Pairs:
    """(target, source) parameters, matched by name; RuntimeError with names that differ."""
    targets, sources = named(target), named(source)
    if sources.keys() != targets.keys():
        differ = sorted(sources.keys() ^ targets.keys())[:5]
        raise RuntimeError(f"Teacher and student differ in their parameters, e.g. {differ}.")
    return [(targets[name], sources[name]) for name in targets]


@torch.no_grad()
def move(target: nn.Parameter, source: nn.Parameter, rate: float = 1.0) -> None:
    """target <- (1 - rate) target + rate source, by shards; RuntimeError if not sharded alike."""
    if _layout(target) != _layout(source):
        raise RuntimeError(
            f"Teacher and student are not sharded alike, {_layout(target)} and {_layout(source)}: "
            "prepare both with one accelerator."
        )
    if _is_partitioned(target):
        # ZeRO-3 keeps small parameters whole as well; the next forward gathers them anew.
        target.partition([target])
    ours, theirs = local(target), local(source)
    if rate == 1.0:
        ours.copy_(theirs)
    else:
        ours.lerp_(theirs.to(ours), rate)


@torch.no_grad()
def whole(parameter: nn.Parameter, accelerator: Accelerator) -> Tensor:
    """The gathered parameter, on the CPU of every rank. Collective."""
    if _is_partitioned(parameter):
        with _gathered([parameter]):
            return parameter.data.cpu().clone()
    if isinstance(parameter, DTensor):
        # On the device: shards offloaded to the CPU have no backend to gather them there.
        return parameter.detach().to(accelerator.device).full_tensor().cpu()
    return parameter.detach().cpu()


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor, accelerator: Accelerator) -> None:
    """Set a parameter to a tensor that every rank has whole. Collective."""
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
    """The gathered parameter of `model` right after its forward, attached to it. Collective."""
    if parameter is None:
        return None
    if _is_partitioned(parameter):
        # Gathered already where embeddings are tied: sharded again, the next use would miss it.
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
    """The shape of the parameter before sharding."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def _gathered(parameters: list[Tensor], modifier_rank: int | None = None):
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def local(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, without its graph; the parameter itself if it is whole."""
    if _is_partitioned(parameter):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def _layout(parameter: nn.Parameter) -> tuple:
    spread = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else ()
    return (*shape_of(parameter), tuple(local(parameter).shape), *spread)
