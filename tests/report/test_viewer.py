"""`CreditViewer` shows the advantages that the loss was given, on any trainer of the user's."""

from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch

from rlsd_lib import CreditViewer, RLSDTrainer
from rlsd_lib.report import viewer as viewer_module
from rlsd_lib.report.viewer import read_rollouts


class Watched(RLSDTrainer):
    """Keeps what the credit function returned in each micro-step."""

    def _token_advantages(self, inputs, logps):
        credited = super()._token_advantages(inputs, logps)
        self.kept = [*getattr(self, "kept", []), (dict(inputs), credited.clone())]
        return credited


@pytest.fixture
def tables(monkeypatch) -> list[pd.DataFrame]:
    """What a tracker was given, in the place of the tracker's own module."""
    given: list[pd.DataFrame] = []
    tracker = SimpleNamespace(
        Table=lambda dataframe: dataframe, log=lambda logged: given.append(*logged.values())
    )
    monkeypatch.setattr(viewer_module, "import_module", {"trackio": tracker}.__getitem__)
    return given


def train(folder, viewer, **settings):
    trainer = tiny.trainer(
        folder, kind=Watched, more={"callbacks": [viewer]}, max_steps=4, **settings
    )
    trainer.args.report_to = ["trackio"]
    trainer.train()
    return trainer


def test_the_pictures_agree_with_the_trainers_own_advantages(tmp_path, tables):
    trainer = train(tmp_path, CreditViewer(every_steps=2, rollouts=3), epsilon_w=0.7)
    names = {path.name for path in (tmp_path / "credit").iterdir()}
    steps = ("000001", "000002", "000004")
    assert names == {f"step-{s}.html" for s in steps} | {
        f"step-{s}-{k}.png" for s in steps for k in range(3)
    }
    # As TRL's log counts them.
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4]
    assert [table["step"].unique().tolist() for table in tables] == [[1], [2], [4]]
    first = [trainer.kept[2 * (step - 1)] for step in (1, 2, 4)]  # of 2 micro-steps each
    for table, (inputs, credited) in zip(tables, first, strict=True):
        ranked = inputs["advantages"].argsort(descending=True)
        for number, row in enumerate(ranked[[0, -1, 1]].tolist()):
            kept = inputs["completion_mask"][row].bool()
            shown = table[table["rollout"] == number]
            assert shown["token advantage"].tolist() == credited[row][kept].tolist()
            assert (shown["advantage"] == inputs["advantages"][row].item()).all()
            assert (shown["reward"] == inputs["rewards"][row].item()).all()
            ids = inputs["completion_ids"][row][kept].tolist()
            assert shown["token"].tolist() == [tiny.tokenizer().decode([i]) for i in ids]
    assert tables[0].groupby("rollout")["token advantage"].nunique().max() > 1
    page = (tmp_path / "credit" / "step-000002.html").read_text()
    assert page.count("rlsd-heat") > 3 and page.count("<pre>") == 3


def test_plain_grpo_is_shown_as_it_is_and_nothing_is_trained_otherwise(tmp_path, tables):
    for method in ("grpo", "rlsd"):
        seen = train(tmp_path / method, CreditViewer(every_steps=3), method=method)
        alone = tiny.trainer(tmp_path / "alone", max_steps=4, method=method)
        alone.train()
        for ours, theirs in zip(seen.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), method
    grpo = tables[0]
    assert (grpo["token advantage"] == grpo["advantage"]).all()


def test_what_a_tool_wrote_has_no_credit_and_a_masked_rollout_is_left_out():
    inputs = {
        "prompt_ids": torch.tensor([[0, 5], [5, 6], [5, 6]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]),
        "completion_ids": torch.tensor([[5, 6, 7], [7, 6, 5], [5, 5, 5]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]]),
        "advantages": torch.tensor([[1.0, 2.0, 9.0], [-1.0, 9.0, -2.0], [3.0, 3.0, 3.0]]),
    }
    trainer = SimpleNamespace(_tokenizer=tiny.tokenizer())
    best, worst = read_rollouts(trainer, inputs, torch.tensor([1.5, -1.5, 3.0]), 4)
    assert best.credit == [1.0, 2.0]
    assert worst.credit[0] == -1.0 and worst.credit[2] == -2.0
    assert worst.credit[1] != worst.credit[1]  # NaN: grey
    assert best.prompt == tiny.tokenizer().decode([5])


def test_a_tensorboard_gets_text(monkeypatch):
    """Its writer belongs to transformers' callback, which needs the package to be made."""
    written = []
    monkeypatch.setattr(viewer_module, "TensorBoardCallback", SimpleNamespace)
    writer = SimpleNamespace(add_text=lambda *given: written.append(given))
    callbacks = [SimpleNamespace(tb_writer=writer), SimpleNamespace(tb_writer=None)]
    trainer = SimpleNamespace(
        args=SimpleNamespace(report_to=["tensorboard"]),
        callback_handler=SimpleNamespace(callbacks=callbacks),
    )
    viewer_module._track(trainer, pd.DataFrame({"step": [7], "token": ["<b>"]}))
    assert written == [("rlsd/credit", "<pre>step|token\n7|&lt;b&gt;\n</pre>", 7)]


def test_numbers_below_one_are_refused():
    for wrong in ({"every_steps": 0}, {"rollouts": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            CreditViewer(**wrong)
