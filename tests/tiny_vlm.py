"""Random vision-language models of three families, with the families' own processors: offline."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlsd_lib import RLSDTrainer
from rlsd_lib.tasks.lab import vision as toy_vlm
from rlsd_lib.tasks.lab.vision import ROPE, TEXT_CONFIG, build_tokenizer, image_ids

FAMILIES = ("qwen3-vl", "qwen2.5-vl", "gemma3")
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA |= {"image_token": "<image_soft_token>"}
GEMMA_TEMPLATE = toy_vlm.CHAT_TEMPLATE.replace(toy_vlm.IMAGE, GEMMA["boi_token"])


def processor(family: str = "qwen3-vl", padding_side: str = "left") -> ProcessorMixin:
    if family == "qwen3-vl":
        made = toy_vlm.build_processor()
    elif family == "qwen2.5-vl":
        images = Qwen2VLImageProcessorPil(**toy_vlm.IMAGES)
        template = toy_vlm.CHAT_TEMPLATE
        videos = toy_vlm.NoVideos()
        made = Qwen2_5_VLProcessor(images, build_tokenizer(), videos, chat_template=template)
    else:
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        template = {"chat_template": GEMMA_TEMPLATE, "image_seq_length": 4}
        made = Gemma3Processor(images, _gemma_tokenizer(), **template)
    made.tokenizer.padding_side = padding_side
    return made


def _gemma_tokenizer() -> PreTrainedTokenizerFast:
    named = {"model_specific_special_tokens": GEMMA}
    return build_tokenizer((), chat_template=GEMMA_TEMPLATE, **named)


def model(family: str = "qwen3-vl", seed: int = 0) -> PreTrainedModel:
    if family == "qwen3-vl":
        return toy_vlm.build_model(seed)
    build = {"qwen2.5-vl": _qwen2_5, "gemma3": _gemma3}[family]
    torch.manual_seed(seed)
    return build()


def _qwen2_5() -> Qwen2_5_VLForConditionalGeneration:
    tokenizer = build_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "vocab_size": len(tokenizer), "rope_parameters": ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        **image_ids(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _gemma3() -> Gemma3ForConditionalGeneration:
    tokenizer = _gemma_tokenizer()
    config = Gemma3Config(
        text_config={
            **TEXT_CONFIG,
            "vocab_size": len(tokenizer),
            "query_pre_attn_scalar": 16,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,  # as in the released models, where nothing reads it
        },
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        initializer_range=0.3,
    )
    made = Gemma3ForConditionalGeneration(config)
    # Its projector starts at zeros, which would hide the images.
    torch.nn.init.normal_(made.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return made


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


def trainer(
    folder: Path,
    data: Dataset,
    student: Any = None,
    family: str = "qwen3-vl",
    *,
    more: dict[str, Any] | None = None,
    **overrides: Any,
) -> RLSDTrainer:
    """A trainer on a model of the family, with `more` arguments; `overrides` are RLSDConfig fields."""
    return RLSDTrainer(
        model(family) if student is None else student,
        tiny.reward,
        tiny.config(folder, **overrides),
        data,
        processing_class=processor(family),
        **more or {},
    )
