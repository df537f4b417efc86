"""Controls: what the teacher is shown instead of the true reference.

A credit signal that survives a wrong reference does not come from the reference. Each control
changes what the teacher is shown and nothing else, so it can be put on any method with a teacher
that sees the reference.
"""

import random
import string
from typing import Any

from datasets import Dataset

from rlsd_lib.methods import METHODS, PRIVILEGED
from rlsd_lib.names import look_up
from rlsd_lib.prompts import COLUMN

PLAIN_TEMPLATE = "{prompt}{privileged_context}"

CONTROLS: dict[str, str] = {
    "none": "the row's own reference",
    "shuffled": "the reference of another problem",
    "wrong": "the row's own reference with one digit changed; another row's if it has no digit",
    "noise": "random characters, as many as the reference has and of the same kind",
    "empty": "nothing, in a plain template: teacher and student see the same, the gap must be 0",
    "peer": "a successful rollout of the same group, as SDPO shows; nothing where there is none",
}


def apply_control(data: Dataset, control: str, seed: int) -> Dataset:
    """Return `data` with its privileged column replaced as `CONTROLS` says.

    Raises:
        ValueError: for an unknown control, or references that it cannot change.
    """
    look_up(control, CONTROLS, "control")
    if control in ("none", "peer"):  # peers are known when rollouts are: see `control_overrides`
        return data
    rng = random.Random(seed)
    texts = data[COLUMN][:]
    changed = {
        "shuffled": _shuffled,
        "wrong": _wrong,
        "noise": lambda texts, rng: [_noise(text, rng) for text in texts],
        "empty": lambda texts, rng: [""] * len(texts),
    }[control](texts, rng)
    return data.remove_columns(COLUMN).add_column(COLUMN, changed)


def check_control(control: str, method: str) -> None:
    """Refuse a control where the teacher reads no reference: it would only label the run.

    Raises:
        ValueError: for an unknown control or method, or naming both.
    """
    look_up(control, CONTROLS, "control")
    sees = METHODS[look_up(method, METHODS, "method")].teacher_sees
    if control not in ("none", "peer") and sees != PRIVILEGED:  # a peer has `RLSDConfig`
        fitting = [name for name, row in METHODS.items() if row.teacher_sees == PRIVILEGED]
        raise ValueError(
            f"control={control!r} means nothing for method={method!r}, whose teacher reads no "
            f"{COLUMN}. Leave it at 'none', or use one of {', '.join(fitting)}."
        )


def control_overrides(control: str) -> dict[str, Any]:
    """The `RLSDConfig` fields that a control sets. Raises ValueError for an unknown control."""
    return {"peer_context": True} if look_up(control, CONTROLS, "control") == "peer" else {}


def control_template(control: str, template: str | None) -> str | None:
    """The template of a run under a control: plain for "empty", the task's own otherwise."""
    return PLAIN_TEMPLATE if control == "empty" else template


def _shuffled(texts: list[str], rng: random.Random) -> list[str]:
    """Another row's reference for every row, never one that reads the same."""
    distinct = sorted(set(texts))
    if len(distinct) < 2:
        raise ValueError("control='shuffled' needs at least two different references.")
    return [_another(text, distinct, rng) for text in texts]


def _another(text: str, distinct: list[str], rng: random.Random) -> str:
    while (other := rng.choice(distinct)) == text:
        pass
    return other


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
    noise = text
    while noise == text:
        noise = "".join(rng.choice(_kind(char)) if char.isalnum() else char for char in text)
    return noise


def _kind(char: str) -> str:
    """Digits, or letters of the same case."""
    if char.isdigit():
        return string.digits
    return string.ascii_uppercase if char.isupper() else string.ascii_lowercase
