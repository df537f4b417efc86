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
    assert len(SESSION) == 3 and all(t.state.global_step == 2 for t in trainers)
    for trainer in trainers:
        assert trainer.state.log_history[0]["rlsd/gap_abs_mean"] > 0
    _, own, tools = trainers
    assert own.credit is names["credit"]
    assert [tool.__name__ for tool in tools.tools] == ["add"]


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
