"""The parameters of a notebook: read from its parameters cell, judged before anything runs."""

import ast
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlsd_lib.names import nearest

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


def read_parameters(source: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name.

    Raises:
        ValueError: there is not exactly one cell tagged "parameters", or a line in it is not
            `name: type = literal`.
    """
    tagged = [code for code, tags in _cells(source) if "parameters" in tags]
    if len(tagged) != 1:
        raise ValueError(f'{source.name}: {len(tagged)} cells tagged "parameters", expected one')
    found = [_parameter(source, line) for line in ast.parse(tagged[0]).body]
    return {p.name: p for p in found}


def _cells(source: Path) -> list[tuple[str, list[str]]]:
    """Code and tags of each code cell; without nbformat, whose import takes a second."""
    cells = json.loads(source.read_text()).get("cells", [])
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


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


def complete(source: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every parameter of a notebook: those given, checked, and defaults for the rest.

    Raises:
        ValueError: a name that the notebook does not declare; the message names the nearest.
        TypeError: a value that does not fit its annotation.
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
            wanted = " or ".join(t.__name__ for t in declared[name].types)
            raise TypeError(
                f"{source.name}: {name}={value!r} is {type(value).__name__}, expected {wanted}"
            )
    return {**{p.name: p.default for p in declared.values()}, **given}


def unmet(source: Path, parameters: Mapping[str, Any]) -> list[str]:
    """What the notebook asserts of its parameters alone and does not hold, one line for each."""
    asserted = [
        line
        for code, _ in _cells(source)
        for line in ast.parse(code).body
        if isinstance(line, ast.Assert)
        and {n.id for n in ast.walk(line) if isinstance(n, ast.Name)} <= parameters.keys()
    ]
    return [
        f"{source.name} is not for these parameters: {ast.unparse(line.test)} does not hold"
        + (f" ({line.msg.value})" if isinstance(line.msg, ast.Constant) else "")
        for line in asserted
        if not eval(ast.unparse(line.test), {}, dict(parameters))  # as the notebook would
    ]


def parse_value(text: str, parameter: Parameter | None = None) -> Any:
    """A command-line value: JSON if it is JSON, else a Python literal if it is one, else text.

    A parameter that is declared as text alone takes the text as it is: `run_dir=007` stays 007.

    Raises:
        ValueError: braces or brackets that are neither JSON nor a Python literal.
    """
    if parameter is not None and parameter.types == (str,):
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


def as_text(value: Any) -> str:
    """A value as `parse_value` reads it back."""
    return value if isinstance(value, str) else json.dumps(value)
