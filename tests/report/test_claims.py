"""Every claim can be reproduced and can fail to be, by runs that differ in what it is about."""

import json
from pathlib import Path

import pandas as pd
import pytest
from synthetic import PAPER, flat, ramp, write_folder, write_run

from rlsd_lib.measure.intervals import share_interval
from rlsd_lib.report.claims import (
    CLAIMS,
    CLEAN,
    MARGIN,
    NO_RUNS,
    NOT_REPRODUCED,
    NOT_SETTLED,
    NOT_TESTABLE,
    REPRODUCED,
    Part,
    claims_table,
    verdict,
)
from rlsd_lib.report.tables import Arms, together
from rlsd_lib.runs.records import Runs, read_runs

NOTHING = Runs(pd.DataFrame(), pd.DataFrame())
DOUBLE = {"steps": 120, "parameters": {"max_steps": 120}}
TRACE = {"parameters": {"preset": "lab-trace"}}
BARE = {"parameters": {"preset": "lab-bare"}}


def _write_rest(folder: Path, longer: float = 0.85, trace: float = 0.9) -> None:
    """GRPO at twice the steps, RLSD that is shown traces, and both without filler words."""
    for seed in range(3):
        write_run(folder / f"longer-s{seed}", "grpo", seed, after=longer, **DOUBLE)
        write_run(folder / f"trace-s{seed}", "rlsd", seed, after=trace, **TRACE)
        for method in ("grpo", "rlsd"):
            write_run(folder / f"bare-{method}-s{seed}", method, seed, **BARE)


def _judge(number: int, folder: Path, preset: str = "lab") -> str:
    return verdict(CLAIMS[number - 1].parts(Arms(read_runs(folder), preset)))


