"""The notebooks in JupyterLab, in a real browser, each run twice in a row: `pytest -m browser`.

With RLSD_SCREENSHOTS set to a folder, pictures of every notebook in both themes are left there.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
THEMES = ("JupyterLab Light", "JupyterLab Dark")
VIEW = {"width": 1280, "height": 900}
# What is opened: a notebook, or a copy of it, whose name goes on after the notebook's.
CASES = {
    "00_tour": {"preset": '"smoke"'},
    "01_your_own_credit": {"preset": '"smoke"', "steps": "2", "batches": "2", "problems": "4"},
    "15_rlsd": {"preset": '"smoke"'},
    "15_rlsd_on_the_lab": {"max_steps": "20"},
    "20_compare": {},
    "30_theory_leakage": {},
    "36_theory_drift": {},
}
DEMO = ("suite", "demo", "-p", "max_steps=20")  # what 20_compare shows: real runs, in minutes
RUN_ALL = "async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }"
CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"
TOP = "() => { for (const box of document.querySelectorAll('.jp-WindowedPanel-outer')) box.scrollTop = 0 }"
# What outputs do not fit on the page; a table's own box may scroll.
WIDE = """() => [...document.querySelectorAll('.jp-OutputArea-output')]
    .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText.slice(0, 60))"""
READY = """() => {
    const widget = window.jupyterapp?.shell?.currentWidget;
    return widget?.sessionContext?.session?.kernel?.status === 'idle';
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Debian's Chromium, through playwright; skipped where either is missing."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("no browser: chromium is not installed")
    with sync.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=THEMES, ids=["light", "dark"], scope="module")
def lab(request, tmp_path_factory, shared_outputs) -> Iterator[tuple[str, str, Path]]:
    """JupyterLab on a copy of the notebooks, which it may save: its address, theme and folder."""
    home = tmp_path_factory.mktemp("lab")
    notebooks = Path(shutil.copytree(FOLDER, home / "notebooks"))
    for name, parameters in CASES.items():
        [source] = [path for path in FOLDER.glob("*.ipynb") if name.startswith(path.stem)]
        write_parameters(shutil.copy(source, notebooks / f"{name}.ipynb"), parameters)
    chosen = home / "settings" / "@jupyterlab" / "apputils-extension"
    chosen.mkdir(parents=True)
    (chosen / "themes.jupyterlab-settings").write_text(json.dumps({"theme": request.param}))
    quiet = chosen / "notification.jupyterlab-settings"
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=")
    options += (f"--ServerApp.root_dir={notebooks}", "--LabApp.expose_app_in_browser=True")
    outputs = {"RLSD_OUTPUTS": str(shared_outputs)}
    where = {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    where |= {f"JUPYTER{part}_DIR": str(home / part) for part in ("_CONFIG", "LAB_WORKSPACES")}
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options],
            env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | outputs | where,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/api", home / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree", request.param, home
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def demo(shared_outputs) -> None:
    """The suite that `make demo` runs, shorter."""
    outputs = {"RLSD_OUTPUTS": str(shared_outputs)}
    subprocess.run([sys.executable, "-m", "rlsd_lib", *DEMO], env=os.environ | outputs, check=True)


def write_parameters(path: Path, parameters: dict[str, str]) -> None:
    """Edit the parameters cell as a reader would: `name: type = value`."""
    notebook = nbformat.read(path, as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    lines = cell.source.splitlines()
    for name, value in parameters.items():
        [place] = [i for i, line in enumerate(lines) if line.startswith(f"{name}:")]
        lines[place] = f"{lines[place].split(' =')[0]} = {value}"
    cell.source = "\n".join(lines)
    nbformat.write(notebook, path)


def wait_for(address: str, log: Path) -> None:
    for _ in range(120):
        try:
            urlopen(address)
            return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text())


def run_all(page, name: str) -> list[dict]:
    """Run every cell and return them; raises where one of them ended in an error."""
    page.evaluate(RUN_ALL)
    cells = page.evaluate(CELLS)
    outputs = [(i, o) for i, cell in enumerate(cells) for o in cell.get("outputs", [])]
    errors = [(i, o["ename"], o["evalue"]) for i, o in outputs if o["output_type"] == "error"]
    assert not errors, f"{name}: {errors}"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), f"{name}: a cell was not run"
    return cells


def draw_all(page) -> None:
    """Make the page so high that JupyterLab draws every cell of it."""
    page.set_viewport_size({"width": VIEW["width"], "height": 16000})
    page.evaluate(TOP)
    page.wait_for_timeout(3000)


def picture(page, name: str, theme: str) -> None:
    if folder := os.environ.get("RLSD_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        last = page.locator(".jp-Notebook .jp-Cell").last.bounding_box()
        clip = {"x": 0, "y": 0, "width": VIEW["width"], "height": last["y"] + last["height"]}
        page.screenshot(path=f"{folder}/{name}-{theme.split()[1].lower()}.png", clip=clip)


@pytest.mark.parametrize("name", CASES)
def test_a_notebook_runs_twice_in_a_row(name, browser, lab, request):
    if name == "20_compare":
        request.getfixturevalue("demo")
    address, theme, _ = lab
    page, problems = browser.new_page(viewport=VIEW), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.set_default_timeout(300_000)
    page.goto(f"{address}/{name}.ipynb?reset")
    page.wait_for_function(READY)
    run_all(page, name)
    cells = run_all(page, name)
    kinds = {kind for c in cells for o in c.get("outputs", []) for kind in o.get("data", {})}
    assert "image/png" in kinds, "no figure"
    if name == "00_tour":
        check_sliders(page)
    draw_all(page)
    assert not (wide := page.evaluate(WIDE)), f"wider than the page: {wide}"
    picture(page, name, theme)
    assert not problems, problems
    page.close()


def check_sliders(page) -> None:
    """Moving epsilon_w recolours the heat map under the sliders."""
    page.locator(".widget-slider").first.scroll_into_view_if_needed()
    shown = page.locator(".widget-vbox .rlsd-heat div")
    before = shown.inner_html()
    page.locator(".widget-slider .widget-readout").nth(1).fill("4")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "before => document.querySelector('.widget-vbox .rlsd-heat div').innerHTML != before",
        arg=before,
    )
