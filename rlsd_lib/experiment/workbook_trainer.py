"""`WorkbookTrainer`: an `RLSDTrainer` that stops in order when something around it breaks."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.trainer.utils import is_async_callable

from rlsd_lib.runs.processes import on_sigterm
from rlsd_lib.trainer.checkpoints import last_checkpoint
from rlsd_lib.trainer.states import loss_mask
from rlsd_lib.trainer.trainer import RLSDTrainer
from rlsd_lib.trainer.upstream import mends

DIAGNOSIS_SECONDS = 10.0  # for trying rows one by one after a reward function has raised

logger = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """Training was stopped by a signal, after a checkpoint of its last step was written."""


class WorkbookTrainer(RLSDTrainer):
    """The trainer of `Experiment`: orderly stops, whole checkpoints, errors that name what failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reward_funcs = list(map(named, self.reward_funcs, self.reward_func_names))
        self.sigterm = StopOnSigterm(self.accelerator)
        self.add_callback(self.sigterm)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            # A little less than the other ranks wait for this one, so that this error comes first.
            seconds = 0.9 * self.args.ddp_timeout
            guard_server(self.vllm_generation.vllm_client, lambda: self.state.global_step, seconds)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent's.

        Raises Stopped after a SIGTERM, with a checkpoint of the finished step; RuntimeError if a
        checkpoint could not be written; earlier ones are untouched.
        """
        self.sigterm.asked = self.sigterm.stopped = False
        with on_sigterm(self.sigterm.ask):
            output = super().train(*args, **kwargs)
        if self.sigterm.stopped:
            raise Stopped(
                f"stopped by SIGTERM after step {self.state.global_step} of "
                f"{self.state.max_steps}, resumable: {last_checkpoint(self.args.output_dir)}"
            )
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        logps = output.get("sampling_per_token_logps")
        if logps is None or not self.vllm_importance_sampling_correction:
            return output
        # TRL trains a token to which vLLM gave NaN without mismatch correction, drops one at
        # infinity, and clips one at minus infinity: an error of the server that it would not tell.
        mask = loss_mask(output).bool()
        found = (logps.isnan() & mask, logps.isinf() & mask, mask)
        counts = torch.stack([each.sum() for each in found]).float()
        missing, infinite, tokens = self.accelerator.reduce(counts, reduction="sum").tolist()
        if infinite or 0 < tokens == missing:
            raise FloatingPointError(
                f"vLLM gave NaN as log-probability for {missing:.0f}, and infinity for "
                f"{infinite:.0f}, of {tokens:.0f} tokens at step {self.state.global_step}. "
                "Restart it: its weights or its cache are broken."
            )
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["sampling/missing_logp_frac"].append(missing / max(tokens, 1))
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except FloatingPointError:  # of the weights, before anything was written
            raise
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            disk = shutil.disk_usage(next(place for place in folder.parents if place.exists()))
            last = last_checkpoint(folder.parent)
            kept = f"{last} is complete and untouched" if last else "there is no earlier checkpoint"
            raise RuntimeError(
                f"{folder.name} could not be written to {folder.parent}, which has "
                f"{disk.free / 2**30:.1f} GiB free: {type(error).__name__}: {error}; {kept}."
            ) from error


# Signals


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, which clusters send before they kill: finish the step, save, stop, on all ranks."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked = self.stopped = False

    def ask(self) -> None:
        """What the signal's handler does."""
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if any rank got the signal; called on every rank."""
        flag = torch.tensor(float(self.asked), device=self.accelerator.device)
        if self.accelerator.reduce(flag, reduction="sum") > 0:
            logger.warning("SIGTERM: saving after step %s, then stopping", state.global_step)
            self.stopped = control.should_save = control.should_training_stop = True


# Rewards


def named(function: Any, name: str) -> Any:
    """A plain reward function whose errors name it and the row, step and rank where it failed."""
    if isinstance(function, nn.Module) or is_async_callable(function):
        return function

    def scored(**columns: Any) -> list[float | None]:
        try:
            return function(**columns)
        except Exception as error:
            row, step = _first_failing(function, columns), columns["trainer_state"].global_step
            at = f"a batch of {len(columns['prompts'])} rows" if row is None else f"row {row}"
            raise RuntimeError(
                f"Reward function {name!r} failed on {at} at step {step}, rank "
                f"{PartialState().process_index}: {type(error).__name__}: {error}"
            ) from error

    return scored


def _first_failing(function: Callable[..., Any], columns: dict[str, Any]) -> int | None:
    """The first row on which `function` raises by itself, as far as `DIAGNOSIS_SECONDS` allow."""
    silent = {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
    end = time.monotonic() + DIAGNOSIS_SECONDS
    for row in range(len(columns["prompts"])):
        if time.monotonic() > end:
            return None
        one = {k: v[row : row + 1] if isinstance(v, list) else v for k, v in columns.items()}
        try:
            function(**one | silent)
        except Exception:
            return row
    return None


# vLLM


@mends("trl", "1.16.0", "trl/generation/vllm_client.py, VLLMClient: requests without a timeout")
def guard_server(client: Any, step: Callable[[], int], seconds: float) -> None:
    """Give every request of TRL's `VLLMClient` a time limit in seconds; TRL's wait for ever."""
    from requests import RequestException

    send = client.session.request
    adapter = client.session.get_adapter(client.base_url)
    # A read is not tried again: the server may still be at work on the first request.
    adapter.max_retries = adapter.max_retries.new(read=0)

    def request(method: str, url: str, **kwargs: Any) -> Any:
        try:
            return send(method, url, **{"timeout": (10.0, seconds), **kwargs})
        except RequestException as error:
            raise ConnectionError(
                f"The vLLM server did not answer {method} {url} at step {step()} (longest wait "
                f"{seconds:.0f} s, 0.9 ddp_timeout): {type(error).__name__}: {error}. Restart the "
                "server, then resume from the last checkpoint."
            ) from error

    client.session.request = request
