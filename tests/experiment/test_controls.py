"""Controls change what the teacher is shown, and an empty one leaves a gap of exactly 0."""

from pathlib import Path

import pytest
import tiny

from rlsd_lib import METHODS
from rlsd_lib.experiment.controls import (
    CONTROLS,
    PLAIN_TEMPLATE,
    apply_control,
    check_control,
    control_overrides,
)
from rlsd_lib.experiment.presets import resolve_parameters
from rlsd_lib.methods import PEER, PRIVILEGED
from rlsd_lib.runs.parameters import read_parameters
from rlsd_lib.runs.paths import find_notebook
from rlsd_lib.runs.suites import SUITES, jobs_of


@pytest.mark.parametrize("method", ["rlsd", "rlsd_neutral", "opsd"])
def test_the_gap_under_an_empty_reference_is_exactly_0(tmp_path, method):
    settings = {"teacher_model_kind": "live", "privileged_template": PLAIN_TEMPLATE, "max_steps": 2}
    gaps = {}
    for control in ("none", "empty"):
        data = apply_control(tiny.dataset(), control, seed=0)
        trainer = tiny.trainer(tmp_path / control, data=data, method=method, **settings)
        trainer.train()
        gaps[control] = [row["rlsd/gap_abs_mean"] for row in trainer.state.log_history[:-1]]
    assert gaps["empty"] == [0.0, 0.0]
    assert min(gaps["none"]) > 0.0


@pytest.mark.parametrize("control", CONTROLS)
def test_only_the_peer_control_is_an_override(tmp_path, control):
    args = tiny.config(tmp_path, method="rlsd", **control_overrides(control))
    assert args.row.teacher_sees == (PEER if control == "peer" else PRIVILEGED)
    data = tiny.dataset()
    assert (apply_control(data, control, seed=0) is data) == (control in ("none", "peer"))


@pytest.mark.parametrize("method", METHODS)
def test_a_control_needs_a_teacher_that_reads_the_reference(method):
    for control in CONTROLS:
        reads = METHODS[method].teacher_sees == PRIVILEGED
        if reads or control in ("none", "peer"):
            check_control(control, method)
        else:
            run = {"method": method, "preset": "lab", "seed": 0, "control": control}
            with pytest.raises(ValueError, match=f"means nothing for method='{method}'.*rlsd, "):
                resolve_parameters({**run, "max_steps": -1, "overrides": {}}, Path("unused"))


@pytest.mark.parametrize("suite", SUITES)
def test_every_control_of_a_suite_changes_something(suite):
    for job in jobs_of(suite):
        given = job.parameters
        if (control := given.get("control", "none")) != "none":
            declared = read_parameters(find_notebook(job.notebook))
            check_control(control, given.get("method", declared["method"].default))


def test_a_peer_replaces_a_reference_or_is_refused(tmp_path: Path):
    for method, row in METHODS.items():
        if row.teacher_sees == PRIVILEGED:
            extra = {"distillation_weight": 0.1} if row.needs_weight else {}
            tiny.config(tmp_path, method=method, peer_context=True, **extra)
        else:
            with pytest.raises(ValueError, match="no privileged_context that a peer could replace"):
                tiny.config(tmp_path, method=method, peer_context=True)
    with pytest.raises(ValueError, match="Did you mean 'peer'"):
        control_overrides("peers")
