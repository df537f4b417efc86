"""The training of an experiment: in this process, or on several that are launched for it.

Both end in the same dictionary: `begun` and `last` step, `seconds`, and the logged `steps`.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import PreTrainedModel

from rlsd_lib.experiment.launch import run_workers
from rlsd_lib.experiment.progress import Followed
from rlsd_lib.experiment.steady import last_checkpoint
from rlsd_lib.runs.records import read_lines

if TYPE_CHECKING:
    from rlsd_lib.experiment.experiment import Experiment

MODEL = "model"  # folder of the trained model in the run directory
# Of these, metrics.json holds the mean over the last ten steps; of everything under rlsd/, the mean
# over the steps at which the teacher was asked.
LAST_MEANS = ("reward", "rewards/leak/mean", "entropy", "completions/mean_length")


def train_here(experiment: "Experiment", model_dir: Path | None) -> dict[str, Any]:
    """Train in this process, which may be one of several, from the last checkpoint on a resume.

    The trained model is left in `model_dir` if there is one; every process must call this.

    Raises:
        Stopped: after a SIGTERM; a checkpoint is written, and the run can be resumed.
    """
    trainer = experiment.trainer()
    resumed = experiment.run.manifest["resumed"]
    checkpoint = last_checkpoint(experiment.config.output_dir) if resumed else None
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if model_dir is not None:
        trainer.save_model(str(model_dir))
    return {
        "begun": int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0,
        "last": result.global_step,
        "seconds": result.metrics["train_runtime"],
        "steps": [row for row in trainer.state.log_history if "loss" in row],
    }


def train_launched(experiment: "Experiment") -> dict[str, Any]:
    """Train on launched processes; this one's model waits on the CPU, then takes the weights.

    Raises:
        LaunchError: a process failed.
        Stopped: as `train_here`.
    """
    device, folder = experiment.model.device, experiment.run.path / MODEL
    kept = [m for m in (experiment.model, experiment.teacher_model) if m is not None]
    for model in kept:
        model.to("cpu")  # the memory of the accelerator is the workers'
    watched = Followed(experiment.config.max_steps, experiment.method)
    trained = run_workers(experiment.run, experiment.num_processes, watched.show)
    watched.end()
    _take_weights(experiment.model, folder)
    for model in kept:
        model.to(device)
    if not experiment.preset.save_model:
        shutil.rmtree(folder)
    return {**trained, "steps": read_lines(experiment.run.path / "metrics.jsonl")}


def _take_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give `model` the weights that were saved in `folder`; an adapter is put into its layers."""
    if (folder / ADAPTER_CONFIG).exists():
        PeftModel.from_pretrained(model, folder)  # in place, as training in this process does
    else:
        trained = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())


def metrics_of(trained: dict[str, Any]) -> dict[str, Any]:
    """What metrics.json keeps of a training."""
    steps, done = pd.DataFrame(trained["steps"]), trained["last"] - trained["begun"]
    metrics: dict[str, Any] = {"steps": trained["last"]}
    # A run that was stopped after its last step has nothing left to time.
    metrics["seconds_per_step"] = trained["seconds"] / done if done else None
    metrics |= steps[list(LAST_MEANS)].tail(10).mean().to_dict()
    if "rlsd/gap_mean" in steps:
        asked = steps[steps["rlsd/gap_mean"].notna()]
        metrics |= asked.filter(like="rlsd/").mean().to_dict()
    return metrics
