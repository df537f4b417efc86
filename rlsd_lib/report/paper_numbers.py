"""What the paper prints (arXiv 2604.03128 v2): numbers to stand beside ours, never among them.

Accuracy in per cent of Qwen3-VL-8B-Instruct after 200 steps, one run each, without interval; which
checkpoint, which prompts and which sampling were evaluated is not reported.
"""

import pandas as pd

SOURCE = "arXiv 2604.03128 v2, Table 2: Qwen3-VL-8B-Instruct, one run each, no interval, per cent"
BENCHMARKS = ("MMMU", "MathVista", "MathVision", "ZeroBench", "WeMath")
AVERAGE = "average"

# Rows are keys of `METHODS`, and "base" for the model before training; the last is the average.
TABLE_2 = {
    "base": (62.44, 73.80, 47.37, 19.76, 54.10, 51.49),
    "grpo": (65.11, 76.20, 48.82, 22.60, 56.57, 53.86),
    "opsd": (63.82, 75.10, 47.53, 21.06, 54.95, 52.49),
    "sdpo": (65.11, 74.00, 47.27, 25.15, 52.19, 52.74),
    "grpo_opsd": (63.22, 75.90, 48.52, 22.16, 54.76, 52.91),
    "rlsd": (67.22, 78.10, 52.73, 24.85, 58.00, 56.18),
}

# Figure 1b: GRPO trained twice as long (400 steps) on three of the benchmarks.
FIGURE_1B = {"MMMU": 67.4, "MathVista": 76.7, "ZeroBench": 22.3}

# Read from the figures by eye. 3c, nats per token: on-policy divergence at the start and the end.
FIGURE_3C = {"opd": (0.070, 0.018), "opsd": (0.012, 0.012)}
# 5b, nats per token: entropy at the start and at step 70; for RLSD the range over the whole run.
FIGURE_5B = {"grpo": (0.42, 0.25), "rlsd": (0.40, 0.45)}
# 5c, per cent: the range over the run of the share of tokens whose weight is clipped.
FIGURE_5C = {"high": (2.5, 6.0), "low": (1.6, 3.3)}


def table_2() -> pd.DataFrame:
    """Table 2 as printed: a row per method, a column per benchmark and the printed average."""
    return pd.DataFrame.from_dict(TABLE_2, orient="index", columns=[*BENCHMARKS, AVERAGE])


def figure_1b() -> pd.DataFrame:
    """Figure 1b: GRPO at 200 and at 400 steps and RLSD at 200, a row each."""
    figure = table_2().loc[["grpo", "rlsd"], list(FIGURE_1B)].rename("{}, 200 steps".format)
    figure.loc["grpo, 400 steps"] = FIGURE_1B
    return figure.sort_index()
