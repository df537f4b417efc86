"""Controls: what the teacher reads instead of the true reference.

A credit signal that survives a wrong reference does not come from the reference. Each control
changes what the teacher reads and nothing else, so it can be put on any method with a teacher
that sees the reference.
"""

import random
import string
from collections.abc import Callable

from datasets import Dataset

from rlsd_lib.methods import METHODS, PRIVILEGED
from rlsd_lib.names import look_up
from rlsd_lib.prompts import COLUMN

PLAIN_TEMPLATE = "{prompt}{privileged_context}"  # of the teacher under "empty"

CONTROLS: dict[str, str] = {
    "none": "the row's own reference",
    "shuffled": "the reference of another problem",
    "wrong": "the row's own reference with one digit changed; another row's if it has no digit",
    "noise": "random characters, as many as the reference has and of the same kind",
    "empty": "nothing, in a plain template: teacher and student see the same, the gap must be 0",
}


def apply_control(data: Dataset, control: str, seed: int) -> Dataset:
    """Return `data` with its privileged column replaced as `CONTROLS` says.

    Raises:
        ValueError: for an unknown control, or references that it cannot change.
    """
    if look_up(control, CONTROLS, "control") == "none":
        return data
    change = {
        "shuffled": _shuffled,
        "wrong": _wrong,
        "noise": lambda texts, rng: [_noise(text, rng) for text in texts],
        "empty": lambda texts, rng: [""] * len(texts),
    }[control]
    changed = change(data[COLUMN][:], random.Random(seed))
    return data.remove_columns(COLUMN).add_column(COLUMN, changed)


def check_control(control: str, method: str) -> None:
    """Refuse a control where the teacher reads no reference: it would only label the run.

    Raises:
        ValueError: for an unknown control or method, or naming both.
    """
    look_up(control, CONTROLS, "control")
    sees = METHODS[look_up(method, METHODS, "method")].teacher_sees
    if control != "none" and sees != PRIVILEGED:
        fitting = [name for name, row in METHODS.items() if row.teacher_sees == PRIVILEGED]
        raise ValueError(
            f"control={control!r} means nothing for method={method!r}, whose teacher reads no "
            f"{COLUMN}. Leave it at 'none', or use one of {', '.join(fitting)}."
        )


def _shuffled(texts: list[str], rng: random.Random) -> list[str]:
    """Another row's reference for every row, never one that reads the same."""
    distinct = sorted(set(texts))
    if len(distinct) < 2:
        raise ValueError("control='shuffled' needs at least two different references.")
    return [_another(text, lambda: rng.choice(distinct)) for text in texts]


def _wrong(texts: list[str], rng: random.Random) -> list[str]:
    others = _shuffled(texts, rng) if any(not _digits(text) for text in texts) else texts
    pairs = zip(texts, others, strict=True)
    return [_misprint(text, rng) if _digits(text) else other for text, other in pairs]


def _misprint(text: str, rng: random.Random) -> str:
    """`text` with one digit replaced by another."""
    at = rng.choice(_digits(text))
    # A number that begins with 0 would give itself away.
    leads = at == 0 and text[at + 1 : at + 2].isdigit()
    kind = [char for char in string.digits if char != text[at] and not (leads and char == "0")]
    return text[:at] + rng.choice(kind) + text[at + 1 :]


def _digits(text: str) -> list[int]:
    return [i for i, char in enumerate(text) if char.isdigit()]


def _noise(text: str, rng: random.Random) -> str:
    """Other characters of the same kinds; never the reference itself."""
    if not any(char.isalnum() for char in text):
        raise ValueError(f"control='noise' needs a letter or a digit to change in {text!r}.")
    return _another(text, lambda: "".join(_alike(char, rng) for char in text))


def _alike(char: str, rng: random.Random) -> str:
    """A random digit for a digit, a random letter of the same case for a letter."""
    if not char.isalnum():
        return char
    letters = string.ascii_uppercase if char.isupper() else string.ascii_lowercase
    return rng.choice(string.digits if char.isdigit() else letters)


def _another(text: str, draw: Callable[[], str]) -> str:
    while (other := draw()) == text:
        pass
    return other
