"""`SteadyTrainer`: TRL's GRPO trainer that stops in order when something around it breaks.

What is computed is the parent's, bit by bit. See `faults` and `checkpoints` for each case.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from trl import GRPOTrainer

from rlsd_lib.trainer import checkpoints, faults
from rlsd_lib.trainer import states as distillation


class SteadyTrainer(GRPOTrainer):
    """GRPO with whole checkpoints, an orderly stop on SIGTERM, and errors that name what failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging: Path | None = None  # while a checkpoint is being written
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            # Several processes get "cpu:0", to which torch.load cannot restore an optimiser.
            self.args._setup_devices = torch.device("cpu")
        self.sigterm = faults.StopOnSigterm(self.accelerator)
        self.add_callback(self.sigterm)
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            # A little less than the other ranks wait for this one, so that this error comes first.
            seconds = 0.9 * self.args.ddp_timeout
            client = self.vllm_generation.vllm_client
            faults.guard_server(client, lambda: self.state.global_step, seconds)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As the parent's; `True` means the last complete checkpoint.

        Raises:
            ValueError: there is no complete checkpoint to resume from.
            Stopped: after a SIGTERM, when the step is finished and its checkpoint written.
            CheckpointError: a checkpoint could not be written.
        """
        folder = self.args.output_dir
        resume = checkpoints.to_resume(folder, resume_from_checkpoint)
        if self.accelerator.is_local_main_process:
            checkpoints.clear(folder)
        self.accelerator.wait_for_everyone()
        own = self.args.enable_jit_checkpoint  # transformers' answer to SIGTERM, asked for
        with nullcontext() if own else self.sigterm.watching():
            output = super().train(resume, *args, **kwargs)
        if self.sigterm.stopped:
            raise faults.Stopped(
                f"stopped by SIGTERM after step {self.state.global_step} of "
                f"{self.state.max_steps}, resumable: {checkpoints.last_checkpoint(folder)}"
            )
        return output

    # Rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        logps = output.get("sampling_per_token_logps")
        if logps is not None and self.vllm_importance_sampling_correction:
            mask, step = distillation.policy_mask(output), self.state.global_step
            share = faults.missing_logps(logps, mask, self.accelerator, step)
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["sampling/missing_logp_frac"].append(share)
        return output

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, ids: list
    ) -> Tensor:
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        except Exception as error:
            given = {name: [row[name] for row in inputs] for name in inputs[0]}
            columns = {**given, "prompts": prompts, "completions": completions}
            named = self._reward_error(error, {**columns, "completion_ids": ids})
            raise named from (error if named is not error else error.__cause__)
        names, step, training = self.reward_func_names, self.state.global_step, self.model.training
        share = faults.check_rewards(rewards, names, step, training=training)
        self._metrics["train" if training else "eval"]["rewards/unscored_frac"].append(share)
        return rewards

    def _reward_error(self, error: Exception, columns: dict[str, list]) -> Exception:
        rows = len(columns["prompts"])
        for name in ("prompt", "completion"):
            columns.pop(name, None)
        shared = {
            "trainer_state": self.state,
            "log_extra": lambda *_: None,
            "log_metric": lambda *_: None,
        }
        return faults.reward_error(
            error,
            self.reward_func_names,
            lambda i, row: faults.call_reward(self.reward_funcs[i], row, columns, shared),
            rows,
            f"step {self.state.global_step}, rank {self.accelerator.process_index}",
        )

    def _steps_served(self) -> range:
        """Optimiser steps that rollouts generated now take part in."""
        accumulation = self.args.gradient_accumulation_steps
        micro_steps = self._micro_steps_served()
        # An epoch's last step may be short, and `_step` then no longer tells how much of the current
        # one is done. It matters where neither number divides the other: then, the most there is.
        aligned = not (micro_steps % accumulation and accumulation % micro_steps)
        done = self._step % accumulation if aligned else accumulation - 1
        first = self.state.global_step
        return range(first, first - (-(done + micro_steps) // accumulation))

    def _micro_steps_served(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def log_means(self, sums: dict[str, tuple[Any, Any]]) -> None:
        """Log numerator / denominator under rlsd/, summed over ranks; every rank must call it."""
        device = self.accelerator.device
        flat = [torch.as_tensor(v, device=device).float() for pair in sums.values() for v in pair]
        totals = self.accelerator.reduce(torch.stack(flat).view(-1, 2), reduction="sum")
        for name, (total, count) in zip(sums, totals.tolist(), strict=True):
            # NaN where there was nothing to average: the column stays, and TRL's means skip it.
            self._metrics["train"][f"rlsd/{name}"].append(total / count if count else float("nan"))

    def _check_finite(self, logps: Tensor, prompt_ids: Tensor, whose: str) -> None:
        """Stop on every rank when any rank has a log-probability that is no number."""
        bad = (~logps.isfinite()).any(dim=1).nonzero().flatten().tolist()
        prompts = [self._tokenizer.decode(prompt_ids[row], skip_special_tokens=True) for row in bad]
        # Gathered before anyone raises: a rank that stopped alone would leave the others waiting.
        found = gather_object(
            [(self.accelerator.process_index, text[-200:]) for text in prompts[:3]]
        )
        if found:
            raise FloatingPointError(
                f"Non-finite {whose} log-probabilities at step {self.state.global_step}, in samples "
                f"(rank, prompt) {found}. Training stops here; checkpoints under "
                f"{self.args.output_dir} are intact."
            )

    # Checkpoints

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write every file of a checkpoint into `_get_output_dir`."""
        super()._save_checkpoint(model, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = (
            self._get_output_dir(trial),
            checkpoints.checkpoint_name(self.state.global_step),
        )
        with self._writing(folder, name):
            self._write_checkpoint(model, trial)
            self._name_best(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            checkpoints.publish(folder, name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.clear(folder)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(folder, limit, best, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(Path(folder) / name))

    @contextmanager
    def _writing(self, folder: str, name: str) -> Iterator[None]:
        """Send what is saved inside to staging; a failure leaves nothing there."""
        self._staging = checkpoints.staging(folder)
        try:
            yield
        except Exception as error:
            checkpoints.clear(folder)
            raise checkpoints.save_error(folder, name, error) from error
        finally:
            self._staging = None

    def _name_best(self, folder: str) -> None:
        """Let the state name the best checkpoint by the place where it will be."""
        best = self.state.best_model_checkpoint
        if best and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(Path(folder) / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(Path(best) / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # uploads go on in the background: only from the final place
            super()._push_from_checkpoint(checkpoint_folder)
