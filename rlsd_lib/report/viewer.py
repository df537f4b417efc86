"""`CreditViewer`: what a training run's credit does to the tokens of a few rollouts, as it trains."""

from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor
from transformers.integrations import TensorBoardCallback

from rlsd_lib.report.heatmap import credit_heatmap
from rlsd_lib.trainer.states import loss_mask
from rlsd_lib.trainer.trainer import CreditCallback, RLSDTrainer

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>:root {{ color-scheme: light dark }} body {{ font: 15px sans-serif; margin: 2em }}
pre {{ white-space: pre-wrap; max-width: 62rem }}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""
NAME = "rlsd/credit"  # of the table, in the tracker


class Shown(NamedTuple):
    """One rollout, token by token; `credit` is NaN on tokens that a tool wrote."""

    prompt: str
    tokens: list[str]
    credit: list[float]
    advantage: float
    reward: float


class CreditViewer(CreditCallback):
    """Writes the token credit of some rollouts every few optimiser steps, as heat maps and a table.

        RLSDTrainer(..., callbacks=[CreditViewer(every_steps=50, rollouts=4)])

    The first step and each `every_steps`-th get a page in `folder` (by default `credit` in the
    trainer's output_dir), such as `step-000050.html`, and a PNG for each of so many `rollouts`: the
    advantages that enter the loss, as multiples of the rollout's, in the main process's first
    micro-step, from the best and the worst end in turn. Full colour is the largest of a picture, so
    that a small effect is seen: compare by the numbers, not by the colours. The trackers of `report_to` (trackio, wandb,
    tensorboard) get a table with a row per token. Raises ValueError for a number below 1.
    """

    def __init__(self, every_steps: int = 50, rollouts: int = 4, folder: str | Path = "") -> None:
        if every_steps < 1 or rollouts < 1:
            raise ValueError(f"{every_steps=}, {rollouts=}: expected 1 or more of each.")
        self.every_steps, self.rollouts, self.folder = every_steps, rollouts, folder
        self.last = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another train() shows its first step again."""
        self.last = -1

    def on_credit(self, trainer: RLSDTrainer, inputs: dict[str, Any], advantages: Tensor) -> None:
        """Write the page of this step, if one is due."""
        step = trainer.state.global_step + 1  # that these rollouts are of
        is_due = (step == 1 or step % self.every_steps == 0) and step != self.last
        if not (trainer.state.is_world_process_zero and is_due):
            return
        self.last = step
        shown = list(read_rollouts(trainer, inputs, advantages, self.rollouts))
        folder = Path(self.folder or Path(trainer.args.output_dir) / "credit")
        folder.mkdir(parents=True, exist_ok=True)
        body = []
        for number, rollout in enumerate(shown):
            title = f"rollout {number}, reward {rollout.reward:.3g}"
            told = rollout.tokens, rollout.credit, rollout.advantage
            picture = credit_heatmap(*told, title=title)
            picture.savefig(folder / f"step-{step:06d}-{number}.png", dpi=150, bbox_inches="tight")
            body.append(f"<pre>{escape(rollout.prompt)}</pre>{picture._repr_html_()}")
        page = PAGE.format(title=f"Token credit at step {step}", body="\n".join(body))
        (folder / f"step-{step:06d}.html").write_text(page, encoding="utf-8")
        if shown:
            _track(trainer, _table(step, shown))


def read_rollouts(
    trainer: RLSDTrainer, inputs: dict[str, Any], advantages: Tensor, count: int
) -> Iterator[Shown]:
    """Read `count` rollouts out of TRL's dictionary, from the best and worst `advantages` in turn."""
    tokenizer, mask = trainer._tokenizer, loss_mask(inputs).bool()
    credit = inputs["advantages"]
    credit = (credit[:, None] if credit.dim() == 1 else credit).expand(mask.shape)
    credit = credit.float().masked_fill(~mask, float("nan"))
    order = [i for i in advantages.argsort(descending=True).tolist() if mask[i].any()]
    turns = [order[k // 2] if k % 2 == 0 else order[-1 - k // 2] for k in range(len(order))]
    for row in turns[:count]:
        kept = inputs["completion_mask"][row].bool()
        question = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        yield Shown(
            tokenizer.decode(question),
            [tokenizer.decode([token]) for token in inputs["completion_ids"][row][kept].tolist()],
            credit[row][kept].tolist(),
            advantages[row].item(),
            inputs["rewards"][row].item() if "rewards" in inputs else float("nan"),
        )


def _table(step: int, shown: list[Shown]) -> pd.DataFrame:
    """A row per token of all rollouts."""
    table = pd.DataFrame(shown).rename(columns={"tokens": "token", "credit": "token advantage"})
    table = table.explode(["token", "token advantage"]).rename_axis("rollout").reset_index()
    table = table.assign(step=step, position=table.groupby("rollout").cumcount())
    columns = ["step", "rollout", "reward", "advantage", "position", "token", "token advantage"]
    return table[columns].astype({"token advantage": float})


def _track(trainer: RLSDTrainer, table: pd.DataFrame) -> None:
    """Give the table to the trackers of the run."""
    for name in {"trackio", "wandb"}.intersection(trainer.args.report_to):
        tracker = import_module(name)
        tracker.log({NAME: tracker.Table(dataframe=table)})
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            text = table.to_csv(sep="|", index=False)
            callback.tb_writer.add_text(NAME, f"<pre>{escape(text)}</pre>", table["step"].iloc[0])
