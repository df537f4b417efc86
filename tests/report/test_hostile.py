"""What a model or a run says is shown as text: no tag of it reaches a page, and none is lost."""

import ast
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

import rlsd_lib.experiment.experiment  # noqa: F401  (sets how notebooks show text)
from rlsd_lib.experiment.presets import RunParameters
from rlsd_lib.report.page import PAGE
from rlsd_lib.report.tables import make_table, readable
from rlsd_lib.runs.paths import default_run_dir
from rlsd_lib.runs.records import read_runs
from rlsd_lib.runs.run import Run

HOSTILE = (
    "<script>document.title = 1</script>",
    "<answer>42</answer>",
    "<img src=x onerror=document.title=2>",
    "![x](https://x.y/z.png)",
    "[click](javascript:alert(1))",
    "a | b",
    "</td></table><svg onload=document.title=3>",
    "&lt;b&gt;",
)
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        # An address that stands in a text may be a link.
        harmless = tag == "a" and all(v.startswith("http") for k, v in attrs if k == "href")
        self.tags |= set() if harmless else {tag}

    def handle_data(self, data: str) -> None:
        self.text += data


def cells(notebook: Path) -> list[str]:
    content = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in content if cell["cell_type"] == "code"]


def safe(page: str) -> str:
    found = Tags(page)
    assert not found.tags & {"script", "answer", "img", "a", "svg", "b"}, found.tags
    return found.text


def opened_in_a_browser(file: Path, body: str) -> None:
    """Where there is one, it runs no script of the page, and shows the texts."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    file.write_text(PAGE.format(title="quiet", about="", body=body))
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{file}"]
    dom = subprocess.run([browser, *how], capture_output=True, text=True, timeout=60).stdout
    assert "<title>quiet</title>" in dom, "a script has changed the title"
    assert all(text in safe(dom.partition("<body>")[2]) for text in HOSTILE)


def test_tables_and_the_list_of_runs_show_names_and_reasons_as_text(tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        parameters = {"method": text, "preset": text, "seed": number, "overrides": {text: text}}
        run = Run.start(default_run_dir("hostile", parameters), parameters=parameters)
        if number % 2:
            run.finish({"accuracy_after": 0.5})
        else:
            run.fail(text)
    runs = read_runs(tmp_path / "outputs")
    table = make_table(runs)
    assert all(
        line.count(" | ") == table.markdown().splitlines()[0].count(" | ")
        for line in table.markdown().splitlines()
        if line.startswith("|")
    )
    page = table._repr_html_()
    shown = safe(page)
    assert all(text in shown for text in HOSTILE[1::2])
    (source,) = (cell for cell in cells(NOTEBOOKS / "20_compare.ipynb") if "listed" in cell)
    tree, names = ast.parse(source), {"runs": runs, "readable": readable}
    last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, "cell", "exec"), names)
    page += eval(compile(last, "cell", "eval"), names).to_html()
    shown = safe(page)
    assert all(text in shown for text in HOSTILE)
    opened_in_a_browser(tmp_path / "report.html", page)


def test_what_student_and_teacher_read_is_shown_as_text() -> None:
    frame = pd.Series(dict(enumerate(HOSTILE)), name="test problem 0").to_frame()
    shown = safe(frame.style.set_properties(**{"white-space": "pre-wrap"}).to_html())
    assert all(text in shown for text in HOSTILE)
    formatted = [
        cell
        for notebook in NOTEBOOKS.glob("*.ipynb")
        for cell in cells(notebook)
        if re.search(r"(\.style\b[^\n]*|\bshown)\.format\(", cell)
    ]
    assert formatted
    assert all("escape=" in cell for cell in formatted)


def test_no_name_leads_out_of_its_folder_and_no_token_is_written_down(tmp_path: Path) -> None:
    for method in ("..", "../..", ".", "/etc"):
        folder = default_run_dir("suite", {"method": method})
        assert folder.resolve().parent == tmp_path / "outputs" / "suite", method
    with pytest.raises(ValueError, match="'hub_token': it would stand in the manifest"):
        RunParameters("rlsd", "smoke", overrides={"hub_token": "hf_secret"}).resolve()
