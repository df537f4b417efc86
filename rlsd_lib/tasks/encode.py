"""Prompts with and without images as a model's input, outside of its trainer, and their lengths.

A processing class is what TRL calls one: a tokenizer, or a processor where the model sees images.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from datasets import Dataset, Image, List
from PIL import Image as PillowImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import (
    BatchFeature,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from trl.data_utils import prepare_multimodal_messages

from rlsd_lib.prompts import COLUMN, Prompt, count_images, teacher_prompt
from rlsd_lib.tasks.task import Task

Processing = PreTrainedTokenizerBase | ProcessorMixin


def tokenizer_of(processing: Processing) -> PreTrainedTokenizerBase:
    """Return the tokenizer itself, or the processor's."""
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def word_tokenizer(
    words: Sequence[str], split: PreTokenizer, **options: Any
) -> PreTrainedTokenizerFast:
    """Build a tokenizer, padding left, of one token for each of `words`, padding and the end first.

    `split` cuts a text, `options` go to `PreTrainedTokenizerFast`; no `unk_token`: other words raise.
    """
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown = options.get("unk_token", "<unknown word>")
    backend = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    backend.pre_tokenizer = split
    named = {"pad_token": words[0], "eos_token": words[1], "padding_side": "left", **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def messages_of(row: Mapping[str, Any]) -> Prompt:
    """Return a row's prompt with its images; ValueError for more or fewer than it has parts."""
    if "images" not in row or isinstance(row["prompt"], str):
        return row["prompt"]
    try:
        return prepare_multimodal_messages(row["prompt"], images=row["images"])
    except ValueError as error:
        raise ValueError(
            f"row {row.get('key', row['prompt'])}: {error} Write one part "
            '{"type": "image"} where each image belongs.'
        ) from error


def text_of_prompt(processing: Processing, prompt: Prompt, **template: Any) -> str:
    """Write a prompt as the chat template does; a prompt that is a string is taken as it is."""
    if isinstance(prompt, str):
        return prompt
    template = {"add_generation_prompt": True, **template}
    return processing.apply_chat_template(prompt, tokenize=False, **template)


def encode(processing: Processing, prompts: Sequence[Prompt], **template: Any) -> BatchFeature:
    """Return what the model's forward takes for prompts, padded left; `template` are its options."""
    padding = {"padding": True, "padding_side": "left"}
    if isinstance(processing, ProcessorMixin):
        # The templates of some families require parts. Without an image there are no image fields.
        return processing.apply_chat_template(
            [prepare_multimodal_messages(prompt) for prompt in prompts],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
            **{"add_generation_prompt": True, **template},
        )
    texts = [text_of_prompt(processing, prompt, **template) for prompt in prompts]
    # A chat template writes its special tokens itself.
    special = isinstance(prompts[0], str)
    encoded = processing(texts, return_tensors="pt", add_special_tokens=special, **padding)
    return BatchFeature({name: encoded[name] for name in ("input_ids", "attention_mask")})


def prompt_lengths(
    rows: Dataset,
    processing: Processing,
    *,
    privileged_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of every row's prompt; with a `privileged_template`, of its teacher's.

    An image's tokens follow from its size, as for vLLM: images are opened but not decoded.
    """
    prompts = rows["prompt"][:]
    if privileged_template is not None:
        pairs = zip(prompts, rows[COLUMN][:], strict=True)
        prompts = [teacher_prompt(prompt, text, privileged_template) for prompt, text in pairs]
    template = chat_template_kwargs or {}
    texts = [text_of_prompt(processing, prompt, **template) for prompt in prompts]
    tokenizer = tokenizer_of(processing)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if isinstance(processing, ProcessorMixin) and "images" in rows.column_names:
        # In the text, each image was one token.
        extra = zip(lengths, _image_tokens(rows, processing), prompts, strict=True)
        lengths = [length + tokens - count_images(prompt) for length, tokens, prompt in extra]
    return lengths


def _image_tokens(rows: Dataset, processing: ProcessorMixin) -> list[int]:
    """The tokens of all images of each row."""
    raw = rows.select_columns("images").cast_column("images", List(Image(decode=False)))
    per_row, sizes = [], []
    for row in raw:
        per_row.append(len(row["images"]))
        for image in row["images"]:
            data = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
            with PillowImage.open(data) as opened:
                sizes.append((opened.height, opened.width))
    counts = iter(processing._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
    return [sum(islice(counts, size)) for size in per_row]


def within(task: Task, processing: Processing, limit: int, **template: Any) -> tuple[Task, int]:
    """Leave out rows whose prompt has over `limit` tokens, and say how many; ValueError if all do."""
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
