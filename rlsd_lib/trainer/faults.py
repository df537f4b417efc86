"""What a run does when something around it breaks: signals, rewards, servers, lost numbers.

Each function turns one kind of fault into an orderly stop that names what failed. `SteadyTrainer`
puts them into the training loop.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback

from rlsd_lib.runs.processes import on_sigterm

if TYPE_CHECKING:
    from trl.generation.vllm_client import VLLMClient

CONNECT_SECONDS = 10.0
DIAGNOSIS_SECONDS = 10.0  # for which rows are tried one by one after a reward function has raised

logger = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """Training was stopped by a signal, after a checkpoint of its last step was written."""


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, which clusters send before they kill: finish the step, save, stop; all ranks alike.

    transformers' `enable_jit_checkpoint` lets every rank decide by itself, so that ranks can stop
    at different steps and wait for one another for ever.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked = self.stopped = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Answer SIGTERM inside; only a main thread can, elsewhere nothing is changed."""
        self.asked = self.stopped = False
        with on_sigterm(lambda: setattr(self, "asked", True)):
            yield

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other ranks on whether anyone was asked to stop; called on every rank."""
        asked = self.asked
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(asked), device=self.accelerator.device)
            asked = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        if asked:
            logger.warning("SIGTERM: saving after step %s, then stopping", state.global_step)
            self.stopped = control.should_save = control.should_training_stop = True


def reward_error(
    error: Exception, names: Sequence[str], call: Callable[[int, int], None], rows: int, where: str
) -> Exception:
    """The error to raise after a reward function raised `error`: which function, and which row.

    Args:
        error: what TRL's reward loop let through; returned as it is if no function raised it.
        names: the reward functions, by name.
        call: `call(function, row)` asks one function for one row, and raises if it cannot.
        rows: rows of the batch.
        where: step and rank, in words.
    """
    name = _function_of(error)
    if name not in names:
        return error
    row = _first_failing(lambda row: call(list(names).index(name), row), rows)
    at = f"row {row}" if row is not None else f"its batch of {rows} rows"
    return RuntimeError(
        f"Reward function {name!r} failed on {at} at {where}: {type(error).__name__}: {error}"
    )


def _function_of(error: Exception) -> str | None:
    """Name of the reward function that TRL was calling, from the frames that the error crossed."""
    trace, name = error.__traceback__, None
    while trace is not None:
        local, code = trace.tb_frame.f_locals, trace.tb_frame.f_code
        if code.co_name in ("_calculate_rewards", "_invoke_async"):
            name = local.get("reward_func_name") or local.get("func_name") or name
            below = trace.tb_next and trace.tb_next.tb_frame.f_globals["__name__"]
            if below and below.startswith("accelerate."):
                return None  # another rank was lost while the rewards were gathered
        trace = trace.tb_next
    return name


def _first_failing(call: Callable[[int], None], rows: int) -> int | None:
    """The first row for which `call` raises, as far as time allows."""
    end = time.monotonic() + DIAGNOSIS_SECONDS
    for row in range(rows):
        if time.monotonic() > end:
            return None
        try:
            call(row)
        except Exception:
            return row
    return None


def check_rewards(rewards: Tensor, names: Sequence[str], step: int, *, training: bool) -> float:
    """Judge the rewards (N, functions) of all ranks; returns the share of rows without any.

    None (NaN here) means "not mine to judge" and is TRL's: the row's advantage is 0.

    Raises:
        FloatingPointError: an infinite reward or, in training, not one row with a reward.
    """
    if rewards.isinf().any():
        row, function = rewards.isinf().nonzero()[0].tolist()
        raise FloatingPointError(
            f"Reward function {names[function]!r} gave {rewards[row, function].item()} for row "
            f"{row} of all ranks' batch at step {step}. A reward is a finite number or None."
        )
    unscored = rewards.isnan().all(dim=1)
    if training and unscored.all():
        raise FloatingPointError(
            f"At step {step} none of {len(rewards)} rows got a reward: {', '.join(names)} returned "
            "None or NaN for all of them, so that there is nothing to learn from."
        )
    return unscored.float().mean().item()


def missing_logps(logps: Tensor, mask: Tensor, accelerator: Accelerator, step: int) -> float:
    """Share of sampled tokens for which vLLM gave no log-probability, over all ranks.

    Args:
        logps: of the sampler (N, T); NaN where vLLM had none. TRL then trains that token without
            a mismatch correction.
        mask: 1 for tokens of the policy (N, T).
        accelerator: every rank must call this.
        step: optimiser steps done, for the message.

    Raises:
        FloatingPointError: not one is there, so that the correction would be off in silence.
    """
    counts = torch.stack([(logps.isnan() & mask.bool()).sum(), mask.bool().sum()])
    missing, tokens = accelerator.reduce(counts.float(), reduction="sum").tolist()
    if tokens and missing == tokens:
        raise FloatingPointError(
            f"vLLM gave no log-probability (NaN) for any of {tokens:.0f} tokens at step {step}. Its "
            "weights or its cache are broken; restart it, or train without "
            "vllm_importance_sampling_correction."
        )
    return missing / tokens if tokens else 0.0


def guard_server(client: "VLLMClient", step: Callable[[], int], seconds: float) -> None:
    """Give every request to a vLLM server an end; TRL's wait for ever for an answer.

    A read is not tried again: the server may still be at work on the first request.

    Args:
        client: TRL's client; its session is changed.
        step: the optimiser steps done, for the message.
        seconds: longest wait for an answer.
    """
    from requests import RequestException

    send = client.session.request
    adapter = client.session.get_adapter(client.base_url)
    adapter.max_retries = adapter.max_retries.new(read=0)

    def request(method: str, url: str, **kwargs: Any) -> Any:
        try:
            return send(method, url, **{"timeout": (CONNECT_SECONDS, seconds), **kwargs})
        except RequestException as error:
            raise ConnectionError(
                f"The vLLM server did not answer {method} {url} at step {step()} (longest wait "
                f"{seconds:.0f} s, 0.9 ddp_timeout): {type(error).__name__}: {error}. Restart the "
                "server, then resume from the last checkpoint: a restarted server has the initial "
                "weights until the next sync."
            ) from error

    client.session.request = request


def call_reward(function: Any, row: int, columns: dict[str, list], shared: dict[str, Any]) -> None:
    """Ask one plain reward function for one row; models and coroutines are not asked again."""
    if isinstance(function, nn.Module):
        return
    answer = function(**{name: [values[row]] for name, values in columns.items()}, **shared)
    if hasattr(answer, "close"):  # a coroutine, which nobody will await
        answer.close()
        return
    torch.tensor([value if value is not None else torch.nan for value in answer])
