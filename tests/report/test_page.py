"""The site shows each notebook as its newest finished run left it, and says which run that is."""

import html
import json
import re
from pathlib import Path

import nbformat
import pytest
from conftest import NotebookMaker

from rlsd_lib.__main__ import main
from rlsd_lib.report.page import FORMULA, MANUAL, _typeset
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.runs.records import write_json
from rlsd_lib.runs.run import Run


def _ran(source: Path, name: str, said: str, *, status: str = "finished", **manifest: str) -> None:
    """A run directory with an executed copy of `source`, whose cells have printed `said`."""
    given = {"seed": 0, "runs_dir": str(outputs_root() / "paper"), "real_dir": ""}
    run = Run.start(outputs_root() / "tiny" / name, parameters=given, notebook=source)
    copy = nbformat.read(source, as_version=4)
    for cell in copy.cells:
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=said)]
    copy.cells.insert(0, nbformat.v4.new_markdown_cell("[next](15_rlsd.ipynb) [no](11_opd.ipynb)"))
    for place, tag in ((2, "answer"), (3, "injected-parameters"), (4, "live")):
        copy.cells[place].metadata.tags = [tag]
    nbformat.write(copy, run.path / source.name)
    run.finish() if status == "finished" else run.fail("ValueError")
    write_json(run.path / "manifest.json", {**run.manifest, **manifest})


def test_the_site_shows_the_newest_finished_run_of_each_notebook(
    make_notebook: NotebookMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ("kept_secret", "injected", "slider")
    grpo, rlsd = (make_notebook(name, cells) for name in ("10_grpo", "15_rlsd"))
    _ran(grpo, "old", "of the old run", started="2026-01-01T10:00:00+00:00")
    _ran(
        grpo, "new", f"of the new run in {outputs_root()}/tiny", started="2026-01-02T10:00:00+00:00"
    )
    _ran(grpo, "failed", "of the failed run", status="failed", started="2026-01-03T10:00:00+00:00")
    _ran(rlsd, "alone", "of the only run", git={"commit": "f" * 40, "dirty": True})
    site = outputs_root() / "site"
    site.mkdir()
    (site / "41_gone.html").write_text("a page of an earlier site")
    assert main(["site"]) == 0
    assert str(site / "index.html") in capsys.readouterr().out

    pages = {file.stem: file.read_text() for file in site.glob("*.html")}
    assert set(pages) == {"index", "recipes", "10_grpo", "15_rlsd"}
    page = pages["10_grpo"]
    assert page.count("of the new run") == 2  # of the parameters and of the answer
    assert "of the old run" not in page and "of the failed run" not in page
    assert "run tiny/new, commit" in page and "2026-01-02T10:00 UTC" in page
    assert "commit fffffff, with changes" in pages["15_rlsd"]
    assert "slider" in page and "kept_secret" not in page and "injected" not in page
    assert '<a href="15_rlsd.html">next</a> no<' in page
    assert "UTC. runs_dir=paper</p>" in page, "a parameter without a value is not named"
    for name, text in pages.items():
        assert str(outputs_root()) not in text, name
        links = re.findall(r'(?:href|src)="([^"#]+)"', text)
        loaded = [link for link in links if not (site / link).exists()]
        assert all(link.startswith("https://") for link in loaded), name
        assert "<script" not in text, "a page needs no network"
    for name in ("10_grpo", "15_rlsd", "recipes"):
        assert f'href="{name}.html"' in pages["index"]


def test_formulas_are_mathml_and_code_is_not_a_formula() -> None:
    body = (
        '<p a="$1$">$P_S &lt; 1$ or</p>\n$$\\sum_t\n\\Delta_t$$<code>$x$</code><pre>$y$ $z$</pre>'
    )
    found = FORMULA.sub(_typeset, body)
    assert found.count("<math") == 2 and 'display="block"' in found
    for kept in ('a="$1$"', "<code>$x$</code>", "<pre>$y$ $z$</pre>", "&#x0003C;"):
        assert kept in found
    spent = r"<td>$5 and $6, $\frac$</td>"
    assert FORMULA.sub(_typeset, spent) == spent
    assert "<script" not in FORMULA.sub(_typeset, "$&lt;script&gt;$")
    for source in sorted(MANUAL.parent.glob("*.ipynb")):
        cells = json.loads(source.read_text())["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        text = html.escape(text, quote=False)  # as nbconvert leaves it
        assert "$" not in re.sub(r"<math.*?</math>|`[^`]*`", "", FORMULA.sub(_typeset, text)), (
            source
        )


def test_there_is_no_site_without_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    outputs_root().mkdir()
    assert main(["site"]) == 2
    assert "no finished run with its notebook" in capsys.readouterr().err
