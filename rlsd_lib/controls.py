"""Controls: what the teacher is shown instead of the true reference.

A credit signal that survives a wrong reference does not come from the reference. Each control
changes the `privileged_context` column only, so it can be put on any method.
"""

import random
import string

from datasets import Dataset

from rlsd_lib.config import look_up
from rlsd_lib.privileged import COLUMN

PLAIN_TEMPLATE = "{prompt}{privileged_context}"

CONTROLS: dict[str, str] = {
    "none": "the row's own reference",
    "shuffled": "the reference of another problem",
    "wrong": "the row's own reference with one digit or letter changed",
    "noise": "random characters, as many as the reference has and of the same kind",
    "empty": "nothing, in a plain template: teacher and student see the same, the gap must be 0",
}


def apply_control(data: Dataset, control: str, seed: int) -> Dataset:
    """Return `data` with its privileged column replaced as `CONTROLS` says.

    Raises:
        ValueError: for an unknown control, or for "shuffled" when all references are equal.
    """
    look_up(control, CONTROLS, "control")
    if control == "none":
        return data
    rng = random.Random(seed)
    texts = data[COLUMN][:]
    changed = {
        "shuffled": _shuffled,
        "wrong": lambda texts, rng: [_wrong(text, rng) for text in texts],
        "noise": lambda texts, rng: [_noise(text, rng) for text in texts],
        "empty": lambda texts, rng: [""] * len(texts),
    }[control](texts, rng)
    return data.remove_columns(COLUMN).add_column(COLUMN, changed)


def control_template(control: str, template: str | None) -> str | None:
    """The template of a run under a control: plain for "empty", the task's own otherwise."""
    return PLAIN_TEMPLATE if control == "empty" else template


def _shuffled(texts: list[str], rng: random.Random) -> list[str]:
    """Another row's reference for every row, never one that reads the same."""
    if len(set(texts)) < 2:
        raise ValueError("control='shuffled' needs at least two different references.")
    return [rng.choice([other for other in _pick(texts, rng) if other != text]) for text in texts]


def _pick(texts: list[str], rng: random.Random, tries: int = 64) -> list[str]:
    """Candidates for one row: a small sample, and every reference should those all be equal."""
    sample = rng.choices(texts, k=tries)
    return sample if len(set(sample)) > 1 else texts


def _wrong(text: str, rng: random.Random) -> str:
    """`text` with one character replaced by another of its kind, digits first."""
    places = [i for i, char in enumerate(text) if char.isdigit()]
    places = places or [i for i, char in enumerate(text) if char.isalpha()]
    if not places:
        raise ValueError(f"control='wrong' needs a digit or a letter to change in {text!r}.")
    at = rng.choice(places)
    # A number that begins with 0 would give itself away.
    leads = at == 0 and text[at + 1 : at + 2].isdigit()
    kind = [char for char in _kind(text[at]) if char != text[at] and not (leads and char == "0")]
    return text[:at] + rng.choice(kind) + text[at + 1 :]


def _noise(text: str, rng: random.Random) -> str:
    return "".join(rng.choice(_kind(char)) if char.isalnum() else char for char in text)


def _kind(char: str) -> str:
    """Digits, or letters of the same case."""
    if char.isdigit():
        return string.digits
    return string.ascii_uppercase if char.isupper() else string.ascii_lowercase
