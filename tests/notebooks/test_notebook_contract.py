"""Notebooks are committed empty, short and free of definitions; families share their cells."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import NotebookMaker

from rlsd_lib.runs.parameters import read_parameters

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BASELINES = ("10_grpo", "11_opd", "12_opsd", "13_sdpo", "14_grpo_opsd", "15_rlsd", "16_credits")
# Tags of the cells that notebooks of one family do not share.
OWN_CELLS = {"parameters", "method-look"}
MAY_DEFINE = ("01_your_own_credit",)  # the reader's own function is its subject
LONGEST = 25
MOST_PARAMETERS = 8
FILE_NAME = re.compile(
    r"(^\.{1,2}/)|(^(outputs|notebooks|figures)/)"
    r"|\.(png|svg|pdf|json|jsonl|csv|txt|md|py|ipynb|ya?ml|pt|safetensors|gguf)$"
)


def violations(path: Path) -> list[str]:
    """What a notebook does that the contract forbids, one line each."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [*_kernel(notebook), *_parameters(path)]
    for number, cell in enumerate(code):
        found += [f"code cell {number}: {said}" for said in _cell(cell)]
    if path.stem in MAY_DEFINE:
        found = [said for said in found if ": a definition: def " not in said]
    return found


def _kernel(notebook: nbformat.NotebookNode) -> Iterator[str]:
    name = notebook.metadata.get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"kernel {name!r}, expected 'python3'"
    if "papermill" in notebook.metadata:
        yield "metadata of an execution"


def _parameters(path: Path) -> Iterator[str]:
    try:
        count = len(read_parameters(path))
    except ValueError as error:
        yield str(error)
        return
    if count > MOST_PARAMETERS:
        yield f"{count} parameters, at most {MOST_PARAMETERS}"


def _cell(cell: nbformat.NotebookNode) -> Iterator[str]:
    if cell.outputs:
        yield "outputs"
    if cell.execution_count is not None:
        yield "an execution count"
    if "papermill" in cell.metadata or "execution" in cell.metadata:
        yield "metadata of an execution"
    if len(cell.source.splitlines()) > LONGEST:
        yield f"{len(cell.source.splitlines())} lines, at most {LONGEST}"
    try:
        tree = ast.parse(cell.source)
    except SyntaxError as error:
        yield f"a magic, or no Python: {error.text and error.text.strip()}"
        return
    if "get_ipython" in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        yield "a magic: get_ipython"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"a definition: {ast.unparse(node).splitlines()[0]}"
    yield from _paths(tree)


def _paths(tree: ast.AST) -> Iterator[str]:
    """File names that stand alone; the right side of `folder / "name.png"` is no relative path."""
    joined = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        for part in ast.walk(node.right)
    }
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in joined and FILE_NAME.search(text):
            yield f"a relative path: {text!r}"


def shared_code(path: Path) -> list[str]:
    """The code cells that a notebook has in common with the others of its family."""
    cells = nbformat.read(path, as_version=4).cells
    return [
        cell.source
        for cell in cells
        if cell.cell_type == "code" and not OWN_CELLS & set(cell.metadata.get("tags", []))
    ]


def test_every_notebook_keeps_the_contract() -> None:
    assert len(NOTEBOOKS) > 10
    assert {path.stem: found for path in NOTEBOOKS if (found := violations(path))} == {}


def test_the_baselines_share_every_cell_but_their_own() -> None:
    first, *others = (FOLDER / f"{stem}.ipynb" for stem in BASELINES)
    for other in others:
        assert shared_code(other) == shared_code(first), f"{other.stem}: {first.stem}"
        assert list(read_parameters(other)) == list(read_parameters(first)), other.stem


def test_only_the_notebook_on_own_credit_defines_functions(make_notebook: NotebookMaker) -> None:
    cells = ("def f():\n    return 1", "class A:\n    pass")
    [a_class] = violations(make_notebook("01_your_own_credit", cells=cells))
    assert "a definition: class A" in a_class
    assert len(violations(make_notebook("16_credits", cells=cells))) == 2


LINK = re.compile(r"\]\(([^)#]+)\)")


def test_links_of_notebooks_and_their_manual_resolve() -> None:
    texts = {path.stem: "".join(_markdown(path)) for path in NOTEBOOKS}
    texts |= {name: (FOLDER / f"{name}.md").read_text() for name in ("README", "recipes")}
    for name, text in texts.items():
        for target in LINK.findall(text):
            found = (FOLDER / target).exists()
            assert target.startswith("https://") or found, f"{name}: {target}"


