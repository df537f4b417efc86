"""Strict papermill: a notebook and its parameters in, a finished run directory out.

papermill warns of an unknown parameter, takes any type, creates no folder and runs where the
caller stands. Here each of these is an error or is done.
"""

import ast
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from rlsd_lib.runs.provenance import default_run_dir, find_notebook, nearest, outputs_root
from rlsd_lib.runs.run import HANDED_ON, Run
from rlsd_lib.runtime.signals import on_sigterm, terminate_children

KERNEL = {
    "TQDM_DISABLE": "1",  # a bar in a saved notebook is a line per update
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # The executed copy must hold the figures, whatever backend the caller's shell has set.
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list}


class Parameter(NamedTuple):
    """One line of a notebook's parameters cell: `name: type = default`."""

    name: str
    types: tuple[type, ...]
    default: Any

    def accepts(self, value: Any) -> bool:
        """Whether a value fits the annotation; an int fits a float, a bool fits only bool."""
        if isinstance(value, bool):
            return bool in self.types
        return isinstance(value, self.types) or (float in self.types and isinstance(value, int))


class NotebookError(RuntimeError):
    """A cell raised, the kernel died, or the notebook never finished its run."""


class _OwnInterpreter(AsyncKernelManager):
    """The python3 kernel of this interpreter, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(["--IPKernelApp.log_level=ERROR"]))


def execute_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    run_dir: str | Path = "",
    if_exists: str = "raise",
) -> Path:
    """Run a notebook in a fresh kernel, inside its run directory; returns that directory.

    The executed copy is written there cell by cell and stays there when the notebook fails.

    Args:
        notebook: a path, or a name in the notebooks folder such as "15_rlsd".
        parameters: values for names of the notebook's parameters cell.
        run_dir: the run directory; "" means the default for these parameters.
        if_exists: "raise", "overwrite" or "resume", see `Run.start`.

    Raises:
        FileNotFoundError: there is no such notebook.
        ValueError: no parameters cell, or an unknown parameter.
        TypeError: a value does not fit its annotation.
        FileExistsError: the run directory is taken.
        NotebookError: a cell raised, the kernel died, or the notebook began a run and did not
            finish it; the run is marked failed.
    """
    source = find_notebook(notebook)
    declared = read_parameters(source)
    chosen = {**(parameters or {}), **({"run_dir": str(run_dir)} if run_dir else {})}
    check_parameters(source, declared, parameters or {})
    full = {**{p.name: p.default for p in declared.values()}, **chosen}
    folder = Path(full.get("run_dir") or default_run_dir(source.stem, full)).resolve()
    if "run_dir" in declared:
        chosen["run_dir"] = full["run_dir"] = str(folder)
    run = Run.start(folder, parameters=full, notebook=source, if_exists=if_exists)
    try:
        _run_cells(source, run, {k: v for k, v in chosen.items() if k in declared})
        _check_finished(run)
    except Exception as error:
        reason = _reason(error)
        run.fail(reason)
        raise NotebookError(f"{reason}; see {run.path / source.name}") from error
    except BaseException as error:  # interrupted: nobody will look for a reason in the notebook
        run.fail(type(error).__name__)
        raise
    run.close("finished")
    return run.path


def read_parameters(source: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name.

    Raises:
        ValueError: there is not exactly one cell tagged "parameters", or a line in it is not
            `name: type = literal`.
    """
    cells = nbformat.read(source, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f'{source.name}: {len(tagged)} cells tagged "parameters", expected one')
    found = [_parameter(source, line) for line in ast.parse(tagged[0].source).body]
    return {p.name: p for p in found}


def _parameter(source: Path, line: ast.stmt) -> Parameter:
    try:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            default = ast.literal_eval(line.value)
            return Parameter(line.target.id, _types(line.annotation), default)
    except (ValueError, KeyError):
        pass  # neither a literal nor a known type: the same answer as for any other line
    raise ValueError(
        f"{source.name}, parameters cell: {ast.unparse(line)!r} is not `name: type = literal` "
        f"with a type of {', '.join(_TYPES)}, or `| None`"
    )


def _types(annotation: ast.expr) -> tuple[type, ...]:
    if isinstance(annotation, ast.BinOp):
        return _types(annotation.left) + _types(annotation.right)
    if isinstance(annotation, ast.Subscript):  # dict[str, float] is checked as dict
        return _types(annotation.value)
    name = ast.unparse(annotation)
    return (type(None),) if name == "None" else (_TYPES[name],)


