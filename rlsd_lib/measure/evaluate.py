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
from transformers import GenerationConfig, PreTrainedModel

from rlsd_lib.measure.intervals import Interval, bootstrap_interval
from rlsd_lib.prompts import COLUMN, Prompt, teacher_prompt
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.encode import Processing, encode, messages_of, tokenizer_of


def generate(
    model: PreTrainedModel,
    processing: Processing,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 1,
    **sampling: Any,
) -> list[list[str]]:
    """Sample `num_samples` completions per prompt; `sampling` are arguments of `sample`.

    Returns one list of texts per prompt, without special tokens. Raises ValueError for several
    greedy samples, and as `sample` does.
    """
    if num_samples < 1 or (num_samples > 1 and sampling.get("temperature") == 0):
        raise ValueError(f"got {num_samples=}; ask for at least 1, and for 1 where it is greedy")
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    ids = sample(model, processing, repeated, **sampling)
    texts = processing.batch_decode(ids, skip_special_tokens=True)
    return [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    processing: Processing,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[list[int]]:
    """Sample one completion per prompt, as token ids up to and including its first end token.

    Prompts hold their images, where `processing` is a processor. Temperature 0 is greedy. Sampling
    is from the full distribution; `settings` are further fields of transformers' `GenerationConfig`
    that change it. Of the model's own generation config only the end tokens count, beside the
    tokenizer's: what is measured must not depend on the settings a model was published with.

    The same arguments give the same completions on the same machine; the model's mode and torch's
    random state are as before afterwards. Raises ValueError for prompts, counts or temperatures
    that make no sense.
    """
    if not prompts or min(max_new_tokens, batch_size) < 1 or temperature < 0:
        raise ValueError(
            f"got {len(prompts)} prompts, {max_new_tokens=}, {batch_size=}, {temperature=}; "
            "each count must be at least 1 and the temperature at least 0"
        )
    tokenizer, own, was_training = tokenizer_of(processing), model.generation_config, model.training
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = {*ends, tokenizer.eos_token_id} - {None}
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    asked = GenerationConfig(
        **{**drawn, **settings},
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )
    rows: list[list[int]] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.eval()
        # `generate` fills every field that is None in its argument from the model's own config.
        model.generation_config = GenerationConfig()
        try:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                encoded = encode(processing, batch, **(chat_template_kwargs or {})).to(model.device)
                generated = model.generate(**encoded, generation_config=asked)
                rows += generated[:, encoded["input_ids"].shape[1] :].tolist()
        finally:
            model.generation_config = own
            model.train(was_training)
    return [_until_end(row, ends) for row in rows]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: end + 1]


def evaluate(
    model: PreTrainedModel,
    processing: Processing,
    task: Task,
    *,
    privileged_template: str | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Judge completions of the task's test problems; one row per completion.

    Columns: `problem`, `sample` (both from 0), `correct`, `speaks_of_reference` (booleans),
    `completion`, `answer`. With a `privileged_template` the privileged prompt is measured: what the
    teacher can do. `sampling` are arguments of `generate`, of which `max_new_tokens` is required.
    """
    prompts = [messages_of(row) for row in task.test]
    if privileged_template is not None:
        prompts = [
            teacher_prompt(prompt, context, privileged_template)
            for prompt, context in zip(prompts, task.test[COLUMN], strict=True)
        ]
    samples = generate(model, processing, prompts, **sampling)
    return pd.DataFrame(
        {
            "problem": problem,
            "sample": sample,
            "correct": task.verify(text, row),
            "speaks_of_reference": task.speaks_of_reference(text),
            "completion": text,
            "answer": row["answer"],
        }
        for problem, (row, texts) in enumerate(zip(task.test, samples, strict=True))
        for sample, text in enumerate(texts)
    )


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
