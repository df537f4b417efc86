"""One self-contained page per suite: `20_compare`, executed over its runs, without its code.

Figures are inside the page and nothing is loaded from elsewhere, so the file can be sent as it is.
"""

import html
from datetime import UTC, datetime
from pathlib import Path

from rlsd_lib.runs.execute import execute_notebook
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.runs.records import described, is_finished, read_runs, runs_folder

NOTEBOOK = "20_compare"
# Folders beside the suite's that the claims table also needs, by the notebook's parameter.
BESIDE = {"real_dir": "smollm2", "ablations_dir": "ablations"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 Georgia, serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
p, ul {{ max-width: 62rem; }}
table {{ border-collapse: collapse; font: 12px/1.4 sans-serif; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .4rem; text-align: left; overflow-wrap: break-word; }}
pre {{ font-size: 12px; white-space: pre-wrap; }} ul {{ font-size: 12px; color: #444; }}
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
    suite's where there are any.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no run in it has finished.
        NotebookError: a cell of the notebook raised.
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
    from nbconvert import HTMLExporter  # half a second to import

    hidden = ("exclude_input", "exclude_input_prompt", "exclude_output_prompt")
    exporter = HTMLExporter(template_name="basic", **dict.fromkeys(hidden, True))
    body, _ = exporter.from_filename(str(target / f"{NOTEBOOK}.ipynb"))
    file = target / "report.html"
    file.write_text(PAGE.format(title=html.escape(title), about=html.escape(about), body=body))
    return file
