"""Prompts with and without images as a model's input, outside of its trainer.

A processing class is what TRL calls one: a tokenizer, or a processor where the model sees images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from rlsd_lib.prompts import Prompt

Processing = PreTrainedTokenizerBase | ProcessorMixin


def tokenizer_of(processing: Processing) -> PreTrainedTokenizerBase:
    """Return the tokenizer itself, or the processor's."""
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def messages_of(row: Mapping[str, Any]) -> Prompt:
    """Return a row's prompt, with its images where the row has a column of them.

    Raises:
        ValueError: there are not as many image parts as images.
    """
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
    """Return what the model's forward takes for a batch of prompts, padded on the left.

    `template` are arguments of the chat template, which adds a generation prompt unless they say
    otherwise.
    """
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
