"""The same model and rollouts for every trainer of the benchmark, TRL's own included.

A random Qwen3 reads prompts of exact length and writes completions of exact length; nothing is
downloaded. The learning rate is 0 and every rollout is drawn with a fixed seed, so that all trainers
see the very same tokens at every step, and differ in what they compute from them.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer

from rlsd_lib.names import look_up
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.trainer import RLSDTrainer

SPECIAL = ("<pad>", "</s>", "<unk>")
HEAD_DIM = 64


@dataclass(frozen=True)
class Setting:
    """Sizes of the benchmark, in tokens where they are lengths. One group is one step."""

    prompt: int = 1024
    completion: int = 256
    generations: int = 8
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    reference: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number >= 1")
        if self.hidden % HEAD_DIM:
            raise ValueError(f"hidden={self.hidden}: expected a multiple of {HEAD_DIM}")
        if self.generations < 2:
            raise ValueError(f"generations={self.generations}: expected 2 or more, a group")


class Contender(NamedTuple):
    """A trainer, its configuration class, what is set beside the common settings, its rewards."""

    trainer: type[Trainer]
    config: type
    settings: Mapping[str, Any]
    rewarded: bool = True


def contenders() -> dict[str, Contender]:
    """All by name. The self-distillers of TRL see the same teacher prompt as ours."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    shown = "{prompt} {privileged_context}"
    ours = {"privileged_template": shown, "lambda_decay_steps": 0}
    # Feedback instead of a demonstration, so that the teacher's prompt is as long as RLSD's.
    feedback = {"include_environment_feedback": True, "success_reward_threshold": 2.0}
    theirs = {
        **feedback,
        "reprompt_template": "{prompt}{solution}{feedback}",
        "feedback_template": " {feedback_raw}",
        "max_prompt_length": None,
    }
    sdft = {"teacher_prompt_template": shown, "max_prompt_length": None}
    return {
        "GRPO": Contender(GRPOTrainer, GRPOConfig, {}),
        "GRPO, completion head": Contender(
            RLSDTrainer, RLSDConfig, {"method": "grpo", "completion_head": True}
        ),
        "RLSD": Contender(RLSDTrainer, RLSDConfig, ours),
        "RLSD, plain pass": Contender(RLSDTrainer, RLSDConfig, {**ours, "teacher_pass": "plain"}),
        "RLSD, live teacher": Contender(
            RLSDTrainer, RLSDConfig, {**ours, "teacher_model_kind": "live"}
        ),
        "RLSD, offloaded teacher": Contender(
            RLSDTrainer, RLSDConfig, {**ours, "teacher_offload": True}
        ),
        "OPSD": Contender(RLSDTrainer, RLSDConfig, {**ours, "method": "opsd"}),
        "SDPO": Contender(RLSDTrainer, RLSDConfig, {**ours, **feedback, "method": "sdpo"}),
        "TRL SDPO": Contender(SDPOTrainer, SDPOConfig, theirs),
        "TRL SDPO, top 100": Contender(
            SDPOTrainer,
            SDPOConfig,
            {**theirs, "distillation_mode": "topk_logits", "distillation_topk": 100},
        ),
        "TRL SDFT": Contender(SDFTTrainer, SDFTConfig, sdft, rewarded=False),
    }


def build(name: str, setting: Setting, folder: Path, steps: int) -> Trainer:
    """The trainer of a contender, ready for `steps` steps of one group each.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    table = contenders()
    chosen = table[look_up(name, table, "contender")]
    on_gpu = torch.cuda.is_available()
    config = chosen.config(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=setting.generations,
        gradient_accumulation_steps=1,
        num_generations=setting.generations,
        max_completion_length=setting.completion,
        # No end of sequence before the last token: completions of one length are equal work.
        generation_kwargs={"min_new_tokens": setting.completion},
        temperature=1.0,
        learning_rate=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **chosen.settings,
    )
    rewards = {"reward_funcs": _reward} if chosen.rewarded else {}
    model = make_model(setting)
    # TRL's self-distillers load their teacher from where the model came from.
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")
    return chosen.trainer(
        model=model,
        args=config,
        train_dataset=make_rows(setting, steps),
        processing_class=make_tokenizer(setting),
        **rewards,
    )


def make_model(setting: Setting) -> Qwen3ForCausalLM:
    """A random Qwen3, always the same one."""
    heads = setting.hidden // HEAD_DIM
    config = Qwen3Config(
        vocab_size=setting.vocabulary + len(SPECIAL),
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1) if heads % 2 == 0 else heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=setting.prompt + setting.reference + 2 * setting.completion,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config)


def make_tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """One token per word: a text of n words is n tokens."""
    words = [*SPECIAL, *(f"w{i}" for i in range(setting.vocabulary))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_rows(setting: Setting, count: int) -> Dataset:
    """`count` prompts and references of exact length in tokens."""
    random = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        ids = torch.randint(setting.vocabulary, (length,), generator=random)
        return " ".join(f"w{i}" for i in ids.tolist())

    prompts = [text(setting.prompt) for _ in range(count)]
    contexts = [text(setting.reference) for _ in range(count)]
    return Dataset.from_dict({"prompt": prompts, "privileged_context": contexts})


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Differs within a group, and depends on nothing but the text."""
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]
