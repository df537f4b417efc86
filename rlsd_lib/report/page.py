"""From executed notebooks to static pages: one of a suite, or a site of all that were run.

A suite's page is `20_compare`, executed over its runs, without its code. Figures are inside and
formulas are MathML: nothing is loaded from elsewhere.
"""

import html
import re
from datetime import UTC, datetime
from pathlib import Path

from latex2mathml.converter import convert

from rlsd_lib.report.tables import settings_of
from rlsd_lib.runs.execute import execute_notebook
from rlsd_lib.runs.paths import REPOSITORY, outputs_root
from rlsd_lib.runs.records import described, is_finished, read_runs, runs_folder

NOTEBOOK = "20_compare"
# Folders beside the suite's that the claims table also needs, by the notebook's parameter.
BESIDE = {"real_dir": "smollm2", "ablations_dir": "ablations"}
MANUAL = REPOSITORY / "notebooks" / "README.md"
NOT_SHOWN = {"remove_input_tags": ["answer"], "remove_all_outputs_tags": ["live"]}
NOT_SHOWN |= {"remove_cell_tags": ["injected-parameters"]}  # of the run, which the page names
LINK = re.compile(r'<a href="(\w+)\.(?:ipynb|md)">(.*?)</a>')
# A formula of a page, or what holds none: code, and what stands in a tag.
FORMULA = re.compile(
    r"<(pre|code|style|svg)\b.*?</\1>|<[^>]*>|\$\$([^$]+)\$\$|\$(?!\s)([^$<\n]+)(?<!\s)\$",
    re.DOTALL,
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 Georgia, serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
p, ul {{ max-width: 62rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font: 12px/1.4 sans-serif; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .4rem; text-align: left; overflow-wrap: break-word; }}
pre {{ font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }} .highlight {{ background: #f6f6f6; }} ul {{ font-size: 12px; color: #444; }}
img {{ max-width: 100%; }} a.anchor-link {{ display: none; }} .about, caption {{ color: #666; }}
</style></head>
<body>
<p class="about">{about}</p>
{body}
</body>
</html>
"""


def write_report(suite_or_folder: str | Path) -> Path:
    """Make the page of a suite's runs, or of any folder of runs; returns the file.

    It lies in a run directory of its own, outputs/reports/<name>, with the executed notebook and
    every figure. The claims table also reads the folders `smollm2` and `ablations` beside the
    suite's where there are any. Raises FileNotFoundError if there is no such folder; ValueError if
    no run in it has finished; NotebookError if a cell of the notebook raised.
    """
    folder = runs_folder(suite_or_folder)
    runs = read_runs(folder)
    if not is_finished(runs.runs).any():
        raise ValueError(f"{folder}: no finished run to report on")
    beside = {name: folder.parent / other for name, other in BESIDE.items()}
    given = {name: str(path) for name, path in beside.items() if path.is_dir() and path != folder}
    given["runs_dir"] = str(folder)
    target = outputs_root() / "reports" / folder.name
    execute_notebook(NOTEBOOK, given, run_dir=target, if_exists="overwrite")
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = f"Made {when} by rlsd report {folder.name}. {described(runs)}"
    title = f"RLSD workbook: {folder.name}"
    body = LINK.sub(r"\2", _body(target / f"{NOTEBOOK}.ipynb", exclude_input=True))
    body = FORMULA.sub(_typeset, body)
    file = target / "report.html"
    file.write_text(PAGE.format(title=html.escape(title), about=html.escape(about), body=body))
    return file


def write_site() -> Path:
    """Write a page of each notebook, as its newest finished run left it, and an index; returns that.

    They replace the pages in outputs/site. The index is the beginning of the notebooks' manual; of a
    link to a notebook without a finished run the words are kept. Raises FileNotFoundError if there
    are no outputs yet; ValueError if there is no finished run with an executed notebook.
    """
    shown = _newest()
    if not shown:
        raise ValueError(f"{outputs_root()}: no finished run with its notebook; rlsd run one first")
    from nbconvert.filters import markdown2html  # half a second to import

    start = MANUAL.read_text().partition("\n## ")[0]
    rows = [f"- [{name}]({name}.ipynb): {about}" for name, (_, about) in shown.items()]
    pages = {name: _body(copy) for name, (copy, _) in shown.items()}
    pages["index"] = markdown2html("\n".join([start, "## The runs\n", *rows]))
    pages["recipes"] = markdown2html(MANUAL.with_name("recipes.md").read_text())
    site = outputs_root() / "site"
    site.mkdir(exist_ok=True)
    for old in site.glob("*.html"):
        old.unlink()
    for name, body in pages.items():
        body = LINK.sub(lambda link: link[0] if link[1] in pages else link[2], body)
        body = FORMULA.sub(_typeset, LINK.sub(r'<a href="\1.html">\2</a>', body))
        about = html.escape(shown[name][1]) if name in shown else ""
        page = PAGE.format(title=name, about=about, body=body)
        # A published page says nothing of the machine it was made on.
        (site / f"{name}.html").write_text(page.replace(f"{outputs_root()}/", ""))
    return site / "index.html"


def _newest() -> dict[str, tuple[Path, str]]:
    """By notebook the copy that its newest finished run has left, and which run that is."""
    found, runs = {}, read_runs(outputs_root()).runs
    done = runs[is_finished(runs)].to_dict("records")
    for run in sorted(done, key=lambda run: run["started"]):
        copy = Path(run["path"]) / str(run["notebook"])
        if copy.exists():  # a kernel of JupyterLab leaves none
            commit = str(run["commit"])[:7] + (", with changes" if run["dirty"] else "")
            about = f"{run['group']}/{run['name']}, commit {commit}, {run['started'][:16]} UTC"
            given = settings_of({k: v for k, v in run["parameters"].items() if v != ""})
            found[copy.stem] = copy, f"run {about}. {given}"
    return dict(sorted(found.items()))


def _body(notebook: Path, **options: bool) -> str:
    """An executed notebook as HTML, without prompts, code of answers, and what needs a kernel."""
    from nbconvert import HTMLExporter, preprocessors  # half a second to import

    prompts = dict.fromkeys(("exclude_input_prompt", "exclude_output_prompt"), True)
    exporter = HTMLExporter(template_name="basic", **prompts, **options)
    exporter.register_preprocessor(preprocessors.TagRemovePreprocessor(**NOT_SHOWN), enabled=True)
    return exporter.from_filename(str(notebook))[0]


def _typeset(found: re.Match[str]) -> str:
    """What `FORMULA` found, LaTeX as MathML."""
    _, block, inline = found.groups()
    if block is None and inline is None:
        return found[0]
    try:
        return convert(html.unescape(block or inline), display="block" if block else "inline")
    except Exception:  # what a model wrote between two dollars need not be LaTeX
        return found[0]
