"""How many tokens prompts have, images included, without touching a pixel; what is too long."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset, Image, List
from PIL import Image as PillowImage
from transformers import ProcessorMixin

from rlsd_lib.prompts import COLUMN, Prompt, count_images, teacher_prompt
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.encode import Processing, tokenizer_of

BATCH = 1000


def prompt_lengths(
    rows: Dataset,
    processing: Processing,
    *,
    privileged_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of every row's prompt; with a `privileged_template`, of its teacher's.

    The tokens of an image follow from its size (`_get_num_multimodal_tokens`, which vLLM relies on
    too), so images are opened but not decoded.
    """
    prompts = rows["prompt"][:]
    if privileged_template is not None:
        pairs = zip(prompts, rows[COLUMN][:], strict=True)
        prompts = [teacher_prompt(prompt, text, privileged_template) for prompt, text in pairs]
    texts = [_text(processing, prompt, dict(chat_template_kwargs or {})) for prompt in prompts]
    tokenizer = tokenizer_of(processing)
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], add_special_tokens=False)["input_ids"]
        lengths += map(len, batch)
    if isinstance(processing, ProcessorMixin) and "images" in rows.column_names:
        # In the text, each image was one token.
        extra = _image_tokens(rows, processing)
        held = map(count_images, prompts)
        lengths = [n + e - c for n, e, c in zip(lengths, extra, held, strict=True)]
    return lengths


def _text(processing: Processing, prompt: Prompt, template: dict[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    return processing.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **template
    )


def _image_tokens(rows: Dataset, processing: ProcessorMixin) -> list[int]:
    """The tokens of all images of each row."""
    raw = rows.select_columns("images").cast_column("images", List(Image(decode=False)))
    sizes = [[_size(image) for image in row["images"]] for row in raw]
    flat = [size for row in sizes for size in row]
    counts = iter(processing._get_num_multimodal_tokens(image_sizes=flat)["num_image_tokens"])
    return [sum(int(next(counts)) for _ in row) for row in sizes]


def _size(image: Mapping[str, Any]) -> list[int]:
    """(height, width) of a stored image, from its header."""
    with PillowImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as found:
        return [found.height, found.width]


def within(task: Task, processing: Processing, limit: int, **template: Any) -> tuple[Task, int]:
    """Leave out the rows whose prompt has more than `limit` tokens; also returns how many.

    Raises:
        ValueError: a side has no row left.
    """
    sides, dropped = {}, 0
    for name in ("train", "test"):
        rows: Dataset = getattr(task, name)
        lengths = prompt_lengths(rows, processing, **template)
        kept = fitting(lengths, limit)
        if not kept:
            raise ValueError(
                f"max_prompt_length={limit}: every {name} prompt is longer, the shortest has "
                f"{min(lengths)} tokens. Raise the limit."
            )
        sides[name] = rows if len(kept) == len(rows) else rows.select(kept)
        dropped += len(rows) - len(kept)
    return replace(task, **sides), dropped


def fitting(lengths: Sequence[int], limit: int) -> list[int]:
    """The positions of the lengths that do not exceed the limit."""
    return [i for i, length in enumerate(lengths) if length <= limit]