@pytest.fixture(scope="module")
def as_printed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Three seeds of everything, as the paper has it."""
    folder = tmp_path_factory.mktemp("as-printed")
    _write_rest(write_folder(folder, list(PAPER)))
    return read_runs(folder)


def test_runs_as_the_paper_has_them_reproduce_every_claim(as_printed: Runs) -> None:
    table = claims_table(as_printed, NOTHING)
    found = table.rows.set_index("claim")["verdict, lab"]
    assert found[found != REPRODUCED].to_dict() == {}
    assert len(found) == len(CLAIMS) and "real model" not in table.rows
    assert "rlsd - grpo: 0.100 [0.100, 0.100], n=3" in table.rows["lab"][1]
    assert table.rows["reproduced if"].tolist() == [claim.rule for claim in CLAIMS]


def test_a_claim_that_no_run_is_about_is_a_sentence_and_no_row(as_printed: Runs) -> None:
    some = Runs(*(frame[frame["method"].isin(["grpo", "rlsd"])] for frame in as_printed))
    some = some.of_preset("lab")
    for real in (NOTHING, some):
        rows, notes = claims_table(some, real)
        assert rows["#"].tolist() == ["1", "2", "4", "5", "6", "8", "10", "13"]
        (told,) = [note for note in notes if note.startswith("not measured: ")]
        assert "3, RLSD is above GRPO+OPSD (no runs); " in told
        assert "(most of the lab's entropy is filler words, and no runs are without them)" in told
        assert ("verdict, real model" in rows) == (real is some)
    assert claims_table(NOTHING, NOTHING).rows.empty


FALLING = {"reward": ramp(0.9, 0.6)}
AGAINST = [
    (1, {"sdpo": {"after": 0.95}}),
    (1, {"sdpo": {"after": 0.9}}),  # as good, which is no gain
    (2, {"rlsd": {"after": 0.75}}),
    (2, {"rlsd": {"after": 0.8}}),
    (3, {"grpo_opsd": {"after": 0.95}}),
    (3, {"grpo_opsd": {"after": 0.9}}),
    (5, {"rlsd": {"reward": ramp(0.4, 0.9)}}),
    (5, {"rlsd": {"reward": ramp(0.5, 0.8)}}),  # GRPO's own curve
    (6, {"opsd": {"reward": ramp(0.5, 0.8)}}),  # rises, and never falls
    (6, {"opsd": {"reward": lambda step: 0.5 * 0.8**step}}),  # falls from the start
    (6, {"opsd": {"reward": flat(0.5)}}),
    (6, {"rlsd": FALLING}),
    (6, {"rlsd": {"reward": flat(0.7)}}),
    (7, {"opsd_teacher_top1": {"rewards/leak/mean": ramp(0.0, 0.9)}}),  # another order
    (7, {"opsd_student_top1": {"rewards/leak/mean": ramp(0.05, 0.0)}}),  # no growth
    (7, {"opsd_teacher_top1": {"rewards/leak/mean": ramp(0.0, 0.5)}}),  # no order
    (8, {"rlsd": {"leak_after": 0.3}}),
    (9, {"opd": {"rlsd/divergence": ramp(0.07, 0.065)}}),
    (9, {"opsd": {"rlsd/divergence": ramp(0.07, 0.01)}}),
    (10, {"rlsd": {"rlsd/clip_high_frac": flat(0.08)}}),
    (10, {"rlsd": {"rlsd/clip_low_frac": flat(0.005)}}),
    (11, {"grpo": {"entropy": flat(0.42), **BARE}}),
    (11, {"rlsd": {"entropy": ramp(0.42, 0.2), **BARE}}),
    (13, {"rlsd": {"step_time": lambda step: 1.3 if step < 50 else 0.5}}),  # 0.7 over all
]


def test_a_claim_fails_on_runs_that_speak_against_it(as_printed: Runs, tmp_path: Path) -> None:
    for row, (number, looks) in enumerate(AGAINST):
        others = Runs(*(frame[~frame["method"].isin(list(looks))] for frame in as_printed))
        changed = read_runs(write_folder(tmp_path / str(row), list(looks), **looks))
        parts = CLAIMS[number - 1].parts(Arms(together(others, changed), "lab"))
        assert verdict(parts) == NOT_REPRODUCED, f"row {row}, claim {number}: {CLAIMS[number - 1]}"


def test_claims_about_other_runs_fail_too(tmp_path: Path) -> None:
    for longer in (0.95, 0.9):
        folder = write_folder(tmp_path / str(longer), ["grpo", "rlsd"])
        _write_rest(folder, longer=longer, trace=0.99)
        assert _judge(4, folder) == NOT_REPRODUCED, longer
        assert _judge(12, folder) == NOT_REPRODUCED
    refuted = {4, 12} | {number for number, _ in AGAINST}
    assert refuted == set(range(1, len(CLAIMS) + 1))


def test_a_border_of_0_refutes_where_there_is_no_difference_of_the_margin() -> None:
    for sign, border in ((1, {"low": 0.0}), (-1, {"high": 0.0})):
        for middle, spread, expected in (
            (0.03, 0.002, REPRODUCED),
            (-0.03, 0.002, NOT_REPRODUCED),
            (0.002, 0.004, NOT_REPRODUCED),  # [-0.008, 0.012]
            (0.0, 0.02, NOT_SETTLED),
            (0.015, 0.008, NOT_SETTLED),  # [-0.005, 0.035]
        ):
            values = sign * (middle + spread * pd.Series([-1.0, 0.0, 1.0]))
            assert verdict([Part("gain", values, **border)]) == expected, (sign, middle, spread)


def test_no_leak_can_be_shown_by_the_lab_and_not_by_few_completions(tmp_path: Path) -> None:
    assert (
        share_interval([False] * CLEAN).high < MARGIN < share_interval([False] * (CLEAN - 1)).high
    )
    for problems, expected in ((250, REPRODUCED), (24, NOT_SETTLED)):
        folder = write_folder(tmp_path / str(problems), ["grpo"], grpo={"leak_after": 0.0})
        clean = share_interval([False] * problems)
        for seed in range(3):
            path = write_run(folder / f"rlsd-s{seed}", "rlsd", seed)
            metrics = json.loads((path / "metrics.json").read_text())
            metrics |= {"leak_rate_after": 0.0, "leak_rate_after_high": clean.high}
            (path / "metrics.json").write_text(json.dumps(metrics))
        parts = CLAIMS[7].parts(Arms(read_runs(folder)))
        assert verdict(parts) == expected, problems
        assert ("too few completions" in parts[0].name) == (expected == NOT_SETTLED)


def test_the_entropy_of_filler_words_says_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"])
    [part] = CLAIMS[10].parts(Arms(read_runs(tmp_path)))
    assert verdict([part]) == NOT_TESTABLE
    assert "filler words" in str(part)


@pytest.mark.parametrize(("late", "expected"), [(0.7, REPRODUCED), (0.99, NOT_REPRODUCED)])
def test_without_longer_runs_half_a_run_stands_for_n_steps(late, expected, tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"], grpo={"reward": ramp(0.5, late)})
    [part] = CLAIMS[3].parts(Arms(read_runs(tmp_path)))
    assert part.name == "training reward, rlsd, 30 steps - grpo, 60 steps"
    assert verdict([part]) == expected


def test_one_seed_and_seeds_that_disagree_settle_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", ["grpo", "rlsd"], seeds=1)
    write_run(tmp_path / "one" / "sdpo", "sdpo", 0, after=0.95)
    assert _judge(1, tmp_path / "one") == "one seed: not decided, speaks against"
    assert _judge(2, tmp_path / "one") == "one seed: not decided, speaks for"
    (tmp_path / "one" / "sdpo" / "metrics.json").unlink()  # best of those that were run is not best
    assert _judge(1, tmp_path / "one") == "one seed: not decided"
    for value, slack in (
        (0.0, 0.0),
        (0.04, 0.05),
    ):  # a tie, and what too few completions leave open
        [part] = [Part("", pd.Series([value]), low=0.0, slack=slack)]
        assert verdict([part]) == "one seed: not decided"
    write_folder(tmp_path / "three", ["grpo"])
    for seed, after in enumerate((0.7, 0.9, 0.85)):
        write_run(tmp_path / "three" / f"rlsd-s{seed}", "rlsd", seed, after=after)
    assert _judge(2, tmp_path / "three") == NOT_SETTLED


def test_what_was_not_run_or_cannot_be_seen_is_no_verdict(tmp_path: Path) -> None:
    write_folder(tmp_path / "some", ["grpo", "rlsd"])
    assert _judge(3, tmp_path / "some") == NO_RUNS
    assert _judge(1, tmp_path / "some") == NOT_SETTLED  # best of those that were run is not best
    early = {"steps": 20, "parameters": {"preset": "smollm2"}}
    short = {method: {"steps": 20} for method in ("grpo", "rlsd", "opsd")}
    write_folder(tmp_path / "short", list(short), **short)
    assert _judge(6, tmp_path / "short") == NOT_TESTABLE
    write_folder(tmp_path / "real", ["grpo", "rlsd"], grpo=early, rlsd=early)
    parts = CLAIMS[10].parts(Arms(read_runs(tmp_path / "real")))
    assert "lambda is above 0 to the end" in str(parts[1])
    assert verdict(parts) != REPRODUCED


def test_only_plain_finished_runs_of_the_right_length_count(tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"])
    others = [
        {"parameters": {"overrides": {"epsilon_w": 0.9}}},
        {"parameters": {"control": "shuffled"}},
        {"parameters": {"preset": "lab-bare"}},
        {"status": "failed"},
        {"steps": 30, "parameters": {"max_steps": 30}},
    ]
    for number, other in enumerate(others):
        write_run(tmp_path / f"other-{number}", "rlsd", 7 + number, after=0.0, **other)
    arms = Arms(read_runs(tmp_path))
    assert (arms.preset, arms.length) == ("lab", 60)
    assert arms.final("rlsd", "accuracy_after").index.tolist() == [0, 1, 2]
    table = claims_table(read_runs(tmp_path), NOTHING)
    assert any("INCOMPLETE, 1 left out: other-3 (failed)" in note for note in table.notes)
    assert any(note.startswith("failed, not in the table") for note in table.notes)


def test_answer_and_trace_are_compared_at_the_length_of_the_trace(tmp_path: Path) -> None:
    write_folder(tmp_path / "paper", ["rlsd"])
    short = {"steps": 30, "after": 0.6}
    for seed in range(3):
        for preset, after in (("lab", 0.6), ("lab-trace", 0.59)):
            given = {"preset": preset, "max_steps": 30}
            path = tmp_path / "ablations" / f"{preset}-s{seed}"
            write_run(path, "rlsd", seed, **{**short, "after": after}, parameters=given)
    runs = together(*(read_runs(tmp_path / name) for name in ("paper", "ablations")))
    [part] = CLAIMS[11].parts(Arms(runs))
    assert part.values.tolist() == pytest.approx([0.01] * 3)


def test_agreement_between_seeds_does_not_hide_what_each_leaves_open() -> None:
    agreed = pd.Series([0.0, 0.0, 0.0])
    assert verdict([Part("leak", agreed, high=0.02, slack=0.015)]) == REPRODUCED
    assert verdict([Part("leak", agreed, high=0.02, slack=0.14)]) == NOT_SETTLED
    assert verdict([Part("leak", agreed + 0.3, high=0.02, slack=0.14)]) == NOT_REPRODUCED
