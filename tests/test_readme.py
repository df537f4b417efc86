"""The README's TRL example runs as written, with the tiny model in the place of the hub's."""

import re
from pathlib import Path

import tiny
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def example() -> str:
    return re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_example_is_short():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) < 20


def test_the_example_runs_as_written(tmp_path, monkeypatch):
    """The model id becomes a local folder that holds the tiny model; nothing else changes."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen3-0.6B"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    names: dict = {"__name__": "example"}
    exec(compile(example(), "README.md", "exec"), names)
    history = names["trainer"].state.log_history
    assert history[0]["rlsd/lambda"] == 0.5


def test_the_credit_function_blames_and_praises_as_the_teacher_says():
    names: dict = {}
    exec(re.search(r"```python\n(def mine.*?)\n\n", README, re.DOTALL)[1], names)
    verdicts, gap = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.0, -2.0]]).expand(2, 3)
    right, wrong = names["mine"](verdicts, gap, torch.ones(2, 3), lam=0.5)
    assert right[0] > right[1] == 1 > right[2] > 0
    assert 0 > wrong[0] > wrong[1] == -1 > wrong[2]


def test_every_method_and_room_is_in_the_readme():
    from rlsd_lib.methods import METHODS

    credits = (Path(__file__).parent.parent / "notebooks" / "16_credits.ipynb").read_text()
    for method in METHODS:
        assert f"`{method}`" in README, method
        assert f"| `{method}` |" in README + credits, method
    package = Path(__file__).parent.parent / "rlsd_lib"
    tree = README[README.index("\nrlsd_lib/ ") : README.index("\noutputs/ ")]
    rooms = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    top = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    for name in (*rooms, *top):
        assert f"  {name}" in tree, f"{name} is not in the tree"
    for path in package.glob("*/*.py"):
        if path.stem != "__init__" and path.parent.name != "theory":  # a file a statement there
            assert re.search(rf"\b{path.stem}\b", tree), f"{path.relative_to(package)}"


def test_every_link_leads_to_a_file_and_nothing_is_left_open():
    root = Path(__file__).parent.parent
    for page in (root / "README.md", root / "notebooks/README.md", root / "outputs/LOG.md"):
        folder, text = page.parent, page.read_text()
        assert "@@" not in text
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (folder / target).exists(), target


INTERVAL = re.compile(r"\[(?:x )?([-+]?\d+\.\d+),\s+([-+]?\d+\.\d+)\]")
DECIMAL = re.compile(r"(?<![\w.,\[])[-+]?\d+\.\d+(?![\w.])")


def agrees(ours: str, measured: str) -> bool:
    """Whether a number of the README is one that was measured, rounded to as many digits."""
    digits = len(ours.split(".")[1])
    return abs(float(ours) - float(measured)) <= 0.5001 * 10**-digits


def test_every_number_of_the_results_is_in_the_log_or_a_table():
    """An interval has both ends in one interval there; text beside each number names where."""
    outputs = Path(__file__).parent.parent / "outputs"
    pages = [outputs / "LOG.md", *(outputs / "tables").glob("*.md")]
    measured = "\n".join(page.read_text() for page in pages)
    results = README[README.index("## Results so far") : README.index("## The theory, checked")]
    intervals, decimals = set(INTERVAL.findall(measured)), set(DECIMAL.findall(measured))
    told = set(INTERVAL.findall(results))
    assert len(told) > 5
    for low, high in told:
        found = [a for a, b in intervals if agrees(low, a) and agrees(high, b)]
        assert found, f"[{low}, {high}] is in no table and not in the log"
    for number in set(DECIMAL.findall(INTERVAL.sub("", results))):
        known = [other for other in decimals if agrees(number.lstrip("+-"), other.lstrip("+-"))]
        assert known, f"{number} is in no table and not in the log"


def test_the_hardware_table_is_made_from_recorded_runs():
    from rlsd_lib.runs.machines import hardware_table

    table = hardware_table(Path(__file__).parent.parent / "outputs" / "tables" / "machines")
    assert f"<!-- rlsd table --machines -->\n{table}\n<!-- end of the table -->" in README
