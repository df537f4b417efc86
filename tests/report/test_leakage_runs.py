"""Leakage of runs: what cannot be measured, and the panel of measures."""

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from synthetic import write_run

from rlsd_lib.experiment.presets import PRESETS
from rlsd_lib.report import leakage_runs, plots
from rlsd_lib.report.leakage_runs import accuracies, not_measured, report_runs
from rlsd_lib.report.tables import with_arms
from rlsd_lib.runs.records import read_runs


@pytest.fixture
def runs(tmp_path) -> pd.DataFrame:
    short = {"max_steps": 80, "overrides": {"epsilon_w": 0.9}}
    write_run(tmp_path / "a", "rlsd", 0, parameters={**short, "control": "shuffled"})
    write_run(tmp_path / "b", "rlsd", 1, parameters={**short, "control": "shuffled"})
    write_run(tmp_path / "c", "rlsd", 0, parameters={**short, "control": "none"})
    write_run(tmp_path / "d", "opsd", 0, parameters=short, status="failed")
    (tmp_path / "a" / "model").mkdir()
    (tmp_path / "d" / "model").mkdir()
    return read_runs(tmp_path).runs


def test_unfinished_runs_and_those_without_a_model_are_named_and_not_measured(runs, tmp_path):
    assert not_measured(runs)["name"].tolist() == ["b", "c", "d"]
    with pytest.raises(ValueError, match="no finished run with a saved model"):
        report_runs(runs[runs["name"] != "a"], tmp_path / "cache")


def test_a_run_is_measured_under_its_own_chat_template(runs, tmp_path, monkeypatch):
    config = {"max_completion_length": 9, "chat_template_kwargs": {"enable_thinking": False}}
    [path] = runs.loc[runs["name"] == "a", "path"]
    manifest = json.loads((Path(path) / "manifest.json").read_text())
    preset = asdict(PRESETS["smoke"])
    (Path(path) / "manifest.json").write_text(
        json.dumps({**manifest, "config": config, "preset": preset})
    )
    told = []

    def measure(model, tokenizer, task, **settings):
        told.append(settings)
        marks = {"phrase": [False], "value": [0.0], "chance": [0.0], "evidence": [0.0]}
        return pd.DataFrame(marks)

    monkeypatch.setattr(leakage_runs, "load_model", lambda *_, **__: (torch.nn.Identity(), None))
    monkeypatch.setattr(leakage_runs, "load_task", lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.Identity, "device", "cpu", raising=False)
    monkeypatch.setattr(leakage_runs.leakage, "measure", measure)
    report_runs(runs[runs["name"] == "a"], tmp_path / "cache")
    assert [each["max_new_tokens"] for each in told] == [9, 9]
    assert [each["chat_template_kwargs"] for each in told] == [{"enable_thinking": False}] * 2


def test_an_accuracy_stands_beside_the_measures(runs):
    found = accuracies(with_arms(runs))
    assert found["of"].tolist() == ["model"] * 3 + ["base"] * 3
    assert "d" not in found["name"].tolist()
    finished = runs.loc[runs["status"] == "finished", "accuracy_after"]
    assert found.loc[found["of"] == "model", "mean"].tolist() == finished.tolist()


def test_a_panel_per_measure_with_every_run_the_base_model_and_the_null():
    rows = [
        ("phrase", "model", 0.6, 0.5, 0.7, 0.01, "opsd"),
        ("phrase", "base", 0.01, 0.0, 0.03, 0.01, "opsd"),
        ("phrase", "model", 0.02, 0.0, 0.04, 0.01, "grpo"),
        ("phrase", "base", 0.01, 0.0, 0.03, 0.01, "grpo"),
        ("evidence", "model", 7.0, 6.0, 8.0, 1.0, "opsd"),
        ("evidence", "base", 0.1, 0.0, 0.2, 1.0, "opsd"),
    ]
    columns = ["measure", "of", "mean", "low", "high", "null", "arm"]
    figure = plots.leak_measures(pd.DataFrame(rows, columns=columns), "leakage")
    phrase, evidence = figure.axes
    assert [t.get_text() for t in phrase.get_yticklabels()] == ["opsd", "grpo"]
    points = [line.get_xdata()[0] for line in phrase.lines if len(line.get_xdata()) == 1]
    assert points == [0.6, 0.02]
    [dashed] = [line for line in evidence.lines if line.get_linestyle() == "--"]
    assert dashed.get_xdata()[0] == 1.0
    assert phrase.patches[0].get_extents().width > 0  # the base model's interval
    with pytest.raises(ValueError, match="no column arm"):
        plots.leak_measures(pd.DataFrame(rows, columns=columns).drop(columns="arm"), "leakage")
