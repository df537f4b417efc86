r"""Graders for verifiable answers: is the one answer that a completion commits to right?

The answer is what stands in `<answer>` tags or in `\boxed{}`, else what follows "the answer is",
else a completion of one short line. Two different answers are a hedge, and a hedge is wrong. No
model output is ever run: mathematics goes to the worker of `rlsd_lib.tasks.symbolic`.
"""

import re

from rlsd_lib.tasks import symbolic

TYPES = {  # every spelling that is accepted, in lower case -> the grader
    **dict.fromkeys(("math", "mathematics"), "math"),
    **dict.fromkeys(("multiple choice", "multiple_choice"), "multiple choice"),
    **dict.fromkeys(("numerical", "number", "regression"), "numerical"),
    **dict.fromkeys(("boolean", "binary classification"), "boolean"),
}
MAX_COMPLETION, MAX_ANSWER = 100_000, 500  # characters; what is longer is wrong
FORMAT_WEIGHT = 0.1

_ANY_TAG = re.compile(r"</?(?:think|thought|answer)>", re.IGNORECASE)
_FORMATS = [[f"<{t}>", f"</{t}>", "<answer>", "</answer>"] for t in ("think", "thought")]
_REASONING = re.compile(r"<(/?)(?:think|thought)>", re.IGNORECASE)
_TAGGED = re.compile(r"(?si)<answer>((?:(?!</?answer>).)*+)</answer>")
_INNER = r"(?:[^{}]++|\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\})*+"  # four levels of braces
_BOXED = re.compile(rf"\\boxed\{{({_INNER})\}}")
_SAID = re.compile(r"\banswer[*\s]{0,6}(?:is\b|:|=)[*\s:]{0,6}", re.IGNORECASE)
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt "}
    | {"≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap "}
    | {"²": "^2", "³": "^3", "½": r"\frac{1}{2}", **dict.fromkeys("$€£¥")}
)
_REWRITES = (  # applied in this order to every answer
    (re.compile(r"\\(?:left|right|displaystyle|[!,;:()])|(?<!\\)\\[\[\]]|\\(?=%)|`"), ""),
    (re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])"), ""),  # bold, but not a power
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\^?\s?\{?\s?(?:\\circ\b|°)\s?\}?"), "°"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])[eE]([-+]?[0-9]{1,3})\b"), r"\\times 10^{\1}"),
    (re.compile(r"(?i) ?percent\b"), "%"),
    (re.compile(r"(?:\s|~|(?<!\\)\\ )+"), " "),
)
_WITH_UNIT = re.compile(
    r"([^A-Za-z]*(?:\\(?:times|frac|sqrt)[^A-Za-z]*)*[0-9})])( ?[A-Za-z°][A-Za-z° /^{}23]*)"
)
_SPELLINGS = (  # of each unit, its symbol first; a plural s is cut off before the look-up
    "m meter metre, km kilometer, cm centimeter, mm millimeter, kg kilogram, g gram, s second sec, "
    "min minute, h hour hr, l L liter, ml mL milliliter, ° degree, ft foot feet, in inch inche"
)
_UNITS = {name: unit.split()[0] for unit in _SPELLINGS.split(", ") for name in unit.split()}
_LATIN = re.compile("[A-Za-z°]+")
_MATHS_WORDS = r"(?:and|or|sin|cos|tan|cot|log|exp|[pbvB]?matrix|cases)(?![A-Za-z])"
_WORD = re.compile(rf"(?<![\\A-Za-z])(?!{_MATHS_WORDS})[A-Za-z]{{3}}")  # prose, not mathematics
_PAIR = re.compile(r"\\?([\[({])[^\[\](){}]*,[^\[\](){}]*([\])}])")
_CHOSEN = re.compile(r"(?i:option |choice )?(\(?[A-J]\)?(?: ?(?:,|&|and)? ?\(?[A-J]\)?)*)[.:]?")
_LABELLED = re.compile(r"\(?([A-J])[.:)] ?(.+)")
_SECOND = re.compile(r"(?:\b(?:or|and)\b|[/,;&|]) ?\(?[A-J](?![\w'])|(?<!\w)\(?[A-J][.:)](?!\w)")
_VERDICT = re.compile(r"([01]$|yes|true|correct|no|false|incorrect)(?:(?: ?[,.;:!–]| -)(.*))?")
_BASE = re.compile(r"[0-9]\}?_")  # a number to a base
_YES, _NO = {"yes", "true", "correct", "1"}, {"no", "false", "incorrect", "0", "not"}


def final_answer(completion: str) -> str | None:
    """Return the cleaned answer that a completion commits to; None for no answer, or a hedge.

    Text in a closed reasoning block does not count, and after an unclosed one only tags do. The time
    is linear in the length; more than `MAX_COMPLETION` characters hold no answer.
    """
    if len(completion) > MAX_COMPLETION:
        return None
    ends = [m.end() for m in _REASONING.finditer(completion) if m[1]]
    text = completion[ends[-1] :] if ends else completion
    found = {clean(answer) for answer in _TAGGED.findall(text)}
    if not _REASONING.search(text):  # else the reasoning was cut off
        found |= {clean(answer) for answer in _BOXED.findall(text)}
        said = [text[m.end() :][:MAX_ANSWER] for m in _SAID.finditer(text)] if not found else ()
        found |= {clean(head) for head in {re.split(r"\n|\.(?!\d)", rest)[0] for rest in said}}
        found = found or ({clean(text)} if "\n" not in text.strip() else set())
    answer = found.pop() if len(found) == 1 else ""
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def clean(text: str) -> str:
    r"""Reduce an answer to bare LaTeX on one line: no box, `$`, `\text` or style commands."""
    text = text.strip()[: 2 * MAX_ANSWER]
    while box := _BOXED.fullmatch(text):
        text = box[1].strip()
    text = text.replace(r"\$", "").translate(_UNICODE)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".,;").strip()


