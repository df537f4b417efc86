"""Accuracy and pass@k: sample completions and let the task judge them.

Completions come from transformers' own `generate`, whatever the model was trained with, so that
every method is measured in the same way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import comb
from transformers import PreTrainedModel

from rlsd_lib.measure.intervals import Interval, bootstrap_interval
from rlsd_lib.measure.sampling import undistorted
from rlsd_lib.prompts import COLUMN, Prompt, teacher_prompt
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.encode import Processing, encode, messages_of, tokenizer_of


def generate(
    model: PreTrainedModel,
    tokenizer: Processing,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    num_samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """Sample `num_samples` completions per prompt; temperature 0 is greedy.

    Prompts hold their images, where `tokenizer` is a processor. `batch_size` counts completions.
    Sampling is from the full distribution (no top-k, no top-p). The model's mode and torch's global
    seed are as before afterwards; the same arguments give the same completions on the same machine.
    Returns one list of texts per prompt, without special tokens. Raises ValueError for prompts,
    counts or temperatures that make no sense.
    """
    if not prompts or min(max_new_tokens, num_samples, batch_size) < 1 or temperature < 0:
        raise ValueError(
            f"got {len(prompts)} prompts, {max_new_tokens=}, {num_samples=}, {batch_size=}, "
            f"{temperature=}; each count must be at least 1 and the temperature at least 0"
        )
    if temperature == 0 and num_samples > 1:
        raise ValueError(f"greedy samples are all equal; ask for 1 instead of {num_samples}")
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    template = dict(chat_template_kwargs or {})
    words = tokenizer_of(tokenizer)
    settings = {
        **undistorted(temperature),
        "max_new_tokens": max_new_tokens,
        "pad_token_id": words.pad_token_id,
        "eos_token_id": model.generation_config.eos_token_id or words.eos_token_id,
    }
    was_training, devices = model.training, [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        parts = [
            _complete(model, tokenizer, batch, settings, template)
            for batch in _chunks(asked, batch_size)
        ]
    model.train(was_training)
    flat = [text for part in parts for text in part]
    return _chunks(flat, num_samples)


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _complete(
    model: PreTrainedModel,
    tokenizer: Processing,
    prompts: list[Prompt],
    settings: Mapping[str, Any],
    template: Mapping[str, Any],
) -> list[str]:
    encoded = encode(tokenizer, prompts, **template).to(model.device)
    ids = model.generate(**encoded, **settings)
    return tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Processing,
    task: Task,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    num_problems: int | None = None,
    privileged_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Judge completions of the task's test problems; one row per completion.

    Columns: `problem`, `sample` (both from 0), `correct`, `speaks_of_reference` (booleans),
    `completion`, `answer`. `num_problems` takes the first so many. With a `privileged_template`
    the privileged prompt is measured: what the teacher can do.
    """
    rows = list(task.test.select(range(num_problems)) if num_problems else task.test)
    prompts = [_prompt(row, privileged_template) for row in rows]
    samples = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        chat_template_kwargs=chat_template_kwargs,
    )
    return pd.DataFrame(
        {
            "problem": problem,
            "sample": sample,
            "correct": task.verify(text, row),
            "speaks_of_reference": task.speaks_of_reference(text),
            "completion": text,
            "answer": row["answer"],
        }
        for problem, (row, texts) in enumerate(zip(rows, samples, strict=True))
        for sample, text in enumerate(texts)
    )


def _prompt(row: dict, template: str | None) -> Prompt:
    """Return the row's prompt with its images, as the teacher sees it where there is a template."""
    prompt = messages_of(row)
    return prompt if template is None else teacher_prompt(prompt, row[COLUMN], template)


def pass_at_k(results: pd.DataFrame, k: int) -> pd.Series:
    """Return each problem's unbiased pass@k (Chen et al., 2021), indexed by problem.

    Of n samples, c of them correct: 1 - C(n - c, k) / C(n, k), the share of k-subsets with a
    success. Raises ValueError unless 1 <= k <= n for every problem.
    """
    counts = results.groupby("problem")["correct"].agg(["size", "sum"])
    if not 1 <= k <= counts["size"].min():
        raise ValueError(f"k is {k}; choose 1 to {counts['size'].min()}, the samples per problem")
    misses = comb(counts["size"] - counts["sum"], k) / comb(counts["size"], k)
    return pd.Series(1 - misses, index=counts.index, name=f"pass@{k}")


def per_problem(results: pd.DataFrame) -> np.ndarray:
    """Return each problem's share of correct samples, in the order of the problems."""
    return results.groupby("problem")["correct"].mean().to_numpy(dtype=float)


def accuracies(sampled: pd.DataFrame, greedy: pd.DataFrame) -> dict[str, Interval]:
    """Return what a run records of its held-out problems, with intervals over problems.

    From two results of `evaluate`: "accuracy" of the sampled completions, "accuracy_greedy", and
    "pass@k" for k = all samples of a problem.
    """
    k = int(sampled.groupby("problem").size().min())
    values = {
        "accuracy": per_problem(sampled),
        "accuracy_greedy": per_problem(greedy),
        f"pass@{k}": pass_at_k(sampled, k),
    }
    return {name: bootstrap_interval(value) for name, value in values.items()}
