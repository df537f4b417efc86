"""What a folder of runs has shown, in a table and sentences."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import write_folder, write_run

from rlsd_lib.__main__ import main
from rlsd_lib.report.learned import course, learned
from rlsd_lib.runs.records import read_runs
from rlsd_lib.runs.run import Run


def test_one_seed_says_what_was_seen_and_that_it_settles_nothing(tmp_path: Path, capsys) -> None:
    for method, after, leak in (("grpo", 0.8, 0.0), ("rlsd", 0.8, 0.0), ("opsd", 0.1, 0.9)):
        config = {"learning_rate": 1e-3} if method == "opsd" else {}
        numbers = {"after": after, "leak_after": leak, "config": config}
        folder = write_run(tmp_path / method[0], method, 0, **numbers)
        Run.attach(folder).add_evaluation("after", correct=[after - 0.1, after + 0.1] * 20)
        if method == "rlsd":
            metrics = json.loads((folder / "metrics.json").read_text())
            (folder / "metrics.json").write_text(json.dumps({**metrics, "rlsd/intervention": 0.03}))
    (tmp_path / "r" / "15_rlsd.ipynb").touch()
    rows, said = learned(read_runs(tmp_path))
    assert rows["method"].tolist() == ["grpo", "opsd", "rlsd"]
    seen, unseen, moved, leak, rates, trust = said
    assert rates.endswith("more than the method: grpo 0.0001, opsd 0.001, rlsd 0.0001.")
    assert moved == "Intervention, the mean of |token advantage / A - 1| (0 is GRPO's): rlsd 0.030."
    assert seen.startswith("Seen, accuracy minus grpo's: opsd -0.700 [")
    assert unseen.startswith("Not seen: rlsd +0.000 [")
    assert leak.startswith("opsd speaks of a reference that it was not shown in 90%")
    assert "from 0.500 to 0.098; the lab is a model organism" in leak
    assert trust.startswith("One seed settles nothing")

    assert main(["table", str(tmp_path), "--learned"]) == 0
    *lines, path = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 78
    assert path == str(tmp_path / "r" / "15_rlsd.ipynb")


def test_several_seeds_are_the_unit(tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"], seeds=3)
    said = learned(read_runs(tmp_path)).notes
    assert said[0].startswith("Seen, accuracy minus grpo's: rlsd +0.033 [")
    assert said[1] == "Every difference was seen."
    assert said[2] == "No method speaks of a reference in 5% of its completions."
    assert said[3].startswith("The intervals are over 3 seeds")
    with pytest.raises(ValueError, match="no finished run of 'sdpo'"):
        learned(read_runs(tmp_path), "sdpo")


def test_the_course_of_a_curve_is_told_by_its_ends_and_its_peak() -> None:
    """Of 30 steps the last ten had no teacher: tenths are of the 20 with a value."""
    values = [0.1, 0.3, *[0.5] * 10, 0.9, *[0.5] * 5, 0.02, 0.04, *[np.nan] * 10]
    steps = pd.DataFrame({"step": range(1, 31), "rlsd/intervention": values, "novel": 1.0})
    assert course(steps, "rlsd/intervention") == (
        "mean of |token advantage / A - 1|: 0.2 in the first 2 of 20 steps that log it, 0.03 in the "
        "last; the largest 0.9, at step 13."
    )
    short = course(steps.head(2), "novel")
    assert short == "novel: 1 in the first of 2 steps, 1 in the last; the largest 1, at step 1."