def check_parameters(
    source: Path, declared: Mapping[str, Parameter], given: Mapping[str, Any]
) -> None:
    """Refuse parameters that the notebook would ignore or cannot take.

    Raises:
        ValueError: a name that the notebook does not declare; the message names the nearest.
        TypeError: a value that does not fit its annotation.
    """
    for name, value in given.items():
        if name not in declared:
            hint = _as_override(name, value, declared) or nearest(name, declared)
            raise ValueError(f"{source.name} has no parameter {name!r}{hint}")
        if not declared[name].accepts(value):
            wanted = " or ".join(t.__name__ for t in declared[name].types)
            raise TypeError(
                f"{source.name}: {name}={value!r} is {type(value).__name__}, expected {wanted}"
            )


def unmet(source: Path, parameters: Mapping[str, Any]) -> list[str]:
    """What the notebook asserts of its parameters alone and does not hold, one line for each."""
    cells = [c.source for c in nbformat.read(source, as_version=4).cells if c.cell_type == "code"]
    lines = [line for cell in cells for line in _assertions(cell)]
    return [
        f"{source.name} is not for these parameters: {ast.unparse(line.test)} does not hold"
        + (f" ({line.msg.value})" if isinstance(line.msg, ast.Constant) else "")
        for line in lines
        if {n.id for n in ast.walk(line) if isinstance(n, ast.Name)} <= parameters.keys()
        and not _value(line.test, parameters)
    ]


def _assertions(cell: str) -> list[ast.Assert]:
    return [line for line in ast.parse(cell).body if isinstance(line, ast.Assert)]


def _value(test: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an assertion's test, which the notebook would compute as well."""
    return eval(compile(ast.Expression(test), "<assertion>", "eval"), {}, dict(names))


def _as_override(name: str, value: Any, declared: Mapping[str, Parameter]) -> str:
    """The hint for a field of the configuration that was given as a parameter; "" for others."""
    if "overrides" not in declared:
        return ""
    from rlsd_lib.presets import IDENTITY, OF_PRESET, override_types  # seconds: only for an error

    if name in IDENTITY or name not in override_types():
        return ""
    owner = "the preset" if name in OF_PRESET else "RLSDConfig"
    pair = f"overrides={json.dumps({name: value})}"
    return f": it is a field of {owner}. Set it with -p {shlex.quote(pair)}"


def parse_value(text: str, parameter: Parameter | None = None) -> Any:
    """A command-line value: True, False, None, numbers, YAML for {...} and [...], else text.

    A parameter that is declared as text alone takes the text as it is: `run_dir=007` stays 007.

    Raises:
        ValueError: braces or brackets that are not valid YAML.
    """
    words = {"True": True, "False": False, "true": True, "false": False, "None": None}
    if parameter is not None and parameter.types == (str,):
        return text
    if text in words:
        return words[text]
    if text[:1] in ("{", "["):
        return _parse_yaml(text)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-5 as a number; plain YAML 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not valid YAML: {error}") from error


def _run_cells(source: Path, run: Run, parameters: dict[str, Any]) -> None:
    import papermill  # a second to import: only when something runs

    handed = json.dumps({"run_dir": str(run.path), "attempt": run.attempt})
    # papermill formats its paths with the parameters, so a brace must be doubled to stay one.
    source_path, target = (
        str(p).replace("{", "{{").replace("}", "}}") for p in (source, run.path / source.name)
    )
    variables = {HANDED_ON: handed, "RLSD_OUTPUTS": str(outputs_root()), **KERNEL}
    told: list[str] = []

    def hand_on() -> None:  # the kernel may save and stop; its end then ends this run
        told.append("SIGTERM")
        terminate_children()

    with _environment(variables), _errors_only("papermill"), on_sigterm(hand_on):
        try:
            papermill.execute_notebook(
                source_path,
                target,
                parameters,
                kernel_name="python3",
                cwd=str(run.path),
                progress_bar=False,
                kernel_manager_class=_OwnInterpreter,
            )
        except Exception as error:
            reason = _reason(error)
            if told and not reason.startswith("Stopped: "):
                raise NotebookError(f"Stopped: SIGTERM outside of training ({reason})") from error
            raise


def _check_finished(run: Run) -> None:
    """A notebook that opens its run must also write its metrics; others need not open one."""
    if run.manifest["attached"] and not (run.path / "metrics.json").exists():
        raise NotebookError("the notebook ended without run.finish(metrics)")


def _reason(error: BaseException) -> str:
    """One line for the manifest: papermill's own message is a page with the traceback."""
    from papermill import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue} (in cell [{error.exec_count}])"
    if isinstance(error, NotebookError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    """Silence a library's warnings: what papermill warns of was checked before, and more."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for what is started inside, and put them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
