"""A language model whose every probability is written down, and the tokenizer of its words."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

WORDS = (
    "<pad>",
    "<end>",
    "<user>",
    "<assistant>",
    "reference",
    "so",
    "answer",
    ";",
    *"0123456789?",
)
CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Law = Callable[[Sequence[str]], dict[str, float]]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=CHAT
    )


def talk(quoting: float) -> Law:
    """Words at random; `quoting` is how often one speaks of a reference that it was not shown.

    Where `;` shows a reference, or the question itself asks for it, it is quoted nearly always.
    """

    def law(words: Sequence[str]) -> dict[str, float]:
        speaking = words.index("<assistant>")
        prompt, said = words[:speaking], words[speaking + 1 :]
        if not said:
            shown = ";" in prompt or "reference" in prompt
            return {"reference": (p := 0.9 if shown else quoting), "so": 1 - p}
        if said[-1] == "reference":
            value = prompt[prompt.index(";") + 1] if ";" in prompt else None
            return {digit: 0.82 if digit == value else 0.02 for digit in "0123456789"}
        return {"so": 0.5, "answer": 0.3, "<end>": 0.2}

    return law


class Scripted(nn.Module):
    """Looks like a causal LM; its next word has the law that it was given."""

    def __init__(self, law: Law) -> None:
        super().__init__()
        self.law, self.device = law, torch.device("cpu")
        self.generation_config = GenerationConfig(eos_token_id=WORDS.index("<end>"))

    def logits(self, ids: Sequence[int]) -> Tensor:
        words = [WORDS[i] for i in ids if WORDS[i] != "<pad>"]
        probabilities = torch.full((len(WORDS),), 1e-6)
        if "<assistant>" in words:
            for word, p in self.law(words).items():
                probabilities[WORDS.index(word)] = max(p, 1e-6)
        return probabilities.log()

    def forward(self, input_ids: Tensor, logits_to_keep: int, **_: Tensor) -> SimpleNamespace:
        rows, length = input_ids.tolist(), input_ids.shape[1]
        places = range(length - logits_to_keep, length)
        return SimpleNamespace(
            logits=torch.stack(
                [torch.stack([self.logits(row[: t + 1]) for t in places]) for row in rows]
            )
        )

    def generate(self, input_ids: Tensor, generation_config: GenerationConfig, **_: Any) -> Tensor:
        for _step in range(generation_config.max_new_tokens):
            laws = torch.stack([self.logits(row) for row in input_ids.tolist()]).exp()
            input_ids = torch.cat([input_ids, torch.multinomial(laws, 1)], dim=1)
        return input_ids
