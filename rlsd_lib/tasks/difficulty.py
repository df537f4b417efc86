"""Keep what a given model cannot do: a row stays only if all k of its rollouts fail.

This is how MMFineReason-123K came from 1.8M rows (Qwen3-VL-4B-Thinking, k = 4; arXiv 2604.03128).
A filter is a run: its directory holds the manifest, and `verdicts.jsonl` with a line
per row. A filter that was killed goes on where it stopped. Every row has a random seed of its own,
so that the result does not depend on the interruption, nor on the rows beside it.

    filter_rows(task.train, task.verify, generator, run_dir, k=4)
    hard = select_hard(task.train, run_dir)  # takes several runs too, one per shard
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset

from rlsd_lib.measure.sampling import undistorted
from rlsd_lib.prompts import prompt_text
from rlsd_lib.runs.provenance import digest, fingerprint
from rlsd_lib.runs.records import append_lines, drop_torn_line, read_lines, read_manifest, state_of
from rlsd_lib.runs.run import Run
from rlsd_lib.tasks.encode import messages_of
from rlsd_lib.tasks.task import Row

VERDICTS = "verdicts.jsonl"


class Generator(Protocol):
    """A model that answers, one row independently of the others."""

    def generate(self, rows: Sequence[Row], k: int) -> list[list[str]]:
        """Return k texts for each row."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what decides the texts, as JSON-like values: model, sampling, seed."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn. The paper does not say how its own were."""

    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, row: Row) -> int:
        """Return the row's own seed, below 2**31."""
        return int(digest([self.seed, row_key(row)])[:8], 16) % 2**31


class TransformersGenerator:
    """Plain generation with a loaded model and its tokenizer or processor, row by row."""

    def __init__(self, model: Any, processor: Any, sampling: Sampling | None = None) -> None:
        self.model, self.processor = model.eval(), processor
        self.sampling = sampling or Sampling()

    def describe(self) -> dict[str, Any]:
        """Return the model's name and the sampling."""
        name = {"generator": "transformers", "model": self.model.name_or_path}
        return {**name, **asdict(self.sampling)}

    def generate(self, rows: Sequence[Row], k: int) -> list[list[str]]:
        """Return k texts for each row; the caller's random state is left as it was."""
        with torch.random.fork_rng():
            return [self._answers(row, k) for row in rows]

    def _answers(self, row: Row, k: int) -> list[str]:
        torch.manual_seed(self.sampling.seed_of(row))
        inputs = self.processor.apply_chat_template(
            messages_of(row, "image"),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        settings = {
            **undistorted(self.sampling.temperature),
            "top_p": self.sampling.top_p,
            "num_return_sequences": k,
            "max_new_tokens": self.sampling.max_new_tokens,
        }
        tokens = self.model.generate(**inputs, **settings)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)


class VLLMGenerator:
    """Generation with vLLM; `engine` are arguments of `vllm.LLM` (`tensor_parallel_size`, ...)."""

    def __init__(self, model: str, sampling: Sampling | None = None, **engine: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "vLLM is not installed: install the extra `vllm` of this package on a machine with "
                "a GPU, or use TransformersGenerator"
            ) from error
        self.model, self.sampling, self.engine = model, sampling or Sampling(), engine
        self._llm = LLM(model=model, **engine)

    def describe(self) -> dict[str, Any]:
        """Return the model's name, the engine's arguments and the sampling."""
        name = {"generator": "vllm", "model": self.model, "engine": self.engine}
        return {**name, **asdict(self.sampling)}

    def generate(self, rows: Sequence[Row], k: int) -> list[list[str]]:
        """Return k texts for each row, all rows in one call."""
        from vllm import SamplingParams

        drawn = asdict(self.sampling)
        drawn |= {"n": k, "max_tokens": drawn.pop("max_new_tokens")}
        params = [SamplingParams(**drawn | {"seed": self.sampling.seed_of(row)}) for row in rows]
        chats = [messages_of(row, "image_pil") for row in rows]
        answers = self._llm.chat(chats, params, use_tqdm=False)
        return [[output.text for output in answer.outputs] for answer in answers]


def row_key(row: Row) -> str:
    """Name a row by its content: its column `key` where it has one, else prompt and answer."""
    return row["key"] if "key" in row else digest([prompt_text(row["prompt"]), row["answer"]])


