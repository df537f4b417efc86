"""The page of recipes runs as written, with the tiny model in the place of the hub's."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import transformers
import trl
import yaml

import rlsd_lib

PAGE = (Path(__file__).resolve().parents[2] / "notebooks" / "recipes.md").read_text()
BLOCK = re.compile(r"```(\w+)(?: file=(\S+))?\n(.*?)```", re.DOTALL)
SESSION = [
    text for language, file, text in BLOCK.findall(PAGE) if language == "python" and not file
]
FILES = {file: text for _, file, text in BLOCK.findall(PAGE) if file}
[COMMAND] = [text.strip() for language, _, text in BLOCK.findall(PAGE) if language == "bash"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the model's name on the hub is the tiny model, with Qwen3's chat template."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen3-0.6B"
    tiny.model(max_position_embeddings=4096).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text()
    tokenizer.save_pretrained(folder)
    yield tmp_path
    transformers.logging.enable_progress_bar()


def test_the_page_runs_from_top_to_bottom(hub: Path) -> None:
    names: dict = {"__name__": "recipes"}
    trainers = []
    for number, block in enumerate(SESSION):
        exec(compile(block, f"recipes.md, block {number}", "exec"), names)
        trainers.append(names["trainer"])
    assert len(SESSION) == 6 and all(t.state.global_step == 2 for t in trainers)
    _, rlsd, viewed, own, lora, tools = trainers
    for trainer in (rlsd, viewed, own, lora, tools):
        assert trainer.state.log_history[0]["rlsd/gap_abs_mean"] > 0
    assert {p.name for p in (hub / "rlsd" / "credit").glob("*.html")} == {
        "step-000001.html",
        "step-000002.html",
    }
    assert own.credit is names["credit"]
    assert set(lora.model.peft_config) == {"default", "teacher"}
    assert [tool.__name__ for tool in tools.tools] == ["add"]


def test_from_grpo_to_rlsd_are_three_lines() -> None:
    """Beside the import: the configuration's name with its column, and the trainer's name."""
    first, second = (block.splitlines() for block in SESSION[:2])
    changed = [line for line in second if line.strip() and line not in first]
    assert len(changed) == 3
    assert changed[0].startswith("from rlsd_lib import")


def test_a_yaml_file_trains_on_two_processes(hub: Path) -> None:
    """`accelerate launch` as it stands there, after `accelerate config` for two CPU processes."""
    for name, text in FILES.items():
        (hub / name).write_text(text)
    assert set(yaml.safe_load(FILES["rlsd.yaml"])) - {"model_name_or_path"} <= set(
        rlsd_lib.RLSDConfig.__dataclass_fields__
    )
    configured = hub / "hf" / "accelerate" / "default_config.yaml"
    configured.parent.mkdir(parents=True)
    shipped = Path(rlsd_lib.__file__).parent / "experiment" / "accelerate" / "multi_cpu.yaml"
    shutil.copy(shipped, configured)
    here = {
        "HF_HOME": str(hub / "hf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(COMMAND.split(), env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (hub / "rlsd-yaml" / "model.safetensors").exists()
    # No reward is won by a random model, but both processes had a teacher.
    assert re.search(r"'rlsd/lambda': '0\.49", done.stdout)
