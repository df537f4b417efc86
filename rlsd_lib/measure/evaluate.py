"""Accuracy and pass@k: sample completions and let the task judge them.

Completions come from transformers' own `generate`, whatever the model was trained with, so that
every method is measured in the same way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlsd_lib.measure.intervals import Interval, bootstrap_interval
from rlsd_lib.prompts import Prompt
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.encode import Processing, encode, messages_of, tokenizer_of


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
    processors: Sequence[LogitsProcessor] = (),
    **settings: Any,
) -> list[list[int]]:
    """Sample one completion per prompt, as token ids up to and including its first end token.

    Prompts hold their images, where `processing` is a processor. Temperature 0 is greedy. Sampling
    is from the full distribution, but for `settings`, fields of transformers' `GenerationConfig`, and
    `processors` before them; of the model's own generation config only the end tokens count.

    The model's mode and torch's random state are as before afterwards. Raises ValueError, by
    transformers, for a negative temperature.
    """
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
                generated = model.generate(
                    **encoded,
                    generation_config=asked,
                    logits_processor=LogitsProcessorList(processors),
                )
                rows += generated[:, encoded["input_ids"].shape[1] :].tolist()
        finally:
            model.generation_config = own
            model.train(was_training)
    stops = [next((i for i, t in enumerate(row) if t in ends), len(row)) for row in rows]
    return [row[: stop + 1] for row, stop in zip(rows, stops, strict=True)]


def evaluate(
    model: PreTrainedModel,
    processing: Processing,
    task: Task,
    *,
    num_samples: int = 1,
    **sampling: Any,
) -> pd.DataFrame:
    """Judge `num_samples` completions of each of the task's test problems; one row per completion.

    Columns: `problem`, `sample` (both from 0), `correct`, `speaks_of_reference` (booleans),
    `completion`, `answer`. `sampling` are arguments of `sample`, of which `max_new_tokens` is
    required. Raises ValueError for several greedy samples.
    """
    if num_samples > 1 and sampling.get("temperature") == 0:
        raise ValueError(f"got {num_samples=}; ask for 1 where it is greedy")
    asked = [(place, row) for place, row in enumerate(task.test) for _ in range(num_samples)]
    ids = sample(model, processing, [messages_of(row) for _, row in asked], **sampling)
    texts = processing.batch_decode(ids, skip_special_tokens=True)
    return pd.DataFrame(
        {
            "problem": place,
            "sample": number % num_samples,
            "correct": task.verify(text, row),
            "speaks_of_reference": task.speaks_of_reference(text),
            "completion": text,
            "answer": row["answer"],
        }
        for number, ((place, row), text) in enumerate(zip(asked, texts, strict=True))
    )


def per_problem(results: pd.DataFrame) -> np.ndarray:
    """Return each problem's share of correct samples, in the order of the problems."""
    return results.groupby("problem")["correct"].mean().to_numpy(dtype=float)


def accuracies(sampled: pd.DataFrame, greedy: pd.DataFrame) -> dict[str, Interval]:
    """Return what a run records of its held-out problems, with intervals over problems.

    From two results of `evaluate`: "accuracy" of the sampled completions, "accuracy_greedy", and
    "pass@k", the share of problems that one of their k samples solves.
    """
    solved = sampled.groupby("problem")["correct"]
    values = {
        "accuracy": per_problem(sampled),
        "accuracy_greedy": per_problem(greedy),
        f"pass@{solved.size().iloc[0]}": solved.any(),
    }
    return {name: bootstrap_interval(value) for name, value in values.items()}
