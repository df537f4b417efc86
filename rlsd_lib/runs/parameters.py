"""The parameters of a notebook: read from its parameters cell, judged before anything runs."""

import ast
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlsd_lib.names import nearest
from rlsd_lib.runs.provenance import git

_TYPES = {kind.__name__: kind for kind in (str, int, float, bool, dict, list)}


class Parameter(NamedTuple):
    """One line of a notebook's parameters cell: `name: type = default`."""

    name: str
    kind: type
    default: Any

    def accepts(self, value: Any) -> bool:
        """Whether a value fits the annotation; an int fits a float, a bool fits only bool."""
        return type(value) is self.kind or (self.kind is float and type(value) is int)


def read_parameters(source: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name; ValueError for a cell that is none."""
    return _declared(source, source.read_text())


def edited_defaults(source: Path) -> dict[str, tuple[Any, Any]]:
    """Defaults that differ from git's HEAD, where it declares them: name -> (committed, now)."""
    committed = git(source.parent, "show", f"HEAD:./{source.name}")
    if committed is None:
        return {}
    before, now = _declared(source, committed), read_parameters(source)
    pairs = {name: (before[name].default, now[name].default) for name in now if name in before}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _declared(source: Path, text: str) -> dict[str, Parameter]:
    cells = json.loads(text)["cells"]  # nbformat takes a second to import
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f'{source.name}: {len(tagged)} cells tagged "parameters", expected one')
    return {p.name: p for p in (_parameter(source, line) for line in ast.parse(tagged[0]).body)}


def _parameter(source: Path, line: ast.stmt) -> Parameter:
    match line:
        case ast.AnnAssign(target=ast.Name(name), annotation=annotation, value=ast.expr() as value):
            with suppress(ValueError, KeyError):  # not a literal, or not a known type
                return Parameter(name, _TYPES[ast.unparse(annotation)], ast.literal_eval(value))
    raise ValueError(
        f"{source.name}, parameters cell: {ast.unparse(line)!r} is not `name: type = literal` "
        f"with a type of {', '.join(_TYPES)}"
    )


def complete(source: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every parameter of a notebook: those given, checked, and defaults for the rest.

    Raises ValueError for a name that the notebook does not declare, and names the nearest;
    TypeError for a value that does not fit its annotation.
    """
    declared = read_parameters(source)
    for name, value in given.items():
        if name not in declared:
            hint = nearest(name, declared)
            if "overrides" in declared:
                pair = shlex.quote(f"overrides={json.dumps({name: value}, default=str)}")
                hint += f"; a field of RLSDConfig or of the preset goes into -p {pair}"
            raise ValueError(f"{source.name} has no parameter {name!r}{hint}")
        if not declared[name].accepts(value):
            kinds = f"{type(value).__name__}, expected {declared[name].kind.__name__}"
            raise TypeError(f"{source.name}: {name}={value!r} is {kinds}")
    return {name: given.get(name, parameter.default) for name, parameter in declared.items()}


def parse_value(text: str, parameter: Parameter | None = None) -> Any:
    """A command-line value: JSON if it is JSON, else a Python literal if it is one, else text.

    A parameter that is declared as text alone takes the text as it is: `run_dir=007` stays 007.
    Raises ValueError for braces or brackets that are neither JSON nor a Python literal.
    """
    if parameter is not None and parameter.kind is str:
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    if text.startswith(("{", "[")):
        raise ValueError(
            f'{text!r} is neither JSON nor a Python literal: write {{"name": value}} or [1, 2], '
            "with names and text in quotes"
        )
    return text


def parse_pairs(
    pairs: Sequence[str], declared: Mapping[str, Parameter] | None = None
) -> dict[str, Any]:
    """Return `name=value` words as a dictionary; ValueError for a word without "=", or twice."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"-p {pair}: expected name=value")
        if name in found:
            raise ValueError(f"-p {name}: given twice")
        found[name] = parse_value(text, (declared or {}).get(name))
    return found


def as_text(value: Any) -> str:
    """A value as `parse_value` reads it back."""
    return value if isinstance(value, str) else json.dumps(value)