def _markdown(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def test_a_notebook_says_what_it_gives_needs_and_takes_and_where_to_go_on() -> None:
    for path in NOTEBOOKS:
        first, *_, last = _markdown(path)
        title, head, *_ = first.split("\n\n")
        assert title.startswith("# "), path.stem
        parts = re.fullmatch(
            r"\*\*You will know\*\* .+\. \*\*It needs\*\* .+\. "
            r"\*\*It takes\*\* .*minutes? on two cores.*\.",
            head,
        )
        assert parts, f"{path.stem}: {head}"
        _, _, after = last.partition("Next: ")
        assert LINK.search(after) and f"({path.name})" not in after, path.stem


def test_three_paths_lead_through_every_notebook() -> None:
    rows = (FOLDER / "README.md").read_text().split("\n\n")[1].splitlines()[2:]
    paths = [LINK.findall(row) for row in rows]
    assert len(paths) == 3
    assert {name for path in paths for name in path} == {
        "recipes.md",
        *(path.name for path in NOTEBOOKS),
    }


def test_every_exercise_of_a_lecture_has_an_answer_that_is_executed_and_folded_away() -> None:
    lectures = {path: 1 for path in NOTEBOOKS if "_theory_" in path.stem}
    others = {"00_tour": 4, "01_your_own_credit": 2, "02_from_grpo_to_rlsd": 2}
    lectures |= {FOLDER / f"{stem}.ipynb": least for stem, least in others.items()}
    assert len(lectures) == 13
    for path, least in lectures.items():
        cells = nbformat.read(path, as_version=4).cells
        exercises = [i for i, cell in enumerate(cells) if "**Exercise.**" in cell.source]
        answers = [i for i, cell in enumerate(cells) if "answer" in cell.metadata.get("tags", [])]
        assert len(exercises) >= least and answers == [i + 1 for i in exercises], path.stem
        for cell in (cells[i] for i in answers):
            assert cell.metadata["jupyter"]["source_hidden"] is True, path.stem
            assert cell.source.startswith("# the answer\n"), (
                f"{path.stem}: a folded cell shows its first line"
            )
            assert "assert " in cell.source and "\nanswer(" in cell.source, path.stem


def test_answers_of_01_are_not_about_the_function_that_a_reader_replaces() -> None:
    """Whatever a function takes: nobody calls `my_credit` by hand, and no assertion is of it."""
    cells = nbformat.read(FOLDER / "01_your_own_credit.ipynb", as_version=4).cells
    named = [
        cell.source for cell in cells if cell.cell_type == "code" and "my_credit" in cell.source
    ]
    assert len(named) == 2, "where it is defined, and where it stands among the credits"
    assert named[1].count("my_credit") == named[1].count('{"mine": my_credit, ') == 1


def test_each_curve_of_a_baseline_is_followed_by_a_sentence_of_its_run() -> None:
    for path in (FOLDER / f"{stem}.ipynb" for stem in BASELINES):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
        curves = [cell for cell in cells if "training_curve(" in cell]
        assert len(curves) == 2, path.stem
        for cell in curves:
            _, _, after = cell.partition("save_figure(")
            assert re.search(r"\bcourse\(|^Markdown\(f\"", after, re.MULTILINE), path.stem


def test_from_grpo_to_rlsd_are_two_names_and_a_column() -> None:
    """The lines that train, in the notebook's script and in its RLSD."""
    source = FOLDER / "02_from_grpo_to_rlsd.ipynb"
    cells = [cell.source for cell in nbformat.read(source, as_version=4).cells]
    [grpo], [rlsd] = ([c for c in cells if f"\n{name} = " in c] for name in ("grpo", "rlsd"))
    lines = re.compile(r"^(?:args|grpo|rlsd)(?: = |\.train).*", re.MULTILINE)
    renamed = lines.findall(grpo.replace("GRPO", "RLSD").replace("grpo", "rlsd"))
    more = (" **hidden,", ", callbacks=[viewer]")
    assert len(renamed) == 3 and all(part in rlsd for part in more)
    assert lines.findall(rlsd.replace(more[0], "").replace(more[1], "")) == renamed


def test_a_training_notebook_names_the_folder_of_its_runs() -> None:
    """By hand and by `rlsd run`, its runs lie in one place."""
    for path in (p for p in NOTEBOOKS if p.name[0] in "124"):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert set(re.findall(r'\bnotebook ?= ?"(\w+)"', code)) == {path.stem}


def test_a_collapsed_policy_is_told_and_measured(capsys) -> None:
    """A run that stopped here would be missing from every table, by its own outcome."""
    [checks] = [cell for cell in shared_code(FOLDER / "15_rlsd.ipynb") if "a step is mis" in cell]
    healthy = {"step": [1, 2], "loss": [0.1, 0.2], "reward": [0.5, 1.0], "entropy": [0.9, 0.8]}
    exec(checks, {"np": np, "steps": pd.DataFrame(healthy)})
    assert capsys.readouterr().out == ""
    exec(checks, {"np": np, "steps": pd.DataFrame({**healthy, "entropy": [0.9, 0.0]})})
    assert "The entropy fell to 0 nats" in capsys.readouterr().out
    broken = pd.DataFrame({**healthy, "entropy": [0.9, np.nan]})
    with pytest.raises(AssertionError, match="entropy is not finite"):
        exec(checks, {"np": np, "steps": broken})


# ---- the checks themselves can fail -----------------------------------------------------------


def _edited(path: Path, edit: Callable[[nbformat.NotebookNode], object]) -> Path:
    notebook = nbformat.read(path, as_version=4)
    edit(notebook)
    nbformat.write(notebook, path)
    return path


def test_a_clean_notebook_has_no_violations(make_notebook: NotebookMaker) -> None:
    clean = ("from rlsd_lib import Run", "metric = 'rlsd/lambda'", "run.path / f'{metric}.png'")
    assert violations(make_notebook(cells=clean)) == []


def test_each_forbidden_cell_is_found(make_notebook: NotebookMaker) -> None:
    for cell, said in (
        ("def f():\n    return 1", "a definition: def f"),
        ("class A:\n    pass", "a definition: class A"),
        ("%matplotlib inline", "no Python: %matplotlib"),
        ("!pip install torch", "no Python: !pip"),
        ("run?", "no Python: run?"),
        ("get_ipython().run_line_magic('time', '')", "a magic: get_ipython"),
        ("figure.savefig('gap.png')", "a relative path: 'gap.png'"),
        ("open('../data')", "a relative path: '../data'"),
        ("read('outputs/demo')", "a relative path: 'outputs/demo'"),
        ("\n".join("x = 1" for _ in range(26)), "26 lines, at most 25"),
    ):
        found = violations(make_notebook(cells=(cell,)))
        assert len(found) == 1, cell
        assert said in found[0], cell


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda nb: nb.cells[0].metadata.clear(), '0 cells tagged "parameters"'),
        (lambda nb: nb.cells.append(nb.cells[0]), '2 cells tagged "parameters"'),
        (lambda nb: nb.cells[0].update(source="eps: float = 2 * 0.1"), "name: type = literal"),
        (lambda nb: nb.cells[0].update(source="eps = 0.1"), "name: type = literal"),
        (
            lambda nb: nb.cells[0].update(source="\n".join(f"p{i}: int = 0" for i in range(9))),
            "9 parameters, at most 8",
        ),
        (lambda nb: nb.metadata.kernelspec.update(name="rlsd311"), "kernel 'rlsd311'"),
        (lambda nb: nb.cells[1].update(execution_count=3), "an execution count"),
        (
            lambda nb: nb.cells[1].outputs.append(
                nbformat.v4.new_output("stream", name="stdout", text="0.75")
            ),
            "outputs",
        ),
        (lambda nb: nb.metadata.update(papermill={"exception": True}), "of an execution"),
    ],
)
@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
def test_each_forbidden_notebook_is_found(
    make_notebook: NotebookMaker, edit: Callable[[nbformat.NotebookNode], object], said: str
) -> None:
    found = violations(_edited(make_notebook(cells=("x = 1",)), edit))
    assert any(said in line for line in found), found


