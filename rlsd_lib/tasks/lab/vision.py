"""Coloured squares in the schema of the paper's data, and a toy model that looks at them: offline.

The squares go through `rlsd_lib.tasks.mmfinereason` like any other rows. The model has Qwen3-VL's
classes, character tokens, and two text and two vision layers; it is briefly taught the form of the
answers, so that some rollouts are right. Both try out the paper's path; nothing is measured on them.
"""

import string
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import decoders, pre_tokenizers
from transformers import (
    BaseVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import PushToHubMixin

from rlsd_lib.tasks import mmfinereason
from rlsd_lib.tasks.cache import write_once
from rlsd_lib.tasks.encode import encode, messages_of, word_tokenizer
from rlsd_lib.tasks.task import Task

COLOURS = {"blue": (40, 40, 200), "green": (40, 180, 40), "red": (200, 40, 40)}
LETTERS = dict(zip(COLOURS, "ABC", strict=True))
SIDE = 8  # pixels of a square
AREAS = {"min_area": 64, "max_area": 4096}  # so small an image is left as it is
ROWS = 160
STEPS = 120  # of teaching

SPECIALS = ("<pad>", "</s>", "<system>", "<user>", "<assistant>", "<unk>")
VISION = {  # as Qwen's configurations name them
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
IMAGES = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}, "merge_size": 2}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT_TEMPLATE = (  # turns as `<role>text</s>`
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}" + IMAGE + "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "pad_token_id": SPECIALS.index("<pad>"),
    "eos_token_id": SPECIALS.index("</s>"),
    "bos_token_id": None,
    "initializer_range": 0.3,  # wide, so that images and references are felt
}
# Over time, height and width.
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}


def load(**options: Any) -> Task:
    """Build the task of coloured squares; `options` as in `mmfinereason.load`."""
    rows = [_row(index, Random(index)) for index in range(ROWS)]
    return mmfinereason.load(source=Dataset.from_list(rows), **AREAS, **options)


def _row(index: int, random: Random) -> dict[str, Any]:
    """One row with the fields of `mmfinereason.FIELDS`; the four types take turns."""
    kind = ("multiple choice", "boolean", "numerical", "math")[index % 4]
    one, two = random.choices(list(COLOURS), k=2)
    count, other = random.randrange(1, 4), random.randrange(1, 7)
    problem, answer, names = {
        "multiple choice": ("Which colour?\nA. blue\nB. green\nC. red", LETTERS[one], [one]),
        "boolean": ("The same colour?", "Yes" if one == two else "No", [one, two]),
        "numerical": (f"Problem {index}: {count} + {other} = ?", str(count + other), []),
        "math": ("How many squares?", str(count), [one]),
    }[kind]
    return {
        "problem": "<image>" * len(names) + problem,
        "answer": answer,
        "problem_type": kind,
        "data_type": "image" if names else "text",
        "images": [_picture(name, count if kind == "math" else 1, random) for name in names],
        "videos": [],
        mmfinereason.TRACE: f"I look closely. The answer is {answer}.",
    }


def _picture(colour: str, squares: int, random: Random) -> Image.Image:
    """Squares of one colour side by side, with some noise: no two pictures are equal."""
    noise = np.random.default_rng(random.randrange(2**31)).integers(-30, 31, (SIDE, 8 * squares, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


class NoVideos(BaseVideoProcessor, PushToHubMixin):
    """Stands where the family's video processor, which needs torchvision, would stand."""

    model_input_names: ClassVar = []
    _auto_class = None  # which saving a processor looks at

    def __init__(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        """Return nothing to write down with the processor."""
        return {}


def build_tokenizer(
    special: Sequence[str] = tuple(VISION.values()), **options: Any
) -> PreTrainedTokenizerFast:
    """Return a `word_tokenizer` of printable characters and a family's `special` tokens."""
    tokenizer = word_tokenizer(
        (*SPECIALS, *string.printable),
        pre_tokenizers.Split("", "isolated"),
        unk_token="<unk>",
        extra_special_tokens=[*SPECIALS[2:5], *special],
        **{"chat_template": CHAT_TEMPLATE, **options},
    )
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def build_processor() -> Qwen3VLProcessor:
    """Return Qwen3-VL's processor, for images of at most 1024 pixels."""
    images = Qwen2VLImageProcessorPil(**IMAGES)
    return Qwen3VLProcessor(images, build_tokenizer(), NoVideos(), chat_template=CHAT_TEMPLATE)


def image_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the token ids that Qwen's configurations ask for."""
    ids = tokenizer.convert_tokens_to_ids
    return {f"{name}_token_id": ids(token) for name, token in VISION.items()}


def build_model(seed: int = 0, **text: Any) -> Qwen3VLForConditionalGeneration:
    """Return the model in float32 on the CPU; `text` are fields of its text configuration."""
    tokenizer = build_tokenizer()
    text = {**TEXT_CONFIG, "vocab_size": len(tokenizer), "rope_parameters": ROPE, **text}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": IMAGES["patch_size"],
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.3,
        },
        **image_ids(tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)


def load_toy(
    cache_dir: str | Path, *, seed: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Return the taught model (float32, CPU, eval mode) and its processor; taught on first use."""
    folder = Path(cache_dir) / f"toy-vlm-{STEPS}-{seed}"
    write_once(folder, lambda new: teach(seed).save_pretrained(new))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), build_processor()


def teach(seed: int) -> Qwen3VLForConditionalGeneration:
    """Imitate the bare answers of the training side of the squares; torch's seed is left alone."""
    rows = load(train_size=-1, test_size=-1, seed=0).train
    model = build_model(seed, initializer_range=0.05).train()
    processor, random = build_processor(), Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        batch = [rows[i] for i in random.sample(range(len(rows)), 8)]
        chats = [[*messages_of(r), {"role": "assistant", "content": r["answer"]}] for r in batch]
        encoded = encode(processor, chats, add_generation_prompt=False)
        ids = encoded["input_ids"]
        spoken = (ids == SPECIALS.index("<assistant>")).cumsum(1).roll(1, 1).bool()
        spoken[:, 0] = False
        model(**encoded, labels=ids.masked_fill(~spoken, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
