"""Prompts with and without images, for a model that is asked outside of its trainer.

A processing class is what TRL calls one: a tokenizer, or a processor where the model sees images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from rlsd_lib.prompts import Prompt

Processing = PreTrainedTokenizerBase | ProcessorMixin


def tokenizer_of(processing: Processing) -> PreTrainedTokenizerBase:
    """Return the tokenizer itself, or the processor's."""
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


def messages_of(row: Mapping[str, Any], image_type: str = "image") -> Prompt:
    """Put a row's images into its prompt, as parts of the type that the model's side calls them.

    Raises:
        ValueError: there are not as many image parts as images.
    """
    images = list(row.get("images") or [])
    if isinstance(row["prompt"], str):
        return row["prompt"]
    wanted = [p for m in row["prompt"] if not isinstance(m["content"], str) for p in m["content"]]
    count = sum(part["type"] == "image" for part in wanted)
    if count != len(images):
        raise ValueError(
            f"row {row.get('key', row['prompt'])} has {len(images)} images and {count} image parts "
            'in its prompt; add parts {"type": "image"} where the images belong'
        )
    return [
        {**message, "content": _content(message["content"], images, image_type)}
        for message in row["prompt"]
    ]


def _content(content: Any, images: list, image_type: str) -> Any:
    """Fill the image parts of one turn, taking from the front of `images`."""
    if isinstance(content, str):
        return content
    return [
        {"type": image_type, image_type: images.pop(0)}
        if part["type"] == "image"
        else {"type": "text", "text": part["text"]}
        for part in content
    ]


def encode(
    processing: Processing,
    prompts: Sequence[Prompt],
    *,
    add_generation_prompt: bool = True,
    **template: Any,
) -> BatchFeature:
    """Return what the model's forward takes for a batch of prompts, padded on the left.

    `template` are arguments of the chat template. A prompt that is a string is taken as it is.
    """
    if isinstance(processing, ProcessorMixin):
        # Where no message of the batch has one, the processor returns no image fields.
        return processing.apply_chat_template(
            [_in_parts(prompt) for prompt in prompts],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **template,
        )
    texts = [
        prompt
        if isinstance(prompt, str)
        else processing.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=add_generation_prompt, **template
        )
        for prompt in prompts
    ]
    # A chat template writes its special tokens itself.
    special = isinstance(prompts[0], str)
    encoded = processing(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special
    )
    return BatchFeature({name: encoded[name] for name in ("input_ids", "attention_mask")})


def _in_parts(prompt: Prompt) -> Prompt:
    """Write every turn as a list of parts, which the templates of some families require."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in prompt
    ]


def extend(encoded: BatchFeature, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Append the tokens of a completion to one encoded prompt.

    Every field with an entry per token grows; they are text, hence of type 0.
    """
    prompt = encoded["input_ids"]
    new = torch.tensor([list(ids)], device=prompt.device)
    ends = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    return {
        name: torch.cat([value, ends.get(name, torch.zeros_like(new)).to(value.dtype)], dim=1)
        if value.shape == prompt.shape
        else value
        for name, value in encoded.items()
    }
