"""Controls change what the teacher reads, and an empty one leaves a gap of exactly 0."""

import pytest
import tiny

from rlsd_lib import METHODS
from rlsd_lib.experiment.controls import CONTROLS, PLAIN_TEMPLATE, apply_control, check_control
from rlsd_lib.experiment.presets import RunParameters
from rlsd_lib.methods import NEEDS_WRONG, PEER, PRIVILEGED
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


def test_a_control_needs_a_teacher_that_reads_the_reference():
    for method, row in METHODS.items():
        for control in CONTROLS:
            if row.teacher_sees == PRIVILEGED or control == "none":
                check_control(control, method)
            else:
                with pytest.raises(ValueError, match=f"means nothing for method='{method}'.*rlsd,"):
                    RunParameters(method, "lab", control=control).resolve()


def test_every_control_of_a_suite_changes_something():
    controlled = 0
    for job in (job for suite in SUITES for job in jobs_of(suite)):
        given = job.parameters
        if (control := given.get("control", "none")) != "none":
            declared = read_parameters(find_notebook(job.notebook))
            check_control(control, given.get("method", declared["method"].default))
            controlled += 1
    assert controlled > 10


def test_a_peer_in_place_of_the_reference_is_an_override():
    for method, row in METHODS.items():
        overrides = {"peer_context": True}
        overrides |= {"distillation_weight": 0.1} if row.needs_weight else {}
        run = RunParameters(method, "lab", overrides=overrides)
        if row.asks & NEEDS_WRONG:
            with pytest.raises(ValueError, match="compares the reference with another row's"):
                run.resolve()
        elif row.teacher_sees == PRIVILEGED:
            assert run.resolve().config.row.teacher_sees == PEER, method
        else:
            with pytest.raises(ValueError, match="no privileged_context that a peer could replace"):
                run.resolve()
    shown = ["peer_context" in job.parameters.get("overrides", {}) for job in jobs_of("controls")]
    assert sum(shown) == 3, "one run per seed"
