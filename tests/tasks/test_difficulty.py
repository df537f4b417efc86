"""The difficulty filter: what it keeps, that a kill changes nothing, and that it is a run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image as PillowImage

from rlsd_lib.runs.records import read_manifest, state_of
from rlsd_lib.tasks.difficulty import (
    VERDICTS,
    Sampling,
    TransformersGenerator,
    VLLMGenerator,
    filter_rows,
    read_verdicts,
    row_key,
    select_hard,
)
from rlsd_lib.tasks.encode import messages_of
from rlsd_lib.tasks.task import Row

HERE = Path(__file__).parent.parent
SAMPLING = Sampling(max_new_tokens=6)


def rows(count: int = 24) -> Dataset:
    return tiny.dataset(count, answer=[str(2 * i + 1) for i in range(count)])


def verify(completion: str, row: Row) -> bool:
    """Arbitrary, decided by the text, and right for about one text in five."""
    return sum(map(ord, completion + row["answer"])) % 5 == 0


def generator() -> TransformersGenerator:
    return TransformersGenerator(tiny.model(), tiny.tokenizer(), SAMPLING)


class Fixed:
    """Says 'yes' as often as the row's number asks for, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"generator": "fixed"}

    def generate(self, rows: Sequence[Row], k: int) -> list[list[str]]:
        self.asked += [row["answer"] for row in rows]
        return [["yes"] * (int(row["answer"]) // 2 % (k + 1)) + ["no"] * k for row in rows]


class Right(Fixed):
    def generate(self, rows: Sequence[Row], k: int) -> list[list[str]]:
        return [texts[:k] for texts in super().generate(rows, k)]


def says_yes(completion: str, row: Row) -> bool:
    return completion == "yes"


def test_only_rows_that_always_fail_are_kept(tmp_path: Path) -> None:
    data = rows()
    metrics = filter_rows(data, says_yes, Right(), tmp_path / "run", k=4, batch_size=7)
    hard = select_hard(data, tmp_path / "run")
    assert [int(a) // 2 for a in hard["answer"]] == [0, 5, 10, 15, 20]
    assert metrics == {"judged": 24, "kept": 5, "right_mean": pytest.approx(46 / 24)}


def test_a_filter_is_a_run(tmp_path: Path) -> None:
    filter_rows(rows(), says_yes, Right(), tmp_path / "run", batch_size=10)
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["status"], manifest["parameters"]["k"]) == ("finished", 4)
    assert manifest["parameters"]["generator"] == "fixed"
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [10, 20, 24]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["kept"] == 5


def test_a_finished_filter_is_not_repeated(tmp_path: Path) -> None:
    first, again = Right(), Right()
    assert filter_rows(rows(), says_yes, first, tmp_path / "run") == filter_rows(
        rows(), says_yes, again, tmp_path / "run"
    )
    assert (len(first.asked), again.asked) == (24, [])


def test_the_same_row_is_judged_once(tmp_path: Path) -> None:
    data, model = rows(), Right()
    twice = data.select([0, 1, 0, 1, 2])
    assert filter_rows(twice, says_yes, model, tmp_path / "run")["judged"] == 5
    assert model.asked == ["1", "3", "5"]
    assert len(select_hard(twice, tmp_path / "run")) == 2


def test_shards_are_put_together(tmp_path: Path) -> None:
    data = rows()
    for part in (0, 1):
        filter_rows(data.shard(2, part), says_yes, Right(), tmp_path / str(part))
    filter_rows(data, says_yes, Right(), tmp_path / "whole")
    hard = select_hard(data, tmp_path / "0", tmp_path / "1")
    assert hard["answer"][:] == select_hard(data, tmp_path / "whole")["answer"][:]


CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import test_difficulty as t
from rlsd_lib.tasks.difficulty import filter_rows
model = t.generator()
slow = model.generate
model.generate = lambda rows, k: (time.sleep(0.2), slow(rows, k))[1]
filter_rows(t.rows(), t.verify, model, sys.argv[2], k=3, batch_size=2)
"""


def test_a_killed_filter_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = filter_rows(rows(), verify, generator(), whole, k=3, batch_size=5)
    assert 0 < expected["kept"] < 24
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(HERE), str(killed)])
    while len(read_verdicts(killed)) < 6:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert state_of(killed) == "running/killed"
    before = read_verdicts(killed)
    assert 6 <= len(before) < 24
    with (killed / VERDICTS).open("a") as file:
        file.write('{"key": "cut o')  # as if the kill had come while writing
    model = generator()
    asked: list[str] = []
    draw = model.generate
    model.generate = lambda batch, k: (asked.extend(map(row_key, batch)), draw(batch, k))[1]
    assert filter_rows(rows(), verify, model, killed, k=3, batch_size=4) == expected
    assert not set(asked) & set(before)
    assert read_verdicts(killed) == read_verdicts(whole)
    assert read_manifest(killed)["resumed"]
    assert read_manifest(killed)["previous"][0]["attempt"] == 1


def test_an_error_leaves_a_failed_run_that_goes_on(tmp_path: Path) -> None:
    model = Fixed()  # returns too many texts
    with pytest.raises(ValueError, match="expected 4 for each"):
        filter_rows(rows(), says_yes, model, tmp_path / "run")
    assert state_of(tmp_path / "run") == "failed"
    with pytest.raises(ValueError, match="the filter is failed; run it to its end"):
        select_hard(rows(), tmp_path / "run")
    assert filter_rows(rows(), says_yes, Right(), tmp_path / "run")["judged"] == 24


def test_another_filter_is_not_continued(tmp_path: Path) -> None:
    filter_rows(rows(), says_yes, Right(), tmp_path / "run")
    with pytest.raises(ValueError, match="k: 4 -> 3"):
        filter_rows(rows(), says_yes, Right(), tmp_path / "run", k=3)
    with pytest.raises(ValueError, match="rows: 24 -> 23"):
        filter_rows(rows(23), says_yes, Right(), tmp_path / "run")
    with pytest.raises(ValueError, match="1 rows were not judged"):
        select_hard(rows(25), tmp_path / "run")
    with pytest.raises(ValueError, match="not there"):
        select_hard(rows(), tmp_path / "nowhere")


def test_a_row_is_answered_alike_in_any_company() -> None:
    data, model = list(rows(4)), generator()
    state = torch.random.get_rng_state()
    together = model.generate(data, 3)
    assert [model.generate([row], 3)[0] for row in reversed(data)] == together[::-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(len(set(texts)) > 1 for texts in together)
    other = TransformersGenerator(tiny.model(), tiny.tokenizer(), Sampling(6, seed=1))
    assert other.generate(data, 3) != together


def test_the_models_own_generation_config_has_no_say() -> None:
    data, opinionated = rows(4), generator()
    for name, value in {"repetition_penalty": 1.5, "min_p": 0.2, "top_k": 2}.items():
        setattr(opinionated.model.generation_config, name, value)
    assert opinionated.generate(data, 3) == generator().generate(data, 3)


def test_images_go_where_the_prompt_has_them() -> None:
    image = PillowImage.new("RGB", (2, 2))
    parts = [{"type": "text", "text": "a"}, {"type": "image", "text": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "images": [image], "key": "k"}
    (message,) = messages_of(row, "image_pil")
    assert message["content"] == [parts[0], {"type": "image_pil", "image_pil": image}]
    with pytest.raises(ValueError, match="row k has 0 images and 1 image parts"):
        messages_of({**row, "images": []}, "image")


def test_vllm_is_asked_for_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="use TransformersGenerator"):
        VLLMGenerator("any/model")


def test_vllm_gets_chats_and_a_seed_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace as Made

    calls: list[tuple] = []

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            calls.append((arguments,))

        def chat(self, chats: list, params: list, use_tqdm: bool) -> list:
            calls.append((chats, params))
            texts = [Made(text=str(n)) for n in range(params[0].n)]
            return [Made(outputs=texts) for _ in chats]

    def sampling_params(**arguments: Any) -> Made:
        return Made(**arguments)

    fake = Made(LLM=LLM, SamplingParams=sampling_params)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    model = VLLMGenerator("some/model", SAMPLING, tensor_parallel_size=2)
    data = list(rows(2))
    assert model.generate(data, 3) == [["0", "1", "2"]] * 2
    assert calls[0] == ({"model": "some/model", "tensor_parallel_size": 2},)
    chats, params = calls[1]
    assert chats == [row["prompt"] for row in data]
    assert [p.seed for p in params] == [SAMPLING.seed_of(row) for row in data]
    assert (params[0].max_tokens, params[0].n, params[0].temperature) == (6, 3, 1.0)
    assert model.describe()["engine"] == {"tensor_parallel_size": 2}
