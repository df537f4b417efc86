"""Names that somebody typed: looked up, or refused with the nearest valid one."""

import difflib
from collections.abc import Iterable

SHOWN = 40  # valid names that an error lists in full


def look_up(name: str, names: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `names`.

    Raises:
        ValueError: naming the value, the nearest valid name, and all valid names or, where they are
            many, a few more like it.
    """
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


def alike(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """At most `count` names that `name` may have been meant for, the nearest first."""
    return difflib.get_close_matches(str(name), list(known), n=count, cutoff=0.5)
