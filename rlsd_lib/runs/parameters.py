"""The parameters of a notebook: read from its parameters cell, judged before anything runs."""

import ast
import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlsd_lib.names import nearest

_TYPES = {kind.__name__: kind for kind in (str, int, float, bool, dict, list)}
_TYPES["None"] = type(None)


class Parameter(NamedTuple):
    """One line of a notebook's parameters cell: `name: type = default`."""

    name: str
    types: tuple[type, ...]
    default: Any

    def accepts(self, value: Any) -> bool:
        """Whether a value fits the annotation; an int fits a float, a bool fits only bool."""
        return type(value) in self.types or (float in self.types and type(value) is int)


def read_parameters(source: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name.

    Raises:
        ValueError: there is not exactly one cell tagged "parameters", or a line in it is not
            `name: type = literal`.
    """
    tagged = [code for code, tags in _cells(source) if "parameters" in tags]
    if len(tagged) != 1:
        raise ValueError(f'{source.name}: {len(tagged)} cells tagged "parameters", expected one')
    return {p.name: p for p in (_parameter(source, line) for line in ast.parse(tagged[0]).body)}


def _cells(source: Path) -> list[tuple[str, list[str]]]:
    """Code and tags of each code cell; without nbformat, whose import takes a second."""
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in json.loads(source.read_text()).get("cells", [])
        if cell["cell_type"] == "code"
    ]


def _parameter(source: Path, line: ast.stmt) -> Parameter:
    match line:
        case ast.AnnAssign(target=ast.Name(name), annotation=kind, value=ast.expr() as value):
            with suppress(ValueError, KeyError):  # not a literal, or not a known type
                return Parameter(name, _types(kind), ast.literal_eval(value))
    raise ValueError(
        f"{source.name}, parameters cell: {ast.unparse(line)!r} is not `name: type = literal` "
        f"with a type of {', '.join(_TYPES)}, or several with `|`"
    )


def _types(annotation: ast.expr) -> tuple[type, ...]:
    match annotation:
        case ast.BinOp(left, _, right):
            return _types(left) + _types(right)
        case ast.Subscript(generic):  # dict[str, float] is checked as dict
            return _types(generic)
    return (_TYPES[ast.unparse(annotation)],)


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
    return {name: given.get(name, parameter.default) for name, parameter in declared.items()}


def unmet(source: Path, parameters: Mapping[str, Any]) -> list[str]:
    """What the notebook asserts of its parameters alone and does not hold, one line for each."""
    found = []
    for line in (line for code, _ in _cells(source) for line in ast.parse(code).body):
        names = {node.id for node in ast.walk(line) if isinstance(node, ast.Name)}
        if isinstance(line, ast.Assert) and names <= parameters.keys():
            test = ast.unparse(line.test)
            why = f" ({line.msg.value})" if isinstance(line.msg, ast.Constant) else ""
            if not eval(test, {}, dict(parameters)):  # as the notebook would
                found.append(
                    f"{source.name} is not for these parameters: {test} does not hold{why}"
                )
    return found


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
