"""What `rlsd bench` races: trainers, TRL's own included, on synthetic rollouts or on a preset.

A random Qwen3 reads prompts of exact length and writes completions of exact length; nothing is
downloaded. The learning rate is 0, so that all trainers can be given the very same rollouts at
every step, and differ in what they compute from them.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Trainer,
)
from trl import GRPOConfig, GRPOTrainer

from rlsd_lib.experiment.plan import expect
from rlsd_lib.experiment.presets import PRESETS, RunParameters
from rlsd_lib.experiment.shapes import config_named
from rlsd_lib.names import look_up
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.tasks.models import load_model
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.trainer import RLSDTrainer

BASE = "GRPO"
SPECIAL = ("<pad>", "</s>", "<unk>")
HEAD_DIM = 64


def contenders() -> dict[str, tuple[type[Trainer], Callable[..., Any]]]:
    """Trainer and configuration by name. TRL's self-distiller sees the same teacher prompt as ours."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    ours = partial(
        RLSDConfig, privileged_template="{prompt} {privileged_context}", lambda_decay_steps=0
    )
    theirs = partial(
        SDPOConfig,
        # Feedback instead of a demonstration, so that the teacher's prompt is as long as RLSD's.
        include_environment_feedback=True,
        success_reward_threshold=2.0,
        reprompt_template="{prompt}{solution}{feedback}",
        feedback_template=" {feedback_raw}",
        max_prompt_length=None,
    )
    return {
        BASE: (GRPOTrainer, GRPOConfig),
        "GRPO, completion head": (RLSDTrainer, partial(ours, method="grpo", completion_head=True)),
        "RLSD": (RLSDTrainer, ours),
        "RLSD, plain pass": (RLSDTrainer, partial(ours, teacher_pass="plain")),
        "OPSD": (RLSDTrainer, partial(ours, method="opsd")),
        "TRL SDPO": (SDPOTrainer, theirs),
    }


@dataclass(frozen=True)
class Sizes:
    """A random Qwen3 on prompts and completions of exact length, in tokens; a group is a step.

    `model` names one of `SHAPES`, whose sizes then stand for `vocabulary`, `hidden` and `layers`; it
    is trained in bf16 on a GPU, with gradient checkpointing. At most `rows` rollouts share a forward.

    Raises:
        ValueError: for a size that cannot be, naming it and what was expected.
    """

    prompt: int = 1024
    completion: int = 256
    generations: int = 8
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    reference: int = 64
    rows: int = 64
    model: str = ""

    def __post_init__(self) -> None:
        group, counts = self.generations, [name for name in vars(self) if name != "model"]
        expect(self, counts, lambda n: isinstance(n, int) and n >= 1, "a whole number >= 1")
        expect(self, ["hidden"], lambda n: n % HEAD_DIM == 0, f"a multiple of {HEAD_DIM}")
        expect(self, ["generations"], lambda n: n >= 2, "2 or more, a group")
        expect(self, ["rows"], lambda n: group % min(n, group) == 0, f"a divisor of {group}")

    def build(self, name: str, folder: Path, steps: int) -> Trainer:
        """The trainer of a contender, ready for `steps` steps of one group each.

        Raises:
            ValueError: for an unknown name, with the nearest known one.
        """
        table = contenders()
        trainer, configure = table[look_up(name, table, "contender")]
        on_gpu, rows = torch.cuda.is_available(), min(self.rows, self.generations)
        config = configure(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=self.generations // rows,
            num_generations=self.generations,
            max_completion_length=self.completion,
            # No end of sequence before the last token: completions of one length are equal work.
            generation_kwargs={"min_new_tokens": self.completion},
            temperature=1.0,
            learning_rate=0.0,
            shuffle_dataset=False,
            gradient_checkpointing=bool(self.model),
            use_cpu=not on_gpu,
            bf16=on_gpu,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        model = self.make_model()
        if not issubclass(trainer, GRPOTrainer):
            # TRL's self-distiller loads its teacher from where the model came from.
            model.save_pretrained(folder / "model")
            model.config._name_or_path = str(folder / "model")
        return trainer(
            model=model,
            reward_funcs=_reward,
            args=config,
            train_dataset=self.make_rows(steps),
            processing_class=self.make_tokenizer(),
        )

    def config(self) -> Any:
        """The transformers config of the model."""
        if self.model:
            config = config_named(self.model)
            config.pad_token_id, config.eos_token_id = 0, 1
            return config
        heads = self.hidden // HEAD_DIM
        return Qwen3Config(
            vocab_size=self.vocabulary + len(SPECIAL),
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=self.prompt + self.reference + 2 * self.completion,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )

    @property
    def words(self) -> int:
        """Words that prompts are drawn from: the vocabulary but for special tokens."""
        return self.config().vocab_size - len(SPECIAL)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return torch.bfloat16 if self.model and torch.cuda.is_available() else torch.float32

    def make_model(self) -> PreTrainedModel:
        """The model, always with the same weights."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word: a text of n words is n tokens."""
        words = [*SPECIAL, *(f"w{i}" for i in range(self.words))]
        backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            padding_side="left",
        )

    def make_rows(self, count: int) -> Dataset:
        """`count` prompts and references of exact length."""
        random = torch.Generator().manual_seed(0)

        def text(length: int) -> str:
            ids = torch.randint(self.words, (length,), generator=random)
            return " ".join(f"w{i}" for i in ids.tolist())

        columns = {"prompt": self.prompt, "privileged_context": self.reference}
        return Dataset.from_dict({k: [text(n) for _ in range(count)] for k, n in columns.items()})


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within a group, and depends on nothing but the text."""
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]


def preset_trainer(preset: str, name: str, folder: Path, steps: int) -> Trainer:
    """The trainer of "GRPO" or "RLSD" on the model and task of a preset, at a constant lambda.

    Raises:
        ValueError: for an unknown preset.
    """
    row = PRESETS[look_up(preset, PRESETS, "preset")]
    task = replace(row, test_size=1).load_task(name.lower())
    overrides = {"learning_rate": 0.0, "lambda_decay_steps": 0, "save_strategy": "no"}
    run = RunParameters(name.lower(), preset, max_steps=steps, overrides=overrides)
    config = run.resolve(folder, template=task.privileged_template).config
    model, tokenizer = load_model(row.model, outputs_root() / "cache", **row.model_options)
    rewards = [task.reward, task.leak]
    return RLSDTrainer(model, rewards, config, task.train, processing_class=tokenizer)
