"""The teacher's prompt: the student's, with the privileged text written into it.

Prompts are TRL prompts: a list of chat messages, or a plain string. The last user turn is replaced
by `privileged_template`; system prompt, earlier turns, tools and images stay as they are.
"""

import bisect
import random
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

Prompt = str | list[dict[str, Any]]
Completion = str | list[dict[str, str]]

COLUMN = "privileged_context"
SEVERAL_WORDS = 3
DEFAULT_TEMPLATE = (
    "{prompt}\n\n"
    "For this problem a reference solution is known:\n{privileged_context}\n\n"
    "Use it to check yourself, but solve the problem in your own way and state the final answer "
    "in the format that was asked for."
)
_PLACEHOLDER = re.compile(r"\{(prompt|privileged_context)\}")
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|\*\*|__|[`$]")
# Placeholders of the processors in transformers. HTML tags such as <img> are ordinary text.
_IMAGE_TOKEN = re.compile(
    r"<\|(?:image|video|vision)[^|>]*\|>|\[IMG\]"
    r"|<(?:image|IMG_CONTEXT|start_of_image|image_soft_token|fake_token_around_image)>"
)


def render(template: str, prompt: str, context: str) -> str:
    """Fill both placeholders in one pass, so braces inside either text are never expanded."""
    values = {"prompt": prompt, COLUMN: context}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def check_template(template: str) -> None:
    """Refuse a template without both placeholders with a ValueError that names the missing one."""
    for placeholder in ("{prompt}", "{privileged_context}"):
        if placeholder not in template:
            raise ValueError(f"privileged_template={template!r} has no {placeholder}. Add it.")


def teacher_prompt(prompt: Prompt, context: str | None, template: str) -> Prompt:
    """The prompt of the teacher: `prompt` with its last user turn rendered through `template`.

    A multimodal turn keeps its images in place; the template wraps its last text part. Without a
    context the prompt stays. Raises ValueError if it has no user turn, or the turn has no text.
    """
    if context is None:
        return prompt
    if isinstance(prompt, str):
        return render(template, prompt, context)
    turns = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not turns:
        raise ValueError(f"The prompt has no user turn to show a reference in: {prompt}")
    last = turns[-1]
    content = _render_content(prompt[last]["content"], context, template)
    return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]


def shorten_to_fit(
    prompt: Prompt,
    context: str,
    template: str,
    limit: int,
    tokenizer: Any,
    count_tokens: Callable[[Prompt], int],
) -> str:
    """The longest head of `context` with a teacher prompt of `limit` tokens; ValueError for none."""
    ids = tokenizer.encode(context, add_special_tokens=False)

    def head(kept: int) -> str:
        return tokenizer.decode(ids[:kept], skip_special_tokens=True)

    def length(kept: int) -> int:
        return count_tokens(teacher_prompt(prompt, head(kept), template))

    if length(1) > limit:
        raise ValueError(
            f"max_teacher_prompt_length={limit} leaves no room: the question needs {length(0)}. "
            f"Raise the limit or drop the row: {prompt_text(prompt)[:200]!r}."
        )
    return head(bisect.bisect_right(range(1, len(ids)), limit, key=length))


def check_prompts(prompts: Sequence[object], template: str) -> None:
    """Refuse by ValueError rows whose prompt is no text and no chat with a user turn of text."""

    def is_prompt(prompt: Any) -> bool:
        try:
            prompt_text(prompt)
            teacher_prompt(prompt, "", template)
        except (KeyError, TypeError, AttributeError, ValueError):
            return False
        return True

    refuse(
        [row for row, prompt in enumerate(prompts) if not is_prompt(prompt)],
        "have no prompt that a reference can be shown in",
        'Expected a text, or a list of {"role", "content"} messages with a user turn that has text.',
    )


def check_contexts(
    contexts: Sequence[object],
    template: str,
    column: str = COLUMN,
    control: Collection[str] = (),
) -> None:
    """Refuse rows whose privileged text is missing, invisible, no string, or holds an image token.

    `control` are the tokenizer's control tokens, which would be encoded as such and not as text.
    Raises ValueError with the rows. An empty text is accepted only under a template that adds no
    text of its own (the null control, whose gap is 0).
    """
    rows = list(enumerate(contexts))
    null = render(template, "x", "") == "x"
    wrong = [i for i, text in rows if text is not None and not isinstance(text, str)]
    refuse(wrong, f"have a {column} that is not a string", "Convert it to str.")
    empty = [i for i, text in rows if text is None or not (_is_visible(text) or null)]
    refuse(empty, f"have no {column}", "Fill the column, or drop these rows.")
    images = [i for i, text in rows if has_image_token(text)]
    advice = "The teacher sees the student's images only; remove the placeholder."
    refuse(images, f"have an image placeholder in {column}", advice)
    told = [i for i, text in rows if any(token in text for token in control)]
    advice = "The teacher would take it for the end of a turn or the like; remove it."
    refuse(told, f"have a control token of the tokenizer in {column}", advice)


def count_in_prompts(
    prompts: Sequence[Prompt], contexts: Sequence[str], column: str = COLUMN
) -> int:
    """Count rows whose privileged text stands in the student's prompt; refuse the clear leaks.

    Raises ValueError with the rows. A text shorter than for `holds_reference` (a number, a choice)
    can stand in a question by chance, and is only counted.
    """
    pairs = list(zip(prompts, contexts, strict=True))
    refuse(
        [i for i, (prompt, context) in enumerate(pairs) if holds_reference(prompt, context)],
        f"hold their {column} in the student's own prompt",
        "The student would see the reference. Remove it from the prompt; if it is one of the choices "
        "there, let the reference say so: 'The answer is: ...'.",
    )
    return sum(_holds(prompt, context) for prompt, context in pairs)


def holds_reference(prompt: Prompt, context: str) -> bool:
    """Whether a privileged text of several words stands in the student's own prompt."""
    return len(context.split()) >= SEVERAL_WORDS and _holds(prompt, context)


def has_image_token(text: str) -> bool:
    """Whether a text holds a processor's placeholder of an image."""
    return _IMAGE_TOKEN.search(text) is not None


def prompt_text(prompt: Prompt) -> str:
    """All text of a prompt, images left out."""
    return "\n".join(part["text"] for part in _parts(prompt) if part["type"] == "text")


def count_images(prompt: Prompt, kind: str = "image") -> int:
    """Number of images, or of parts of another `kind`, in a prompt's messages."""
    return sum(part["type"] == kind for part in _parts(prompt))


def with_images(prompt: Prompt, images: list[dict[str, Any]]) -> Prompt:
    """Return a prompt with each of its image parts replaced by the parts `images`."""
    if isinstance(prompt, str):
        return prompt
    changed = []
    for message in prompt:
        content = message["content"]
        if isinstance(content, list):
            parts = (images if part["type"] == "image" else [part] for part in content)
            content = list(chain.from_iterable(parts))
        changed.append({**message, "content": content})
    return changed


def spelled(text: str | None, control: Collection[str]) -> str | None:
    """A text whose control tokens are spelled with a space, so that they are encoded as text."""
    for token in control if text else ():
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def copied(value: Any) -> Any:
    """Lists and mappings copied at every level; what they hold, such as images, is shared."""
    if isinstance(value, list):
        return [copied(item) for item in value]
    return {k: copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def text_of(completion: Completion) -> str:
    """Return the text of a completion given as a string or as chat messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def distinct_references(column: Sequence[object]) -> list[str]:
    """The different texts of a privileged column, sorted, so that every rank has the same list."""
    return sorted({text for text in column if isinstance(text, str) and text.strip()})


def wrong_references(own: str, distinct: Sequence[str], count: int) -> list[str]:
    """`count` of the `distinct` texts, unlike `own`, which decides the draw; ValueError for fewer."""
    if len(distinct) <= count:
        raise ValueError(f"{count} wrong references: too many for {len(distinct)} different ones.")
    drawn = random.Random(own).sample(distinct, count + 1)
    return [text for text in drawn if text != own][:count]


class Demonstrations(NamedTuple):
    """One text per local rollout, None where its group offers none; and the groups' tally."""

    texts: list[str | None]
    groups_with_success: int
    groups: int


def demonstrations(
    completions: Sequence[Completion],
    rewards: Sequence[float],
    local: slice,
    *,
    group_size: int,
    threshold: float,
) -> Demonstrations:
    """Write the privileged text of each rollout in `local`.

    All sequences are global, in rank order: a group of `group_size` may lie across two ranks. A
    rollout is never its own demonstration. NaN rewards (unscorable rollouts) never succeed. Raises
    ValueError if the sequences differ in length, or are not whole groups.
    """
    total, count = len(completions), len(rewards)
    if count != total or total % group_size:
        raise ValueError(f"{total} completions, {count} rewards: expected groups of {group_size}.")
    good = [reward >= threshold for reward in rewards]
    texts = []
    for index in range(total)[local]:
        first = index // group_size * group_size
        peers = [i for i in range(first, first + group_size) if i != index]
        texts.append(next((text_of(completions[i]) for i in peers if good[i]), "") or None)
    groups = [good[i : i + group_size] for i in range(0, total, group_size)]
    return Demonstrations(texts, sum(map(any, groups)), len(groups))


def _render_content(content: str | list[dict[str, Any]], context: str, template: str) -> Any:
    if isinstance(content, str):
        return render(template, content, context)
    texts = [i for i, part in enumerate(content) if part["type"] == "text"]
    if not texts:
        raise ValueError("The last user turn has no text part to put the privileged text beside.")
    last = texts[-1]
    text = render(template, content[last]["text"], context)
    return [*content[:last], {**content[last], "text": text}, *content[last + 1 :]]


def _is_visible(text: str) -> bool:
    return any(c.isprintable() and not c.isspace() for c in text)


def _bare(text: str) -> str:
    """A text without case, accents, markup, and full stop at its end."""
    split = unicodedata.normalize("NFKD", _MARKUP.sub("", text)).casefold()
    kept = "".join(
        c for c in split if not unicodedata.combining(c) and (c.isprintable() or c.isspace())
    )
    return " ".join(kept.split()).rstrip(".!;, ")


def _holds(prompt: Prompt, context: str) -> bool:
    words, text = map(_bare, (context, prompt_text(prompt)))
    return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _parts(prompt: Prompt) -> Iterator[dict[str, Any]]:
    """The parts of all messages; a text that is not split into parts is one part."""
    contents = [prompt] if isinstance(prompt, str) else [m.get("content") for m in prompt]
    for content in contents:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from parts or []


def refuse(rows: list[int], what: str, advice: str) -> None:
    """Raise ValueError naming the first of `rows`, if there are any."""
    if rows:
        shown = ", ".join(map(str, rows[:10]))
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise ValueError(f"{len(rows)} dataset rows {what} (rows {shown}{more}). {advice}")
