"""An experiment: what one training notebook does, as an object with one method per step."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pandas.io.formats.style import Styler
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import PreTrainedModel, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from rlsd_lib.experiment.controls import apply_control
from rlsd_lib.experiment.launch import run_workers
from rlsd_lib.experiment.presets import RunParameters, resolve_preset
from rlsd_lib.experiment.progress import LiveCurve, Recorder
from rlsd_lib.experiment.workbook_trainer import WorkbookTrainer
from rlsd_lib.measure.evaluate import accuracies, evaluate, per_problem
from rlsd_lib.measure.exact import right_chains
from rlsd_lib.measure.intervals import Interval, bootstrap_interval, share_interval
from rlsd_lib.measure.rollouts import Rollout, look, task_signals
from rlsd_lib.methods import PEER, PRIVILEGED, PROMPT
from rlsd_lib.prompts import COLUMN, prompt_text, teacher_prompt
from rlsd_lib.report.tables import WORDS, readable
from rlsd_lib.runs import paths, provenance
from rlsd_lib.runs.records import read_lines
from rlsd_lib.runs.run import Run
from rlsd_lib.tasks.encode import within
from rlsd_lib.tasks.models import Loaded, load_model
from rlsd_lib.trainer.checkpoints import last_checkpoint

# What student and teacher read is shown as text: `<answer>` is no tag, and no script of it runs.
pd.set_option("styler.format.escape", "html")
# Of these, metrics.json keeps the mean over the last ten steps; of everything under rlsd/, the mean
# over the steps with a teacher pass.
LAST_MEANS = ("reward", "rewards/leak/mean", "entropy", "completions/mean_length")


class Experiment:
    """One run: resolved before anything is computed, then evaluated, trained, evaluated, written.

        experiment = Experiment(method="rlsd", preset="lab", seed=0)
        experiment.evaluate("before")
        experiment.train()
        experiment.evaluate("after")
        experiment.finish()

    Everything is written under `experiment.run.path`. `parameters` are the fields of
    `RunParameters`; `notebook` is for the manifest, and `if_exists` as in `Run.start`. Raises
    ValueError for unknown names or bad values, before a run directory is claimed; FileExistsError if
    it holds a run already; FileNotFoundError for an unknown accelerate config.
    """

    def __init__(
        self, *, notebook: str | None = None, if_exists: str = "raise", **parameters: Any
    ) -> None:
        self.parameters = RunParameters(**parameters)
        self.parameters.checked()  # into nowhere: a bad value costs no directory
        self.run = Run.start(
            self.parameters.run_dir,
            parameters=asdict(self.parameters),
            notebook=notebook,
            if_exists=if_exists,
        )
        self.run.record(phase="loading the model (a lab is pretrained on first use)")
        self._prepare()
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
            phase="ready",
            prompts_too_long=self.prompts_too_long,
        )

    @classmethod
    def attach(cls, run_dir: str | Path) -> "Experiment":
        """The experiment of a run that another process began; FileNotFoundError if there is none."""
        self = cls.__new__(cls)
        self.run = Run.attach(run_dir)
        self.parameters = RunParameters.of(self.run.manifest["parameters"])
        self._prepare(self.parameters.num_processes)
        return self

    def _prepare(self, processes: int = 1) -> None:
        """Load models and rows, and resolve the configuration of one of `processes`."""
        disable_progress_bar()  # a bar for each model read or written would bury the pictures
        method, seed, control = (getattr(self.parameters, k) for k in ("method", "seed", "control"))
        self.preset, _ = resolve_preset(self.parameters.preset, self.parameters.overrides, seed)
        self.metrics: dict[str, Any] = {}
        self.estimates: dict[tuple[str, str], Interval] = {}  # by measure, and when
        # A processor in the tokenizer's place, where the model sees images.
        self.model, self.tokenizer = self._load(self.preset.model, self.preset.model_options)
        task = self.preset.load_task(method)
        self.config = self.parameters.resolve(
            self.run.path / "checkpoints", template=task.privileged_template, processes=processes
        ).config
        self.prompts_too_long = 0
        if limit := self.preset.max_prompt_length:
            how = {"chat_template_kwargs": self.config.chat_template_kwargs}
            task, self.prompts_too_long = within(task, self.tokenizer, limit, **how)
        # On both sides: what the notebooks show of the teacher is what the run does.
        train, test = (apply_control(rows, control, seed) for rows in (task.train, task.test))
        self.task = replace(task, train=train, test=test)
        self.teacher_model: PreTrainedModel | None = None
        if self.config.row.teacher_sees == PROMPT:
            teacher = self.preset.teacher_model, self.preset.teacher_options
            self.teacher_model, _ = self._load(*teacher)

    def _load(self, name: str, options: Mapping[str, Any]) -> Loaded:
        cache = paths.outputs_root() / "cache"
        return load_model(name, cache, sees_images=self.preset.sees_images, **options)

    def summary(self) -> Styler:
        """What decides this run, in a few lines."""
        config, processes = self.config, self.parameters.num_processes
        teacher = config.teacher_model_kind if config.uses_teacher else "none"
        facts = {
            "method": f"{config.method}: {config.row.summary}",
            "preset": self.preset.summary,
            "rollouts per step": config.generation_batch_size,
            "rollouts per prompt": config.num_generations,
            "steps": config.max_steps,
            "learning rate": config.learning_rate,
            "teacher": self.preset.teacher_model if self.teacher_model is not None else teacher,
        }
        if config.row.has_lambda:
            steps = config.lambda_decay_steps
            facts["lambda"] = f"{config.lambda_init}{f', to 0 in {steps} steps' if steps else ''}"
        if config.row.has_lambda and "epsilon_w" in config.row.asks:
            facts["epsilon_w"] = str(config.epsilon_w)
        if idle := self.parameters.idle(config):
            facts["changes nothing"] = "; ".join(idle)
        facts["parameters"] = f"{self.model.num_parameters():,}"
        facts |= {"processes": processes} if processes > 1 else {}
        facts["run directory"] = paths.short(self.run.path)
        return readable(pd.Series(facts, name="value").to_frame())

    def prompts(self, row: int | Mapping[str, Any] = 0) -> Styler:
        """What student and teacher read for a row of the task, or for test problem `row`."""
        problem = self.task.test[row] if isinstance(row, int) else row
        sees = self.config.row.teacher_sees
        peer = "<a successful rollout of the same group>"
        shown = {PRIVILEGED: problem[COLUMN], PEER: peer}.get(sees)
        seen = teacher_prompt(problem["prompt"], shown, self.config.privileged_template)
        texts = {
            "student reads": prompt_text(problem["prompt"]),
            "teacher reads": "(no teacher)" if sees is None else prompt_text(seen),
            "answer": problem["answer"],
        }
        return readable(pd.Series(texts, name="a held-out problem").to_frame())

    def evaluate(self, when: str) -> pd.DataFrame:
        """Accuracy, pass@k and leak rate on the held-out problems; one row per sampled completion.

        `when` ("before", "after") names their means and 95 % intervals over problems in metrics.json,
        and those of the greedy accuracy, and of the probability of a right chain where known.
        """
        self.run.record(phase=f"evaluating {when}")
        settings, measured = self._sampling(), (self.model, self.tokenizer, self.task)
        once = {**settings, "num_samples": 1, "temperature": 0.0}
        # Training leaves its autocast on the model's forward; before and after must not differ.
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.bf16):
            results = evaluate(*measured, **settings, seed=self.parameters.seed)
            greedy = evaluate(*measured, **once)
            # Kept per problem, so that runs can be compared problem by problem.
            scores = {"correct": per_problem(results), "greedy": per_problem(greedy)}
            if self.task.right_chain is not None:
                limit, how = settings["max_new_tokens"], self.config.chat_template_kwargs or {}
                asked = {"max_new_tokens": limit, "seed": self.parameters.seed, **how}
                scores["right_chain"] = right_chains(*measured, list(self.task.test), **asked)[1]
        leak = share_interval(results.loc[results["sample"] == 0, "speaks_of_reference"])
        measures = {**accuracies(results, greedy), "leak_rate": leak}
        if "right_chain" in scores:
            measures["right_chain"] = bootstrap_interval(scores["right_chain"])
        self.run.add_evaluation(when, **scores)
        for name, value in measures.items():
            self.estimates[name, when] = value
            ends = zip(("", "_low", "_high"), value, strict=True)
            self.metrics |= {f"{name}_{when}{end}": number for end, number in ends}
        return results

    def _sampling(self) -> dict[str, Any]:
        return {
            "num_samples": self.preset.num_samples,
            "temperature": 1.0,
            "max_new_tokens": self.config.max_completion_length,
            "batch_size": self.preset.evaluation_batch_size,
            "chat_template_kwargs": self.config.chat_template_kwargs,
        }

    def report(self) -> Styler:
        """Accuracies and leak rate so far, before beside after, with their 95 % intervals."""
        found = pd.Series({key: f"{value:.3f}" for key, value in self.estimates.items()})
        caption = "held-out problems; in brackets, the 95 % interval over problems"
        return readable(found.unstack(sort=False)).set_caption(caption)

    def train(self) -> pd.DataFrame:
        """Train, from the last checkpoint if the run was resumed; returns a row per logged step.

        One process trains here. Several are launched, and the trained weights are loaded back.
        Raises RuntimeError if a launched process failed; Stopped after a SIGTERM, which leaves a
        checkpoint to go on from.
        """
        self.run.record(phase="training")
        if self.parameters.num_processes == 1:
            trained = self.train_here(save=self.preset.save_model)
        else:
            trained = self._train_launched()
        self.model.eval()
        steps, done = pd.DataFrame(trained["steps"]), trained["last"] - trained["begun"]
        # A run that was stopped after its last step has nothing left to time.
        seconds = trained["seconds"] / done if done else None
        self.metrics |= {"steps": trained["last"], "seconds_per_step": seconds}
        self.metrics |= steps[list(LAST_MEANS)].tail(10).mean().to_dict()
        if "rlsd/gap_mean" in steps:
            with_teacher = steps[steps["rlsd/gap_mean"].notna()]
            self.metrics |= with_teacher.filter(like="rlsd/").mean().to_dict()
        return steps.assign(method=self.parameters.method, path=self.run.path.name)

    def train_here(self, *, save: bool) -> dict[str, Any]:
        """Train in this process, which may be one of several; every one of them must call this.

        Returns the steps `begun` after and `last` made, `seconds`, and the logged `steps`.
        """
        trainer = self.trainer()
        folder, manifest = self.config.output_dir, self.run.manifest
        whole = manifest["if_exists"] == "resume-older"
        checkpoint = last_checkpoint(folder, whole=whole) if manifest["resumed"] else None
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.changes and trainer.is_world_process_zero():
            self.run.record(changes=trainer.changes)
        if save:
            trainer.save_model(str(self.run.path / "model"))
        return {
            "begun": int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0,
            "last": result.global_step,
            "seconds": result.metrics["train_runtime"],
            "steps": [row for row in trainer.state.log_history if "loss" in row],
        }

    def trainer(self) -> WorkbookTrainer:
        """The trainer of this run, which logs every step into the run directory."""
        trainer = WorkbookTrainer(
            self.model,
            [self.task.reward, self.task.leak],
            self.config,
            self.task.train,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(**self.preset.lora) if self.preset.lora else None,
            teacher_model=self.teacher_model,
            signals=task_signals(self.model, self.task, self.tokenizer, self.config),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Recorder(self.run, LiveCurve(self.run, self.config)))
        return trainer

    def _train_launched(self) -> dict[str, Any]:
        """Train on launched processes; this one's model waits on the CPU, then takes the weights."""
        device, folder = self.model.device, self.run.path / "model"
        models = [m for m in (self.model, self.teacher_model) if m is not None]
        for model in models:
            model.to("cpu")  # the memory of the accelerator is the workers'
        curve = LiveCurve(self.run, self.config)
        trained = run_workers(self.run, self.parameters.num_processes, curve.draw)
        curve.draw(at_once=True)
        take_weights(self.model, folder)
        for model in models:
            model.to(device)
        if not self.preset.save_model:
            shutil.rmtree(folder)
        return {**trained, "steps": read_lines(self.run.path / "metrics.jsonl")}

    def look_at_mixed(self, first: int = 0, **changes: Any) -> list[Rollout]:
        """The first group from test problem `first` on in which rollouts succeed and fail.

        Its best and its worst rollout come first. Of 20 problems on which all rollouts agree the last
        is shown. `changes` are keywords of `measure.rollouts.look`.
        """
        looked = self.model, self.tokenizer, self.task
        settings = {"teacher": self.teacher_model, "seed": self.parameters.seed, **changes}
        for row in range(first, min(first + 20, len(self.task.test))):
            group = look(*looked, row, self.config, **settings)
            settings["seed"] += 1  # else every problem would be answered with the same draws
            if len({rollout.reward for rollout in group}) > 1:
                break
        ranked = sorted(group, key=lambda rollout: -rollout.reward)
        return [ranked[0], ranked[-1], *ranked[1:-1]]

    def keep(self, rollouts: Sequence[Rollout]) -> None:
        """Write rollouts with their token credit to samples.jsonl."""
        self.run.add_samples(map(asdict, rollouts))

    def finish(self) -> Styler:
        """Write metrics.json, mark the run finished, and return the metrics that `report` has not."""
        self.run.finish(self.metrics)
        told = {k: v for k, v in self.metrics.items() if "_before" not in k and "_after" not in k}
        words = {name: WORDS.get(name, "") for name in told}
        return readable(pd.DataFrame({"value": told, "what it is": words}))


def take_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give `model` the weights that were saved in `folder`; an adapter is put into its layers."""
    if (folder / ADAPTER_CONFIG).exists():
        PeftModel.from_pretrained(model, folder)  # in place, as training in this process does
    else:
        trained = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())
