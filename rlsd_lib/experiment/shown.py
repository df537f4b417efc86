"""What a training notebook shows of its experiment before anything is trained."""

from typing import TYPE_CHECKING

import pandas as pd

from rlsd_lib.methods import PEER, PRIVILEGED, PROMPT
from rlsd_lib.prompts import COLUMN, prompt_text, teacher_prompt
from rlsd_lib.trainer.config import RLSDConfig

if TYPE_CHECKING:
    from rlsd_lib.experiment.experiment import Experiment


def summary(experiment: "Experiment") -> pd.DataFrame:
    """What decides a run, in a few lines."""
    config, count = experiment.config, experiment.num_processes
    return pd.Series(
        {
            "method": f"{experiment.method}: {config.row.summary}",
            "preset": experiment.preset.summary,
            "rollouts per step": config.generation_batch_size,
            "rollouts per prompt": config.num_generations,
            "steps": config.max_steps,
            "learning rate": config.learning_rate,
            "teacher": _teacher_in_words(experiment),
            **_weight_in_words(config),
            "parameters": f"{experiment.model.num_parameters():,}",
            **({"processes": count} if count > 1 else {}),
            "run directory": experiment.run.path.name,
        },
        name="value",
    ).to_frame()


def prompts(experiment: "Experiment", row: int = 0) -> pd.DataFrame:
    """What student and teacher read for test problem `row`, side by side."""
    problem = experiment.task.test[row]
    sees = experiment.config.row.teacher_sees
    context = {
        None: None,
        PROMPT: None,
        PRIVILEGED: problem[COLUMN],
        PEER: "<a successful rollout of the same group>",
    }[sees]
    seen = problem["prompt"]
    if context is not None:
        seen = teacher_prompt(seen, context, experiment.config.privileged_template)
    texts = {"student reads": prompt_text(problem["prompt"])}
    texts["teacher reads"] = "(no teacher)" if sees is None else prompt_text(seen)
    texts["answer"] = problem["answer"]
    return pd.Series(texts, name=f"test problem {row}").to_frame()


def _teacher_in_words(experiment: "Experiment") -> str:
    if experiment.teacher_model is not None:
        return experiment.preset.teacher_model
    return experiment.config.teacher_model_kind if experiment.config.uses_teacher else "none"


def _weight_in_words(config: RLSDConfig) -> dict[str, str]:
    """The rows of `summary` that mean something only for a method with a weight."""
    if config.row.evidence is None:
        return {}
    decay = f" over {config.lambda_decay_steps} steps" if config.lambda_decay_steps else ""
    return {"lambda": f"{config.lambda_init}{decay}", "epsilon_w": str(config.epsilon_w)}
