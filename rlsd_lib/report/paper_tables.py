"""Table 2: the paper's numbers with the intervals that they lack, and beside them ours.

Ours come from finished run directories alone.
"""

from math import hypot, sqrt
from pathlib import Path

import numpy as np
import pandas as pd

from rlsd_lib.measure.intervals import Interval, share_difference, share_interval, student_interval
from rlsd_lib.report.benchmarks import BENCHMARKS, read_scores
from rlsd_lib.report.paper_numbers import AVERAGE, SOURCE, table_2
from rlsd_lib.report.tables import DASH, Table, settings_of, source_notes
from rlsd_lib.runs.records import Runs, is_finished, is_number

BASE = "base"  # the row of the untrained model
HELD_OUT = "held out"  # the data's own test split, judged by the task's verifier
SETTINGS = ("overrides", "control", "max_steps")  # what makes two trainings of a method differ


# The printed shares are counts of so many (a test says which are not). WeMath counts half points of
# 525 problems, which the benchmark makes of its 1,740 questions: a binomial of 525 is no narrower.
QUESTIONS = {name: BENCHMARKS[name].questions for name in table_2().columns.drop(AVERAGE)}
QUESTIONS |= {"WeMath": 525}


def paper_difference(first: str = "rlsd", second: str = "grpo") -> Table:
    """Return two methods of the paper's Table 2 and their difference, in per cent, by benchmark.

    Wilson's intervals of the shares and Newcombe's of the difference, taken as independent, which is
    on the safe side; the averages' are normal. The last column is the difference in standard errors.
    """
    given, rows = table_2().loc[[first, second], list(QUESTIONS)] / 100, []
    variances = 1e4 * given * (1 - given) / pd.Series(QUESTIONS)
    for name, n in QUESTIONS.items():
        shares = [share_interval(np.arange(n) < round(n * x))._replace(mean=x) for x in given[name]]
        cells = [*shares, share_difference(*shares)]
        shown = [f"{Interval(*(100 * value for value in cell)):.2f}" for cell in cells]
        rows.append((name, str(n), *shown, 100 * cells[-1].mean / sqrt(variances[name].sum())))
    clearest = max(rows, key=lambda row: abs(row[-1]))[0]
    for name, left in {AVERAGE: [], f"{AVERAGE} without {clearest}": [clearest]}.items():
        means = 100 * given.drop(columns=left).mean(axis=1)
        errors = variances.drop(columns=left).sum(axis=1) ** 0.5 / (len(QUESTIONS) - len(left))
        means["less"], errors["less"] = means.iloc[0] - means.iloc[1], hypot(*errors)
        ends = zip(means, means - 1.96 * errors, means + 1.96 * errors, strict=True)
        rows.append((name, DASH, *(f"{Interval(*x):.2f}" for x in ends), (means / errors)["less"]))
    columns = ["benchmark", "questions", first, second, f"{first} - {second}", "standard errors"]
    notes = [
        f"{SOURCE}: 95 % intervals over questions, ours; none over training runs can be had",
        "questions: assumed to be the public splits (MMMU val, MathVista testmini, MathVision test, "
        "ZeroBench's sub-questions); WeMath's score is one of 525 problems",
    ]
    return Table(pd.DataFrame(rows, columns=columns), notes)


def compare(runs: Runs, preset: str, own: Path | None = None) -> Table:
    """Return Table 2 in per cent: for each method the paper's numbers and, below, those of `runs`.

    Columns are the benchmarks that the runs of `preset` named, their average, and the held-out split;
    a run with settings of its own has a row. A cell is the mean over seeds with its 95 % Student
    interval, or one seed's share with its own. Shares lie in a run's benchmarks/after, the untrained
    model's in benchmarks/before of plain runs. `own` is a run with metrics, not closed yet. Raises
    ValueError for results that `read_scores` refuses.
    """
    frame = runs.runs
    if own is not None:
        open_run = frame["path"] == str(own.resolve())
        frame = frame.assign(status=frame["status"].mask(open_run, "finished"))
    finished = [run for _, run in frame[is_finished(frame)].iterrows()]
    chosen = [run for run in finished if run["parameters"].get("preset") == preset]
    asked = (name for run in chosen for name in run["parameters"].get("benchmarks", ()))
    names = list(dict.fromkeys(asked))
    cells = [cell for run in chosen for cell in _cells(run)]
    found = pd.DataFrame(cells, columns=["method", "column", *Interval._fields, "seed"])
    # Runs with one seed and the same settings are no other sample.
    found = found.drop_duplicates(["method", "column", "seed"])
    printed, rows = table_2().map("{:.2f}".format), []
    for method in dict.fromkeys([*printed.index, *sorted(found["method"])]):
        if method in printed.index:
            rows.append({"method": method, "from": "the paper", **printed.loc[method]})
        mine = found[found["method"] == method]
        ours = {name: _ours(mine[mine["column"] == name]) for name in (*names, HELD_OUT)}
        rows.append({"method": method, "from": "ours", **ours, AVERAGE: _average(mine, names)})
    columns = ["method", "from", *names, AVERAGE, HELD_OUT]
    table = pd.DataFrame(rows, columns=columns).fillna(DASH)
    notes = [f"the paper: {SOURCE}", f"ours: {', '.join(run['path'] for run in chosen) or 'none'}"]
    return Table(table, [*notes, *source_notes(runs._replace(runs=frame))])


def _cells(run: pd.Series) -> list[tuple]:
    """A run's shares on benchmarks and held-out problems, and those of the model it began with."""
    given = run["parameters"]
    settings = settings_of({name: given[name] for name in SETTINGS if name in given})
    rows = {"after": given["method"] + (f" ({settings})" if settings else "")}
    if not given.get("overrides") and given.get("control", "none") == "none":
        rows["before"] = BASE
    cells = []
    for when, row in rows.items():
        folder = Path(run["path"], "benchmarks", when)
        scores = read_scores(folder, given.get("benchmarks", ()))
        held_out = Interval(*(run.get(f"accuracy_{when}{end}") for end in ("", "_low", "_high")))
        if is_number(held_out.mean):
            scores[HELD_OUT] = held_out
        cells += [(row, column, *score, run["seed"]) for column, score in scores.items()]
    return cells


def _ours(found: pd.DataFrame) -> str:
    """The mean over seeds with its interval, one seed's own, or a dash."""
    shares = [Interval(*100 * row) for row in found[list(Interval._fields)].to_numpy(float)]
    if len(shares) < 2:
        return f"{shares[0]:.2f}" if shares else DASH
    return f"{student_interval([share.mean for share in shares]):.2f} (n={len(shares)})"


def _average(found: pd.DataFrame, names: list[str]) -> str:
    """The mean over benchmarks, of each benchmark's mean over seeds; a dash where one is missing."""
    means = found[found["column"].isin(names)].groupby("column")["mean"].mean()
    return f"{100 * means.mean():.2f}" if len(means) == len(names) > 0 else DASH
