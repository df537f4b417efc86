"""An experiment: what one training notebook does, as an object with one method per step.

    experiment = Experiment(method="rlsd", preset="lab", seed=0)
    experiment.evaluate("before")
    experiment.train()
    experiment.evaluate("after")
    experiment.finish()

Everything is written under `experiment.run.path`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython import get_ipython
from peft import LoraConfig
from transformers import PreTrainedModel, PrinterCallback

from rlsd_lib.experiment import shown, training
from rlsd_lib.experiment.controls import apply_control, control_template
from rlsd_lib.experiment.launch import accelerate_config
from rlsd_lib.experiment.presets import resolve_parameters, resolve_preset
from rlsd_lib.experiment.progress import LiveCurve, Recorder
from rlsd_lib.experiment.steady import WorkbookTrainer
from rlsd_lib.measure import rollouts as lens
from rlsd_lib.measure.evaluate import accuracies, evaluate, per_problem
from rlsd_lib.measure.leakage import phrase_leakage
from rlsd_lib.methods import PROMPT
from rlsd_lib.prompts import COLUMN
from rlsd_lib.runs import paths, provenance
from rlsd_lib.runs.run import Run
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lengths import within
from rlsd_lib.tasks.models import Loaded, load_model


class Experiment:
    """One run: resolved before anything is computed, then evaluated, trained, evaluated, written.

    Args:
        method: a key of `METHODS`.
        preset: a key of `PRESETS`.
        seed: order of rows, sampling, and evaluation draws; the rows themselves are the preset's.
        max_steps: -1 for the preset's.
        overrides: any `RLSDConfig` fields.
        control: a key of `CONTROLS`, applied to what the teacher is shown.
        num_processes: processes to train on, which share the batch of one; see `launch`.
        run_dir: where everything is written; "" for the default directory.
        notebook: the notebook that runs this, for the manifest.
        if_exists: as in `Run.start`.

    Raises:
        ValueError: for unknown names or bad values, before a run directory is claimed.
        FileExistsError: if the run directory holds a run already.
        FileNotFoundError: for an unknown accelerate config.
    """

    def __init__(
        self,
        *,
        method: str,
        preset: str,
        seed: int = 0,
        max_steps: int = -1,
        overrides: Mapping[str, Any] | None = None,
        control: str = "none",
        num_processes: int = 1,
        run_dir: str = "",
        notebook: str | None = None,
        if_exists: str = "raise",
    ) -> None:
        parameters = {
            "method": method,
            "preset": preset,
            "seed": seed,
            "max_steps": max_steps,
            "overrides": dict(overrides or {}),
            "control": control,
            "num_processes": num_processes,
        }
        # Resolved once into nowhere, so that a bad value costs no directory.
        resolve_parameters(parameters, Path("unused"), None, num_processes)
        if num_processes > 1:
            accelerate_config(resolve_preset(preset, parameters["overrides"])[0].accelerate)
        self.run = Run.start(
            run_dir,
            parameters={**parameters, "run_dir": run_dir},
            notebook=notebook,
            if_exists=if_exists,
        )
        self._prepare(parameters)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self.teacher_model is not None:
            self.teacher_model.to(self.model.device)
        # Under a control the references differ and the problems do not: runs stay comparable.
        problems = self.task.test.remove_columns(COLUMN)
        data = {"train": self.task.train, "test": self.task.test, "problems": problems}
        self.run.record(
            config=self.config.to_dict(),
            preset=asdict(self.preset),
            model=self.model.name_or_path or self.preset.model,
            data={name: provenance.fingerprint(rows) for name, rows in data.items()},
            evaluation={**self._sampling(), "greedy_samples": 1},
            prompts_too_long=self.prompts_too_long,
        )

    @classmethod
    def attach(cls, run_dir: str | Path) -> "Experiment":
        """The experiment of a run that another process began, as one of its processes trains it.

        Raises:
            FileNotFoundError: there is no run in `run_dir`.
        """
        self = cls.__new__(cls)
        self.run = Run.attach(run_dir)
        parameters = self.run.manifest["parameters"]
        self._prepare(parameters, parameters["num_processes"])
        return self

    def _prepare(self, parameters: Mapping[str, Any], sharing: int = 1) -> None:
        """Load models and rows, and resolve the configuration for one of `sharing` processes."""
        self.method, self.seed = parameters["method"], parameters["seed"]
        self.preset, _ = resolve_preset(parameters["preset"], parameters["overrides"])
        control = parameters["control"]
        self.num_processes = parameters["num_processes"]
        self.metrics: dict[str, Any] = {}
        self.cache = paths.outputs_root() / "cache"
        # A processor, where the model sees images.
        self.model, self.tokenizer = self._load(self.preset.model, self.preset.model_options)
        self.task = load_task(
            self.preset.task,
            train_size=self.preset.train_size,
            test_size=self.preset.test_size,
            seed=self.preset.data_seed,
            **{**self.preset.task_options, **self.preset.task_by_method.get(self.method, {})},
        )
        template = control_template(control, self.task.privileged_template)
        folder = self.run.path / "checkpoints"
        self.config = resolve_parameters(parameters, folder, template, sharing)
        self.prompts_too_long = 0
        if limit := self.preset.max_prompt_length:
            how = {"chat_template_kwargs": self.config.chat_template_kwargs}
            self.task, self.prompts_too_long = within(self.task, self.tokenizer, limit, **how)
        # On both sides: what the notebooks show of the teacher is what the run does.
        sides = {name: getattr(self.task, name) for name in ("train", "test")}
        controlled = {name: apply_control(rows, control, self.seed) for name, rows in sides.items()}
        self.task = replace(self.task, **controlled)
        self.teacher_model = self._external_teacher()

    def summary(self) -> pd.DataFrame:
        """What decides this run, in a few lines."""
        return shown.summary(self)

    def prompts(self, row: int = 0) -> pd.DataFrame:
        """What student and teacher read for test problem `row`, side by side."""
        return shown.prompts(self, row)

    def look_at_mixed(self, first: int = 0, rows: int = 20, **changes: Any) -> list[lens.Rollout]:
        """The first group from `first` on in which some rollouts succeed and some fail.

        Such a group is what a policy gradient learns from. Two of each kind come first. Falls
        through to the last group looked at when all agree.
        """
        for row in range(first, min(first + rows, len(self.task.test))):
            group = self.look(row, **changes)
            if len({rollout.reward for rollout in group}) > 1:
                break
        ranked = sorted(group, key=lambda rollout: -rollout.reward)
        return [ranked[0], ranked[-1], *ranked[1:-1]]

    def report(self) -> pd.DataFrame:
        """Accuracies and leak rate so far, with their 95 % intervals."""
        keys = [key.removesuffix("_low") for key in self.metrics if key.endswith("_low")]
        rows = [
            (*key.rsplit("_", 1), *(self.metrics[key + end] for end in ("", "_low", "_high")))
            for key in keys
        ]
        frame = pd.DataFrame(rows, columns=["measure", "when", "mean", "low", "high"])
        return frame.sort_values("measure", kind="stable", ignore_index=True).round(3)

    def look(self, row: int = 0, **changes: Any) -> list[lens.Rollout]:
        """One group of rollouts of test problem `row` with gap, weight and credit per token."""
        settings = {
            "method": self.method,
            "template": self.config.privileged_template,
            "lam": self.config.lambda_init,
            "epsilon_w": self.config.epsilon_w,
            "credit": self.config.credit,
            "max_new_tokens": self.config.max_completion_length,
            "temperature": self.config.temperature,
            "seed": self.seed,
            "teacher": self.teacher_model,
            "peer_context": self.config.peer_context,
            "chat_template_kwargs": self.config.chat_template_kwargs,
        }
        return lens.look(self.model, self.tokenizer, self.task, row, **{**settings, **changes})

    def evaluate(self, when: str) -> pd.DataFrame:
        """Accuracy, pass@k and leak rate on the held-out problems; one row per sampled completion.

        `when` ("before", "after") names their mean and 95 % interval in metrics.json, and those of
        the greedy accuracy. Problems are resampled; the leak rate counts one completion per problem.
        """
        settings, measured = self._sampling(), (self.model, self.tokenizer, self.task)
        once = {**settings, "num_samples": 1, "temperature": 0.0}
        # Training leaves its autocast on the model's forward; before and after must not differ.
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.bf16):
            results = evaluate(*measured, **settings, seed=self.seed)
            greedy = evaluate(*measured, **once)
        # Kept per problem, so that runs can be compared problem by problem.
        self.run.add_evaluation(when, correct=per_problem(results), greedy=per_problem(greedy))
        texts = results.loc[results["sample"] == 0, "completion"]
        leak = phrase_leakage(texts, self.task.reference_pattern)
        for name, value in {**accuracies(results, greedy), "leak_rate": leak}.items():
            self.metrics[f"{name}_{when}"] = value[0]
            self.metrics[f"{name}_{when}_low"] = value.low
            self.metrics[f"{name}_{when}_high"] = value.high
        return results

    def trainer(self) -> WorkbookTrainer:
        """The trainer of this run, which logs every step into the run directory."""
        external = {"teacher_model": self.teacher_model} if self.teacher_model else {}
        trainer = WorkbookTrainer(
            self.model,
            [self.task.reward, self.task.leak],
            self.config,
            self.task.train,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(**self.preset.lora) if self.preset.lora else None,
            **external,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Recorder(self.run))
        if get_ipython() is not None:
            trainer.add_callback(LiveCurve("reward", self.method))
        return trainer

    def train(self) -> pd.DataFrame:
        """Train, from the last checkpoint if the run was resumed; returns a row per logged step.

        One process trains here. Several are launched, and the trained weights are loaded back.
        """
        if self.num_processes == 1:
            folder = self.run.path / training.MODEL if self.preset.save_model else None
            trained = training.train_here(self, folder)
        else:
            trained = training.train_launched(self)
        self.model.eval()
        self.metrics |= training.metrics_of(trained)
        steps = pd.DataFrame(trained["steps"])
        return steps.assign(method=self.method, path=self.run.path.name)

    def keep(self, rollouts: Sequence[lens.Rollout]) -> None:
        """Write rollouts with their token credit to samples.jsonl."""
        self.run.add_samples([rollout.as_dict() for rollout in rollouts])

    def finish(self) -> pd.Series:
        """Write metrics.json, mark the run finished, and return the metrics."""
        self.run.finish(self.metrics)
        return pd.Series(self.metrics, name="value").to_frame()

    def _external_teacher(self) -> PreTrainedModel | None:
        if self.config.row.teacher_sees != PROMPT:
            return None
        model, _ = self._load(self.preset.teacher_model, self.preset.teacher_options)
        return model

    def _load(self, name: str, options: Mapping[str, Any]) -> Loaded:
        return load_model(name, self.cache, sees_images=self.preset.sees_images, **options)

    def _sampling(self) -> dict[str, Any]:
        return {
            "num_samples": self.preset.num_samples,
            "temperature": 1.0,
            "max_new_tokens": self.config.max_completion_length,
            "batch_size": self.preset.evaluation_batch_size,
            "chat_template_kwargs": self.config.chat_template_kwargs,
        }
