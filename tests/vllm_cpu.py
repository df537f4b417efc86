"""vLLM's CPU build made fit for training: what TRL needs of it that it does not do by itself."""

import os

import torch


def keep_weights_loadable() -> None:
    """Let vLLM's CPU layers keep their weights, so that TRL can load new ones after each step.

    The CPU backend packs the weight of every linear layer for its own kernels and drops the
    parameter: fast for a fixed model, and nothing is left to load into. Call before an engine is
    built; on a GPU nothing of this is needed.
    """
    from vllm.model_executor.layers import utils

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    # The callers import it from this module when they run.
    utils.dispatch_cpu_unquantized_gemm = plain_linear
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is 4