def filter_rows(
    rows: Dataset,
    verify: Callable[[str, Row], bool],
    generator: Generator,
    run_dir: str | Path,
    *,
    k: int = 4,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Judge every row by k rollouts and return the run's final metrics.

    A run directory that holds an unfinished filter of the same rows by the same model is resumed;
    a finished one is only read. Of rows with the same key one is judged. `batch_size` rows are
    generated at a time, and at most so many are judged again after a kill.

    Raises:
        ValueError: the directory holds a filter of other rows, another k or another model; or the
            generator returned something else than k texts for each row.
    """
    path, keys = Path(run_dir).resolve(), _keys(rows)
    judge = f"{verify.__module__}.{getattr(verify, '__qualname__', verify)}"
    facts = {"k": k, "verify": judge, "rows": len(rows), "data": fingerprint(keys)}
    facts |= generator.describe()
    _check_same(path, facts)
    if state_of(path) == "finished":
        return _summary(keys, read_verdicts(path))
    with Run.start(path, parameters=facts, if_exists="resume") as run:
        drop_torn_line(path / VERDICTS)
        done = read_verdicts(path)
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        todo = sorted(index for key, index in first.items() if key not in done)
        for start in range(0, len(todo), batch_size):
            batch = list(rows.select(todo[start : start + batch_size]))
            verdicts = _judge(batch, verify, generator, k)
            append_lines(path / VERDICTS, verdicts)
            done |= {line["key"]: line["right"] for line in verdicts}
            failed = sum(line["right"] == 0 for line in verdicts)
            run.log(len(done), {"judged": len(batch), "kept": failed})
        summary = _summary(keys, done)
        run.finish(summary)
    return summary


def read_verdicts(run_dir: str | Path) -> dict[str, int]:
    """Return how many rollouts of each row (by key) were right, as far as the filter has come."""
    file = Path(run_dir) / VERDICTS
    return (
        {line["key"]: line["right"] for line in read_lines(file, torn=True)}
        if file.exists()
        else {}
    )


def select_hard(rows: Dataset, *run_dirs: str | Path) -> Dataset:
    """Return the rows of which no rollout was right, by one or several finished filters.

    Raises:
        ValueError: a filter is not finished, or none of them has judged some row.
    """
    verdicts: dict[str, int] = {}
    for run_dir in run_dirs:
        if (state := state_of(Path(run_dir).resolve())) != "finished":
            raise ValueError(f"{run_dir}: the filter is {state or 'not there'}; run it to its end")
        verdicts |= read_verdicts(run_dir)
    keys = _keys(rows)
    if missing := [index for index, key in enumerate(keys) if key not in verdicts]:
        raise ValueError(
            f"{len(missing)} rows were not judged (first: {missing[:5]}); filter them too"
        )
    return rows.select([index for index, key in enumerate(keys) if verdicts[key] == 0])


def _keys(rows: Dataset) -> list[str]:
    """Name all rows without decoding an image."""
    if "key" in rows.column_names:
        return rows["key"][:]
    return [row_key(row) for row in rows.select_columns(["prompt", "answer"])]


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    if state_of(path) is None or not (path / "manifest.json").exists():
        return
    before = read_manifest(path)["parameters"]
    if changed := sorted(n for n in before.keys() | facts if before.get(n) != facts.get(n)):
        changes = ", ".join(f"{n}: {before.get(n)!r} -> {facts.get(n)!r}" for n in changed)
        raise ValueError(f"{path} holds another filter ({changes}); choose another run_dir")


def _judge(
    rows: list[Row], verify: Callable[[str, Row], bool], generator: Generator, k: int
) -> list[dict[str, Any]]:
    texts = generator.generate(rows, k)
    if [len(answers) for answers in texts] != [k] * len(rows):
        raise ValueError(
            f"the generator returned {[len(a) for a in texts]} texts for {len(rows)} rows; "
            f"expected {k} for each"
        )
    right = [sum(verify(t, row) for t in answers) for row, answers in zip(rows, texts, strict=True)]
    return [{"key": row_key(row), "right": n} for row, n in zip(rows, right, strict=True)]


def _summary(keys: list[str], verdicts: dict[str, int]) -> dict[str, Any]:
    judged = [verdicts[key] for key in keys if key in verdicts]
    kept = judged.count(0)
    mean = sum(judged) / len(judged) if judged else None
    return {"judged": len(judged), "kept": kept, "right_mean": mean}
