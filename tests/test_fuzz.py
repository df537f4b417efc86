"""2,000 hostile files, rows, completions and values: refused clearly, or harmless; none silent."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlsd_lib import prompts
from rlsd_lib.runs.records import LOCK, read_runs
from rlsd_lib.runs.run import Run
from rlsd_lib.tasks import symbolic
from rlsd_lib.tasks.grading import TYPES, grade
from rlsd_lib.trainer import checkpoints

pytestmark = pytest.mark.slow
ENOUGH = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    tiny.trainer(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


@ENOUGH
@given(st.data())
def test_a_checkpoint_is_whole_or_refused(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    after = before[:place] + data.draw(st.binary(max_size=9))
    after += before[data.draw(st.integers(place, len(before))) :]
    file.write_bytes(after)
    same = after == before
    if file.name == checkpoints.MARK:  # white space between its values says nothing
        try:
            same = json.loads(after) == json.loads(before)
        except ValueError:
            same = False
    if same:
        checkpoints.check(folder)
    else:
        with pytest.raises(ValueError, match="begin anew") as refused:
            checkpoints.check(folder)
        assert file.name in str(refused.value)


@ENOUGH
@given(content=JSON.map(json.dumps) | st.text(), ours=st.booleans())
@example("null", True)
@example('{"status": "finished"}', True)
def test_a_manifest_is_a_runs_or_skipped_or_damaged(
    tmp_path: Path, content: str, ours: bool
) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "manifest.json").write_text(content, encoding="utf-8", errors="replace")
    (folder / "thesis.tex").write_text("years of work")
    if ours:
        (folder / LOCK).touch()
    found = read_runs(tmp_path).runs
    assert (found["status"].tolist() == ["damaged"]) if ours else found.empty
    for mode in ("raise", "overwrite", "resume"):
        with pytest.raises(FileExistsError, match=r"no run|already holds|damaged|has not written"):
            Run.start(folder, parameters={}, if_exists=mode)
    assert (folder / "thesis.tex").read_text() == "years of work"


PARTS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image", "x"]) | JSON, "text": JSON}
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "system"]) | JSON,
        "content": JSON | st.lists(PARTS),
    },
)


@ENOUGH
@given(prompt=JSON | st.lists(MESSAGES), context=JSON)
@example(prompt=[{"role": "user", "content": "x"}], context="\u200b")
@example(prompt=[{"role": "user", "content": [{"type": "text", "text": None}]}], context="1")
def test_a_row_is_refused_or_rendered(prompt: Any, context: Any) -> None:
    template = "{prompt}|{privileged_context}"
    try:
        prompts.check_prompts([prompt], template)
        prompts.check_contexts([context], template, {"</s>"})
        prompts.count_in_prompts([prompt], [context])
    except ValueError as refused:
        assert "rows 0" in str(refused)
        return
    assert context in prompts.prompt_text(prompts.teacher_prompt(prompt, context, template))


@ENOUGH
@given(
    completion=st.text() | st.text(alphabet="0123456789^{}\\frac.+-*/()_<>answer boxd,"),
    answer=st.sampled_from(["42", "yes", "B", "\\frac{1}{2}", "x=5"]),
    kind=st.sampled_from(sorted(TYPES)),
)
@example("10_2", "10", "math")
@example("1.5", "yes", "boolean")
@example("No idea", "no", "boolean")
def test_a_completion_gets_a_verdict(completion: str, answer: str, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symbolic, "SECONDS", 0.5)
        assert grade(completion, answer, kind) in (True, False)


@ENOUGH
@given(data=st.data())
def test_a_value_is_taken_or_refused_by_name(tmp_path: Path, data: st.DataObject) -> None:
    fields = ("lambda_init", "epsilon_w", "lambda_decay_steps", "teacher_sync_steps", "method")
    fields += ("teacher_model_kind", "distillation_topk", "learning_rate", "conserve_credit")
    fields += ("max_teacher_prompt_length", "privileged_template", "credit_settings", "max_steps")
    name, value = data.draw(st.sampled_from(fields)), data.draw(JSON)
    try:
        config = tiny.config(tmp_path, **{name: value})
    except (ValueError, TypeError) as refused:
        assert name in str(refused)
    else:
        assert getattr(config, name) == value
