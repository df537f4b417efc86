"""Parameters: read from the notebook's cell, judged before anything runs, typed on a command line."""

import subprocess
from pathlib import Path

import nbformat
import pytest
from conftest import NotebookMaker

from rlsd_lib.__main__ import main
from rlsd_lib.runs import paths
from rlsd_lib.runs.execute import execute_notebook
from rlsd_lib.runs.parameters import (
    Parameter,
    as_text,
    complete,
    edited_defaults,
    parse_value,
    read_parameters,
)


def test_a_wrong_parameter_is_refused_before_anything_is_written(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    source = make_notebook()
    for given, error, message in (
        ({"sedd": 4}, ValueError, r"no parameter 'sedd' \(did you mean 'seed'\?\)"),
        ({"seed": "4"}, TypeError, "seed='4' is str, expected int"),
        ({"seed": True}, TypeError, "seed=True is bool, expected int"),
        ({"seed": 4.0}, TypeError, "seed=4.0 is float, expected int"),
        ({"overrides": [1]}, TypeError, "overrides=.* is list, expected dict"),
    ):
        with pytest.raises(error, match=message):
            execute_notebook(source, given, run_dir=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_parameters_cell_that_was_edited_is_told_and_not_silent(
    make_notebook: NotebookMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_notebook(cells=("1 + 1",))
    assert edited_defaults(source) == {}  # no checkout
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init"], ["add", source.name], ["commit", "-m", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
    assert edited_defaults(source) == {}
    source.write_text(source.read_text().replace("seed: int = 0", "seed: int = 3"))
    assert edited_defaults(source) == {"seed": (0, 3)}
    for pairs, is_said in (([], True), (["-p", "seed=5"], False)):
        assert main(["run", str(source), *pairs]) == 0
        said = capsys.readouterr().out
        assert ("tiny.ipynb: seed=3 by its parameters cell, committed: 0" in said) is is_said


def test_a_field_that_is_given_as_a_parameter_is_told_where_it_goes(
    make_notebook: NotebookMaker,
) -> None:
    told = r"no parameter 'epsilon_w'.*a field of RLSDConfig or of the preset goes into -p 'overr"
    with pytest.raises(ValueError, match=told + r"ides=\{\"epsilon_w\": 0\.5\}'"):
        complete(make_notebook(), {"epsilon_w": 0.5})
    with pytest.raises(ValueError) as refused:
        complete(make_notebook(parameters=("seed: int = 0",)), {"epsilon_w": 0.5})
    assert "overrides" not in str(refused.value)


def test_what_is_not_given_is_the_default_and_an_int_fits_a_float(
    make_notebook: NotebookMaker,
) -> None:
    source = make_notebook(parameters=("rate: float = 0.5", "limit: int = 3"))
    assert complete(source, {}) == {"rate": 0.5, "limit": 3}
    assert complete(source, {"rate": 1, "limit": 4}) == {"rate": 1, "limit": 4}
    with pytest.raises(TypeError, match="expected int"):
        complete(source, {"limit": "x"})


def test_a_parameters_cell_holds_annotated_literals_only(make_notebook: NotebookMaker) -> None:
    for line in (
        "seed = 0",
        "seed: int = 1 + 1",
        "seed: tensor = 0",
        "seed: int | None = 0",
        "import os",
    ):
        with pytest.raises(ValueError, match="is not `name: type = literal`"):
            read_parameters(make_notebook(parameters=(line,)))


def test_a_notebook_without_parameters_cell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    with pytest.raises(ValueError, match='0 cells tagged "parameters"'):
        execute_notebook(path)


def test_a_misspelt_notebook_names_the_nearest(
    make_notebook: NotebookMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    make_notebook("15_rlsd").rename(project / "notebooks" / "15_rlsd.ipynb")
    monkeypatch.chdir(project)
    assert paths.find_notebook("15_rlsd").name == "15_rlsd.ipynb"
    with pytest.raises(FileNotFoundError, match="did you mean '15_rlsd'"):
        paths.find_notebook("15_rsld")


def test_command_line_values() -> None:
    for text, value in (
        ("3", 3),
        ("1e-5", 1e-5),
        ("True", True),
        ("false", False),
        ("None", None),
        ("none", "none"),
        ("no", "no"),
        ("lab", "lab"),
        ("{}", {}),
        ('{"a": [1, null, "x"], "b": 1e-5}', {"a": [1, None, "x"], "b": 1e-5}),
        ("{'a': (1, None)}", {"a": (1, None)}),
    ):
        parsed = parse_value(text)
        assert (type(parsed), parsed) == (type(value), value), text
        assert parse_value(as_text(value)) == ({"a": [1, None]} if "(" in text else value), text


def test_text_stays_text_where_text_is_declared_and_bare_words_in_braces_are_refused() -> None:
    assert parse_value("007", Parameter("run_dir", str, "")) == "007"
    for text in ("{a: 1}", "[1, 2"):
        with pytest.raises(ValueError, match=r"neither JSON nor a Python literal.*in quotes"):
            parse_value(text)
