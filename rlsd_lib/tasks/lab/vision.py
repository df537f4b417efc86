"""Coloured squares in the schema of the paper's data, and a toy model that looks at them: offline.

The squares go through `rlsd_lib.tasks.mmfinereason` like any other folder; each of the four problem
types occurs, with no image, one or two. The model has Qwen3-VL's own classes, character tokens, and
two text and two vision layers, briefly taught the form of the answers, so that some rollouts are
right. Both try out every part of the paper's path; nothing is measured with them.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BaseVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import PushToHubMixin

from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.tasks import mmfinereason
from rlsd_lib.tasks.cache import write_once
from rlsd_lib.tasks.encode import encode, messages_of
from rlsd_lib.tasks.task import Task

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200)}
SIDE = 8  # pixels of a square
AREAS = {"min_area": 64, "max_area": 4096}  # so small an image is left as it is
ROWS = 160

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
SPECIALS = ("<pad>", "</s>", "<system>", "<user>", "<assistant>", "<unk>")
IMAGES = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}, "merge_size": 2}


def load(*, train_size: int, test_size: int, seed: int, **options: Any) -> Task:
    """Build the task of coloured squares; `options` as in `mmfinereason.load`.

    Its folder of rows.jsonl and images/ is written on first use, under the outputs' cache.
    """
    source = str(write_once(outputs_root() / "cache" / f"colours-{ROWS}", _write_squares))
    sizes = {"train_size": train_size, "test_size": test_size, "seed": seed}
    return mmfinereason.load(source=source, **sizes, **AREAS, **options)


def _write_squares(folder: Path) -> None:
    (folder / "images").mkdir()
    lines = []
    for index in range(ROWS):
        row, pictures = _row(index, Random(index))
        row["images"] = [f"images/{index}-{n}.png" for n in range(len(pictures))]
        for name, picture in zip(row["images"], pictures, strict=True):
            picture.save(folder / name)
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))


def _row(index: int, random: Random) -> tuple[dict[str, Any], list[Image.Image]]:
    """One row in the schema of `mmfinereason.FIELDS`, and its pictures; the types take turns."""
    kind = ("multiple choice", "boolean", "numerical", "math")[index % 4]
    names = random.choices(sorted(COLOURS), k=(1, 2, 0, 1)[index % 4])
    count, other = random.randrange(1, 4), random.randrange(1, 7)
    problem, answer = {
        "multiple choice": lambda: ("Which colour?\nA. blue\nB. green\nC. red", _letter(names[0])),
        "boolean": lambda: ("The same colour?", "Yes" if len(set(names)) == 1 else "No"),
        "numerical": lambda: (f"Problem {index}: {count} + {other} = ?", str(count + other)),
        "math": lambda: ("How many squares?", str(count)),
    }[kind]()
    row = {
        "problem": "<image>" * len(names) + problem,
        "answer": answer,
        "problem_type": kind,
        "data_type": "image" if names else "text",
        "videos": [],
        mmfinereason.TRACE: f"I look closely. The answer is {answer}.",
    }
    return row, [_picture(name, count if kind == "math" else 1, random) for name in names]


def _letter(colour: str) -> str:
    return "ABC"[sorted(COLOURS).index(colour)]


def _picture(colour: str, squares: int, random: Random) -> Image.Image:
    """Squares of one colour side by side, with some noise: no two pictures are equal."""
    noise = np.random.default_rng(random.randrange(2**31)).integers(-30, 31, (SIDE, 8 * squares, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def chat_template(image: str) -> str:
    """Turns as `<role>text</s>`, where each image is written as `image`."""
    return (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


CHAT_TEMPLATE = chat_template(START + IMAGE + END)


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
    extra: Sequence[str] = (START, END, IMAGE, VIDEO),
    template: str = CHAT_TEMPLATE,
    padding_side: str = "left",
    **named: str,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of printable characters and the special tokens of a family.

    `named` are special tokens by attribute, as some families' processors ask for them.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[*SPECIALS[2:5], *extra],
        model_specific_special_tokens=named,
        chat_template=template,
        padding_side=padding_side,
    )


def build_processor(padding_side: str = "left") -> Qwen3VLProcessor:
    """Return Qwen3-VL's processor, for images of at most 1024 pixels."""
    tokenizer = build_tokenizer(padding_side=padding_side)
    images = Qwen2VLImageProcessorPil(**IMAGES)
    return Qwen3VLProcessor(images, tokenizer, NoVideos(), chat_template=CHAT_TEMPLATE)


def text_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Return the text side of a toy; wide weights, so that images and references are felt."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return {**sizes, **heads, **tokens, "initializer_range": 0.3, **changes}


def image_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the token ids that Qwen's configurations ask for."""
    names = {"image": IMAGE, "video": VIDEO, "vision_start": START, "vision_end": END}
    return {f"{n}_token_id": tokenizer.convert_tokens_to_ids(token) for n, token in names.items()}


def rope(*sections: int) -> dict[str, Any]:
    """Return rotary embeddings over time, height and width."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections)}


def build_model(seed: int = 0, **text: Any) -> Qwen3VLForConditionalGeneration:
    """Return the untrained model; `text` are fields of its text configuration."""
    tokenizer = build_tokenizer()
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope(4, 2, 2), **text),
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
        **image_ids(tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)


def load_toy(
    cache_dir: str | Path, *, steps: int = 120, seed: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Return the taught model (float32, CPU, eval mode) and its processor; taught on first use."""
    folder = write_once(
        Path(cache_dir) / f"toy-vlm-{steps}-{seed}",
        lambda new: teach(steps, seed).save_pretrained(new),
    )
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), build_processor()


def teach(steps: int, seed: int) -> Qwen3VLForConditionalGeneration:
    """Imitate the bare answers of the training side of the squares; torch's seed is left alone."""
    rows = load(train_size=-1, test_size=-1, seed=0).train
    model = build_model(seed, initializer_range=0.05).train()
    processor, random = build_processor(), Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = [rows[i] for i in random.sample(range(len(rows)), 8)]
        chats = [[*messages_of(r), {"role": "assistant", "content": r["answer"]}] for r in batch]
        encoded = encode(processor, chats, add_generation_prompt=False)
        ids = encoded["input_ids"]
        spoken = (ids == SPECIALS.index("<assistant>")).cumsum(1).roll(1, 1).bool()
        spoken[:, 0] = False
        model(**encoded, labels=ids.masked_fill(~spoken, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