def _split_unit(text: str) -> tuple[str, str]:
    """Split into number and unit ("" for none); an unknown word counts when it stands apart."""
    if (found := _WITH_UNIT.fullmatch(text)) is None:
        return text, ""
    unit = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", found[2].replace(" per ", "/"))
    words = {w: w if w in _UNITS else w.lower().removesuffix("s") for w in _LATIN.findall(unit)}
    apart = unit[0] == " " and all(_WORD.match(word) for word in words.values())
    if not apart and not _UNITS.keys() >= set(words.values()):
        return text, ""
    name = _LATIN.sub(lambda m: _UNITS.get(words[m[0]], words[m[0]]), unit)
    return found[1], re.sub(r"[ {}^]", "", name)


def _choice_letters(text: str) -> set[str]:
    """The letters of choices that a cleaned answer names; the empty set when it hedges."""
    if letters := _CHOSEN.fullmatch(text.upper() if len(text.strip("()")) == 1 else text):
        return set(re.findall("[A-J]", letters[1]))
    labelled = _LABELLED.fullmatch(text)
    return {labelled[1]} if labelled and not _SECOND.search(labelled[2]) else set()


def _polarity(text: str) -> bool | None:
    """Yes (True) or no (False), alone or before a comma or the like; None for neither, or both."""
    if (found := _VERDICT.fullmatch(text.lower())) is None:
        return None
    words = set(re.findall(r"[a-z]+", found[2] or ""))
    said, other = (True, _NO) if found[1] in _YES else (False, _YES)
    return None if other & words else said


def _same_maths(gold: str, answer: str, rough: bool = False) -> bool:
    """Compare two cleaned answers as text where there is prose, else by math-verify.

    A unit may be left out; a percent sign on one side stands for a hundredth or for nothing; (1, 2)
    is not [1, 2]. `rough` allows what `_tolerance` says.
    """
    (gold, unit), (answer, other) = _split_unit(gold), _split_unit(answer)
    if unit and other and unit != other:
        return False
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    if any(_WORD.search(text) or not text.replace("°", "").isascii() for text in (gold, answer)):
        return gold.casefold() == answer.casefold()
    pairs = [_PAIR.fullmatch(text.replace(r"\}", "}")) for text in (gold, answer)]
    if all(pairs) and pairs[0].groups() != pairs[1].groups():
        return False
    latex = [re.sub(r" (?:or|and) ", ", ", text).replace("°", r"^\circ") for text in (gold, answer)]
    if any(_BASE.search(text) for text in latex):  # 10_2 is two, which math-verify reads as ten
        return len({re.sub("[{} ]", "", text) for text in latex}) == 1
    return symbolic.WORKERS.equal(*latex, _tolerance(gold) if rough else 0.0)


def _tolerance(gold: str) -> float:
    """0.1 %, or half of the last printed digit up to 1 %; 0 for a whole number."""
    if re.fullmatch(r"-?[0-9,]+%?", gold):
        return 0.0
    decimal = re.fullmatch(r"-?([0-9]*\.([0-9]+))%?", gold)
    half = 0.5 / 10 ** len(decimal[2]) / (float(decimal[1]) or 1.0) if decimal else 0.0
    return max(0.001, min(half, 0.01))


def grade(completion: str, answer: str, problem_type: str) -> bool:
    """Say whether a completion's final answer is right; ValueError for no such type or reference."""
    kind = TYPES.get(problem_type.strip().lower())
    gold = clean("".join(_TAGGED.findall(answer)[:1]) or answer)
    if kind is None or not gold:
        raise ValueError(
            f"problem_type={problem_type!r}, answer={answer!r}: expected one of {sorted(TYPES)} and "
            "an answer; drop such rows"
        )
    if (given := final_answer(completion)) is None:
        return False
    if kind == "boolean":
        return _polarity(given) is not None and _polarity(given) == _polarity(gold)
    if kind != "multiple choice":
        return _same_maths(gold, given, rough=kind == "numerical")
    if letters := _choice_letters(gold):
        return _choice_letters(given) == letters
    return _same_maths(gold, given)


def weighted(completion: str, answer: str, problem_type: str) -> float:
    """The reward of arXiv 2604.03128's code: maths 0.9 accuracy + 0.1 format, others accuracy.

    Its penalty for completions far above the 4096 tokens that are generated is 0, so left out.
    """
    right = float(grade(completion, answer, problem_type))
    if TYPES[problem_type.strip().lower()] != "math":
        return right
    return (1 - FORMAT_WEIGHT) * right + FORMAT_WEIGHT * is_formatted(completion)


def is_formatted(completion: str) -> bool:
    """Say whether it is one reasoning block, then one answer block, and no such tag beside them."""
    tags = [tag.lower() for tag in _ANY_TAG.findall(completion)]
    filled = [bool(part.strip()) for part in _ANY_TAG.split(completion)]
    return tags in _FORMATS and filled == [False, True, False, True, False]
