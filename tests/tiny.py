"""A random two-layer Qwen3 with character tokens, and rows to train it on: seconds per test."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlsd_lib import RLSDConfig, RLSDTrainer
from rlsd_lib.methods import METHODS, from_caller
from rlsd_lib.prompts import teacher_prompt
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.lab import vision as toy_vlm

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Rows of the methods table: RLSD and the paper's baselines, and what came after it.
FIRST = list(METHODS)[: list(METHODS).index("cepo")]
LATER = [name for name in METHODS if name not in FIRST]
# Settings without which a row does not train, or not with all that it computes.
NEEDS: dict[str, dict[str, Any]] = {
    "grpo_opsd": {"distillation_weight": 0.3},
    "sdpo": {"success_reward_threshold": 0.5},
    "sdpg": {"beta": 0.01},
}


def tokenizer() -> PreTrainedTokenizerFast:
    return toy_vlm.build_tokenizer((), chat_template=CHAT_TEMPLATE)


def model(seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "pad_token_id": 0,
        # Wide initialisation, so that prompts and teachers make a visible difference.
        "initializer_range": 0.3,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**config, **overrides}))


def dataset(rows: int = 32, **columns: list) -> Dataset:
    prompts = [[{"role": "user", "content": f"{i}+{i + 1}"}] for i in range(rows)]
    data = {"prompt": prompts, "privileged_context": [str(2 * i + 1) for i in range(rows)]}
    return Dataset.from_dict({**data, **columns})


def as_teacher(task: Task, template: str) -> Task:
    """`task` with what its teacher reads in place of the prompts of its test problems."""
    told = [teacher_prompt(r["prompt"], r["privileged_context"], template) for r in task.test]
    pairs = zip(task.test, told, strict=True)
    return replace(task, test=[{**row, "prompt": prompt} for row, prompt in pairs])


def reward(completions: list, **_: Any) -> list[float]:
    """Spread out and deterministic: groups differ, so advantages are not 0."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [(sum(map(ord, text)) % 7) / 7 for text in texts]


def signals(rows: list[dict], ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What rows ask of their caller: functions of a rollout's own ids, so that a test can tell whose."""
    assert len(rows) == len(ids) and "privileged_context" in rows[0]
    return {
        "first_error": ids[:, 0] % 3,
        "decisions": ids % 2 == 0,
        "thought": (ids % 3 == 0) * mask,
        "success_before": ids[:, 0] % 5 / 5,
        "success_after": ids % 7 / 7,
    }


def from_outside(method: str, model: Callable[[], Any]) -> dict[str, Any]:
    """Arguments of the trainer that a row needs beside its settings; `model` makes OPD's teacher."""
    signalled = {"signals": signals} if from_caller(METHODS[method].credit) else {}
    return signalled | ({"teacher_model": model()} if method == "opd" else {})


def config(folder: Path, **overrides: Any) -> RLSDConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "seed": 7,
        "privileged_template": "{prompt}|{privileged_context}",
    }
    return RLSDConfig(**{**defaults, **overrides})


def trainer(
    folder: Path,
    student: Any = None,
    data: Any = None,
    *,
    kind: type[RLSDTrainer] = RLSDTrainer,
    rewards: Any = reward,
    more: dict[str, Any] | None = None,
    **overrides: Any,
) -> RLSDTrainer:
    """A trainer of class `kind` on the tiny model, with `more` arguments.

    `overrides` are RLSDConfig fields.
    """
    return kind(
        model() if student is None else student,
        rewards,
        config(folder, **overrides),
        dataset() if data is None else data,
        processing_class=tokenizer(),
        **more or {},
    )