def test_a_baseline_that_drifts_is_found(make_notebook: NotebookMaker) -> None:
    one, two = (make_notebook(name, cells=("x = 1", "x = 2")) for name in ("a", "b"))
    assert shared_code(one) == shared_code(two) == ["x = 1", "x = 2"]
    own = _edited(two, lambda nb: nb.cells[2].metadata.update(tags=["method-look"]))
    assert shared_code(own) == ["x = 1"]
    drifted = _edited(one, lambda nb: nb.cells[1].update(source="x = 3"))
    assert shared_code(drifted) == ["x = 3", "x = 2"]


def test_a_group_whose_rewards_agree_is_said_to_have_no_advantage(capsys) -> None:
    """Its pictures have no colour, and its second rollout is no failed one."""
    looks = [c for c in shared_code(FOLDER / "15_rlsd.ipynb") if "look_at_mixed()" in c]
    assert len(looks) == 2
    assert "prompts(first_look.problem)" in looks[0]  # not of another problem
    for look in looks:
        for worst, said in ((1.0, True), (0.0, False)):
            experiment = MagicMock()
            shown = {"question": "1+2", "problem": {}}
            group = [SimpleNamespace(reward=r, **shown) for r in (1.0, worst)]
            experiment.look_at_mixed.return_value = group
            drawn = {"side_by_side": lambda *_: ({}, ""), "rollout_heatmaps": lambda *_: {}}
            exec(look, {"experiment": experiment, **drawn})
            assert ("all rewards are 1: A is 0" in capsys.readouterr().out) is said
