"""Names and values that somebody typed: accepted, or refused with what was expected."""

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin

SHOWN = 40  # valid names that an error lists in full


def look_up(name: str, names: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `names`, else raise ValueError with the nearest of them."""
    names = list(names)
    if name in names:
        return name
    near = alike(name, names, count=4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) <= SHOWN:
        others = f" Valid: {', '.join(names)}."
    elif near:
        others = f" Also like it: {', '.join(near[1:])}." if near[1:] else ""
    else:
        others = f" None of the {len(names)} valid names is like it."
    raise ValueError(f"Unknown {what} {name!r}.{hint}{others}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the nearest valid name, or all of them."""
    known = list(known)
    like = alike(name, known)
    return f" (did you mean {like[0]!r}?)" if like else f" (valid: {', '.join(known) or 'none'})"


def alike(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """At most `count` names that `name` may have been meant for, the nearest first."""
    return difflib.get_close_matches(str(name), list(known), n=count, cutoff=cutoff)


class Named:
    """A base of classes that refuse an unknown keyword as `look_up` does, before `__init__`."""

    def __new__(cls, *args: Any, **given: Any) -> Any:
        known = inspect.signature(cls.__init__).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in known.values()):
            for name in given:
                look_up(name, list(known)[1:], f"argument of {cls.__name__}")
        return super().__new__(cls)


def check_fields(settings: Any) -> None:
    """Compare each field of a dataclass with its annotation.

    `Literal` lists the values that a field may have; `Annotated[type, test, expected]` has a function
    that is true of them, and says in words what it tests. Raises ValueError naming the field, its
    value and what was expected.
    """
    for f in fields(settings):
        value, kind = getattr(settings, f.name), get_origin(f.type)
        holds, expected = True, ""
        if kind is Literal:
            holds, expected = value in get_args(f.type), ", ".join(get_args(f.type))
        elif kind is Annotated:
            test, expected = f.type.__metadata__
            holds = test(value)
        if not holds:
            raise ValueError(f"{f.name}={value!r}: expected {expected}.")
