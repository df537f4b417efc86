"""The package installs the same way everywhere, and costs nothing to import."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import rlsd_lib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = ("workbook", "gguf", "vlm", "dev")  # what `make` and conda install


def _by_name(lines: list[str]) -> dict[str, SpecifierSet]:
    found = [Requirement(line) for line in lines]
    assert len({r.name for r in found}) == len(found), "a requirement stands twice"
    return {r.name: r.specifier for r in found}


def test_environment_yml_says_the_same_as_pyproject() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    stated = [line for line in pip if not line.startswith("--editable")]
    wanted = [*PROJECT["dependencies"], *(line for name in INSTALLED for line in EXTRAS[name])]
    assert _by_name(stated) == _by_name(wanted)
    assert f"python{PROJECT['requires-python']}" in conda
    assert "--editable ." in pip


def test_make_installs_the_extras_that_the_environment_states() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f'".[{",".join(INSTALLED)}]"' in makefile
    [torch] = re.findall(r'"torch==([\d.]+)"', makefile)
    assert torch in _by_name(PROJECT["dependencies"])["torch"]


def test_trl_is_pinned_exactly_and_the_rest_within_what_vllm_accepts() -> None:
    pins = _by_name(PROJECT["dependencies"])
    assert str(pins["trl"]) == "==1.16.0"
    assert "5.10.3" not in pins["transformers"]
    assert "5.18.0" not in pins["transformers"]
    assert "2.14.0" not in pins["torch"]
    assert [str(s) for s in _by_name(EXTRAS["vllm"]).values()] == ["==0.31.0"]


def _loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_an_import_loads_no_more_than_it_needs() -> None:
    for statement, absent in (
        ("import rlsd_lib", {"torch", "trl", "transformers", "pandas", "matplotlib"}),
        ("import rlsd_lib.credit", {"trl", "transformers", "accelerate", "pandas"}),
        ("from rlsd_lib import Run", {"torch", "trl", "transformers"}),
        ("import rlsd_lib.__main__", {"torch", "trl", "transformers", "pandas", "papermill"}),
        ("import rlsd_lib.report.plots", {"torch", "trl", "transformers"}),
    ):
        assert absent & _loaded_after(statement) == set(), statement


def test_the_trainer_needs_nothing_of_the_workbook() -> None:
    """With the extra's own packages out of reach, the trainer is there and the viewer says why not."""
    # What TRL's own dependencies bring.
    shared = {"filelock", "numpy", "pandas", "pyyaml", "psutil", "tqdm"}
    own = {name for name in _by_name(EXTRAS["workbook"]) if name not in shared}
    absent = [module for module, names in packages_distributions().items() if own & set(names)]
    assert len(absent) >= len(own)
    block = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        _loaded_after(f"{block}from rlsd_lib import RLSDTrainer\nfrom rlsd_lib import CreditViewer")
    assert "ImportError: rlsd_lib.CreditViewer" in failed.value.stderr
    assert "[workbook]" in failed.value.stderr


def test_every_public_name_exists_and_an_unknown_one_says_what_there_is() -> None:
    for name in rlsd_lib.__all__:
        assert getattr(rlsd_lib, name) is not None
        assert name in dir(rlsd_lib)
    with pytest.raises(AttributeError, match=r"'RLSDTrainr'.*RLSDTrainer"):
        _ = rlsd_lib.RLSDTrainr


def test_every_test_file_that_make_names_exists() -> None:
    for path in re.findall(r"\btests/[\w/.]+", (ROOT / "Makefile").read_text()):
        assert (ROOT / path).exists(), path
