"""A random Qwen3-VL of two text and two vision layers, with the family's own processor: offline."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    BaseVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlsd_lib import RLSDTrainer

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}" + START + IMAGE + END + "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class NoVideos(BaseVideoProcessor):
    """Stands where the family's video processor, which needs torchvision, would stand."""

    model_input_names: ClassVar = []

    def __init__(self) -> None:
        pass


def tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """The character tokenizer of `tiny`, with the tokens that stand for images."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": [START, END, IMAGE, VIDEO]})
    made.chat_template = CHAT_TEMPLATE
    made.padding_side = padding_side
    return made


def processor(padding_side: str = "left") -> Qwen3VLProcessor:
    images = Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}, merge_size=2
    )
    return Qwen3VLProcessor(
        images, tokenizer(padding_side), NoVideos(), chat_template=CHAT_TEMPLATE
    )


def model(seed: int = 0, **text: Any) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    known = tokenizer()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(known),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "pad_token_id": known.pad_token_id,
            # Wide, so that images and references make a visible difference.
            "initializer_range": 0.3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.3,
        },
        image_token_id=known.convert_tokens_to_ids(IMAGE),
        video_token_id=known.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=known.convert_tokens_to_ids(START),
        vision_end_token_id=known.convert_tokens_to_ids(END),
    )
    return Qwen3VLForConditionalGeneration(config)


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def dataset(counts: list[int], **columns: list) -> Dataset:
    """One row for each number of images; sizes differ, so that rows differ in their patches."""
    prompts = [[{"role": "user", "content": f"{i}?"}] for i in range(len(counts))]
    images = [
        [picture(10 * i + j, height=8 + 8 * (j % 2), width=8 + 8 * (i % 2)) for j in range(count)]
        for i, count in enumerate(counts)
    ]
    contexts = ["the answer is " + "x" * i for i in range(len(counts))]
    data = {"prompt": prompts, "images": images, "privileged_context": contexts}
    return Dataset.from_dict({**data, **columns})


def trainer(folder: Path, data: Dataset, student: Any = None, **overrides: Any) -> RLSDTrainer:
    return RLSDTrainer(
        model() if student is None else student,
        tiny.reward,
        tiny.config(folder, **overrides),
        data,
        processing_class=processor(),
    )
