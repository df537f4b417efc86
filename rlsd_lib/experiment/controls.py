"""Controls: what the teacher reads instead of the true reference.

A credit signal that survives a wrong reference does not come from the reference. Each control
changes what the teacher reads and nothing else, so it can be put on any method with a teacher
that sees the reference.
"""

import random
import string

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
    """Return `data` with its privileged column as `CONTROLS` says; ValueError where it cannot be."""
    if look_up(control, CONTROLS, "control") == "none":
        return data
    texts, rng = data[COLUMN][:], random.Random(seed)
    distinct = sorted(set(texts))
    changed = [_instead_of(text, control, distinct, rng) for text in texts]
    return data.remove_columns(COLUMN).add_column(COLUMN, changed)


def check_control(control: str, method: str) -> None:
    """Refuse by ValueError a control where no reference is read: it would only label the run."""
    look_up(control, CONTROLS, "control")
    sees = METHODS[look_up(method, METHODS, "method")].teacher_sees
    if control != "none" and sees != PRIVILEGED:
        fitting = [name for name, row in METHODS.items() if row.teacher_sees == PRIVILEGED]
        raise ValueError(
            f"control={control!r} means nothing for method={method!r}, whose teacher reads no "
            f"{COLUMN}. Leave it at 'none', or use one of {', '.join(fitting)}."
        )


def _instead_of(text: str, control: str, distinct: list[str], rng: random.Random) -> str:
    """Another text than `text`, one of the `distinct` references or made from it."""
    digits = [i for i, char in enumerate(text) if char.isdigit()]
    if control == "empty":
        return ""
    if control == "wrong" and digits:
        return _misprint(text, rng.choice(digits), rng)
    if control == "noise" and not any(map(str.isalnum, text)):
        raise ValueError(f"control='noise' needs a letter or a digit to change in {text!r}.")
    if control != "noise" and len(distinct) < 2:
        raise ValueError(f"control={control!r} needs at least two different references.")
    other = text
    while other == text:
        noise = control == "noise"
        other = "".join(_alike(char, rng) for char in text) if noise else rng.choice(distinct)
    return other


def _misprint(text: str, at: int, rng: random.Random) -> str:
    """`text` with another digit at one place."""
    # A number that begins with 0 would give itself away.
    leads = at == 0 and text[1:2].isdigit()
    kind = [char for char in string.digits if char != text[at] and not (leads and char == "0")]
    return text[:at] + rng.choice(kind) + text[at + 1 :]


def _alike(char: str, rng: random.Random) -> str:
    """A random digit for a digit, a random letter of the same case for a letter."""
    if not char.isalnum():
        return char
    letters = string.ascii_uppercase if char.isupper() else string.ascii_lowercase
    return rng.choice(string.digits if char.isdigit() else letters)
