"""Every row of the table that came after the paper: it trains, with its signals, at its cost."""

from typing import Any

import tiny
import torch
from peft import LoraConfig, get_peft_model

from rlsd_lib.methods import METHODS

# What the paper and its baselines are; their own tests hold them.
OLD = ("grpo", "rlsd", "rlsd_neutral", "opd", "opsd", "opsd_teacher_top1", "opsd_student_top1")
OLD += ("sdpo", "grpo_opsd")
ROWS = [name for name in METHODS if name not in OLD]
# Passes of the teacher over each rollout, where not one.
PASSES = {"cepo": 2, "rlsd_contrast": 2, "rlcsd": 2, "opsd_contrast": 2, "opsd_value_contrast": 2}
PASSES |= {"oracle": 0}


def signals(rows: list[dict], ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Functions of what is given, so that a test can tell whose they are."""
    assert len(rows) == len(ids) and "privileged_context" in rows[0]
    return {
        "first_error": ids[:, 0] % 3,
        "decisions": ids % 2 == 0,
        "thought": (ids % 3 == 0) * mask,
    }


def settings_of(method: str) -> dict[str, Any]:
    given = {"method": method, "success_reward_threshold": 0.5, "max_steps": 2}
    if method == "sdpg":
        given["beta"] = 0.01
    if method == "srpo":  # the tiny vocabulary is not much larger than its 100 tokens
        given["distillation_topk"] = 20
    return given


def make(folder, method: str, student: Any = None, **changes: Any):
    more = {"signals": signals, **changes.pop("more", {})}
    return tiny.trainer(folder, student, more=more, **{**settings_of(method), **changes})


def lora_student() -> Any:
    torch.manual_seed(5)
    return get_peft_model(tiny.model(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))


def count_teacher_rows(trainer) -> dict[str, int]:
    """Counts rows that are generated, and rows that the teacher scores."""
    counted = {"rollouts": 0, "teacher": 0}
    scores, generate = trainer.teacher_scores, trainer._generate

    def scored(prompts, contexts, output):
        counted["teacher"] += len(prompts)
        return scores(prompts, contexts, output)

    def generated(prompts):
        counted["rollouts"] += len(prompts)
        return generate(prompts)

    trainer.teacher_scores, trainer._generate = scored, generated
    return counted


def check_run(name: str, trainer: Any) -> None:
    """Two steps: something learns, every number is finite, the teacher works as often as it says."""
    start = {k: p.detach().clone() for k, p in trainer.model.named_parameters() if p.requires_grad}
    counted = count_teacher_rows(trainer)
    trainer.train()
    moved = [k for k, p in trainer.model.named_parameters() if k in start and not p.equal(start[k])]
    assert moved, f"{name} learned nothing"
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2, name
    for log in logs:
        own = {k: v for k, v in log.items() if k.startswith("rlsd/") or k in ("loss", "grad_norm")}
        assert all(v is not None and abs(v) < 1e6 for v in own.values()), (name, own)
        assert ("rlsd/intervention" in log) == trainer.args.has_token_credit, (name, log)
        assert ("rlsd/distillation_weight" in log) == (METHODS[name].weight is not None), (
            name,
            log,
        )
    passes = PASSES.get(name, 1)
    assert counted == {"rollouts": 16, "teacher": 16 * passes}, (name, counted)


def test_every_row_trains_on_text(tmp_path):
    for name in ROWS:
        check_run(name, make(tmp_path, name))


def test_every_row_trains_with_lora(tmp_path):
    for name in ROWS:
        check_run(name, make(tmp_path, name, lora_student()))
