"""The paper's numbers agree with one another and with the package's method names."""

import pytest

from rlsd_lib.methods import METHODS
from rlsd_lib.report.benchmarks import BENCHMARKS as OURS
from rlsd_lib.report.paper_numbers import AVERAGE, BENCHMARKS, figure_1b, table_2
from rlsd_lib.report.paper_tables import QUESTIONS, paper_difference


def test_the_printed_averages_are_the_means_of_their_rows():
    table = table_2()
    means = table[list(BENCHMARKS)].mean(axis=1)
    assert (means - table[AVERAGE]).abs().max() <= 0.005 + 1e-9


def test_rows_are_methods_of_this_package():
    assert set(table_2().index) - {"base"} <= set(METHODS)


def test_figure_1b_takes_the_200_steps_from_table_2():
    figure = figure_1b()
    assert figure.loc["grpo, 400 steps", "MMMU"] == 67.4
    # RLSD at 200 steps against GRPO at 400: a fifth of a point behind on MMMU, ahead on the others.
    lead = figure.loc["rlsd, 200 steps"] - figure.loc["grpo, 400 steps"]
    assert lead.to_dict() == pytest.approx({"MMMU": -0.18, "MathVista": 1.4, "ZeroBench": 2.55})


def test_what_was_counted_can_be_told_from_the_shares():
    """A share of n questions can take n + 1 values, and 27 of 30 cells are among them; by chance it
    would be one in eight. WeMath's score counts half points of 525 problems."""
    questions = {name: OURS[name].questions for name in BENCHMARKS} | {"WeMath": 1050}
    cells = table_2()[list(BENCHMARKS)].stack()
    count = cells.index.get_level_values(1).map(questions)
    shares = (100 * (cells / 100 * count).round() / count).round(2)
    odd = [("grpo", "ZeroBench"), ("opsd", "MMMU"), ("opsd", "ZeroBench")]
    assert cells.index[shares != cells].tolist() == odd
    assert not (table_2()["ZeroBench"] % 1 == 0).any()  # so not ZeroBench's 100 main questions
    vision = table_2()["MathVision"]
    assert ((vision * 3.04).round() / 3.04 - vision).abs().max() > 0.1  # nor MathVision's 304


def test_only_mathvision_tells_rlsd_from_grpo_by_two_standard_errors():
    rows = paper_difference().rows.set_index("benchmark")
    errors = rows["standard errors"]
    assert errors.index[errors.abs() > 2].tolist() == ["MathVision", AVERAGE]
    assert rows.loc["MathVision", "rlsd - grpo"] == "3.91 [1.40, 6.42]"
    assert rows.loc["MathVista", "rlsd - grpo"].startswith("1.90 [-1.7")
    # The average is carried by it: without MathVision it is 1.4 standard errors.
    others = [name for name in BENCHMARKS if name != "MathVision"]
    gain = (table_2().loc["rlsd", others] - table_2().loc["grpo", others]).sum()
    shares = table_2().loc[["rlsd", "grpo"], others] / 100
    variance = (shares * (1 - shares)).sum() / [QUESTIONS[name] for name in others]
    apart = gain / (100 * variance.sum() ** 0.5)
    assert (
        errors["average without MathVision"]
        == pytest.approx(apart)
        == pytest.approx(1.43, abs=0.01)
    )
    assert rows.loc[AVERAGE, "rlsd - grpo"] == "2.32 [0.16, 4.48]"
    turned = paper_difference("grpo", "rlsd").rows["benchmark"]
    assert turned.iloc[-1] == "average without MathVision", "the clearest, whichever is ahead"
    assert rows.loc[AVERAGE, "rlsd"].startswith("56.18 [")
