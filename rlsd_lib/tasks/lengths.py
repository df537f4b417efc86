"""How many tokens prompts have, images included, without decoding a pixel; which are too long."""

import io
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from datasets import Dataset, Image, List
from PIL import Image as PillowImage
from transformers import ProcessorMixin

from rlsd_lib.prompts import COLUMN, count_images, teacher_prompt
from rlsd_lib.tasks.encode import Processing, text_of_prompt, tokenizer_of
from rlsd_lib.tasks.task import Task

BATCH = 1000  # prompts tokenised at a time


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
    template = chat_template_kwargs or {}
    texts = [text_of_prompt(processing, prompt, **template) for prompt in prompts]
    tokenizer = tokenizer_of(processing)
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], add_special_tokens=False)["input_ids"]
        lengths += map(len, batch)
    if isinstance(processing, ProcessorMixin) and "images" in rows.column_names:
        # In the text, each image was one token.
        extra = zip(lengths, _image_tokens(rows, processing), prompts, strict=True)
        lengths = [length + tokens - count_images(prompt) for length, tokens, prompt in extra]
    return lengths


def _image_tokens(rows: Dataset, processing: ProcessorMixin) -> list[int]:
    """The tokens of all images of each row."""
    raw = rows.select_columns("images").cast_column("images", List(Image(decode=False)))
    sizes = [[_size(image) for image in row["images"]] for row in raw]
    flat = [size for row in sizes for size in row]
    counts = iter(processing._get_num_multimodal_tokens(image_sizes=flat)["num_image_tokens"])
    return [sum(islice(counts, len(row))) for row in sizes]


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    with PillowImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as found:
        return found.height, found.width


def within(task: Task, processing: Processing, limit: int, **template: Any) -> tuple[Task, int]:
    """Leave out the rows whose prompt has more than `limit` tokens; also returns how many.

    `template` are the keywords of `prompt_lengths`.

    Raises:
        ValueError: a side has no row left.
    """
    sides, dropped = {}, 0
    for name, rows in (("train", task.train), ("test", task.test)):
        lengths = prompt_lengths(rows, processing, **template)
        kept = [i for i, length in enumerate(lengths) if length <= limit]
        if not kept:
            raise ValueError(
                f"max_prompt_length={limit}: every {name} prompt is longer, the shortest has "
                f"{min(lengths)} tokens. Raise the limit."
            )
        sides[name] = rows.select(kept)
        dropped += len(rows) - len(kept)
    return replace(task, **sides), dropped
