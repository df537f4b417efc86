"""The parameters of a notebook: read from its parameters cell, judged before anything runs."""

import ast
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml

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
    from rlsd_lib.experiment.presets import (  # seconds: only for an error
        IDENTITY,
        OF_PRESET,
        override_types,
    )

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
