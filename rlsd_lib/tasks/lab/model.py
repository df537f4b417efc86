"""The lab: a tiny reasoner, pretrained in about a minute, that shows the paper's phenomena.

A Qwen3 of 0.4 M parameters imitates a corpus of worked additions (`rlsd_lib.tasks.lab.chains`), which
is unreliable about some facts unless a reference is shown, and then often quotes it aloud. This is
a model organism: **by construction its teacher quotes**. What it shows about leakage it shows about
a teacher that was made to leak.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Annotated

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlsd_lib.names import check_fields
from rlsd_lib.tasks.cache import write_once
from rlsd_lib.tasks.encode import word_tokenizer
from rlsd_lib.tasks.lab.arithmetic import (
    PRIVILEGED_TEMPLATE,
    TOKEN,
    draw_problem,
    question_of,
    vocabulary_of,
)
from rlsd_lib.tasks.lab.chains import ANY_COLUMN, SLIPS, Belief, Fact, Style, facts_of, write_chain
from rlsd_lib.tasks.task import is_held_out

SPECIALS = ("<pad>", "<eos>", "<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

CORPUS = 2  # counts the ways in which the corpus has been written; a cached lab is of one of them
Count = Annotated[int, lambda value: value >= 1, "a count >= 1"]
Share = Annotated[float, lambda value: 0 <= value <= 1, "a share in [0, 1]"]
Dial = Annotated[float, lambda value: 0 <= value < 1, "a share in [0, 1)"]


@dataclass(frozen=True)
class LabRecipe:
    """Everything that decides the lab's weights."""

    digits: Count = 3  # digits per number; a chain has as many columns
    nuisance: Dial = 0.35  # the dial: expected share of filler words among a chain's tokens
    column_facts: bool = False  # 110 facts for each column, not 110 that all columns share
    hard_share: Share = 0.33  # share of the facts that the corpus is unreliable about
    hard_low: float = 0.2  # error rates of those facts are uniform between this ...
    hard_high: float = 0.85  # ... and this; above 0.5 the wrong sum is the likelier one
    easy_rate: Share = 0.01  # error rate of the other facts
    referenced_share: Share = 0.6  # share of the corpus that shows a reference, and is right
    trace_share: Share = 0.3  # share of the batches whose references are whole right chains
    quote_share: Share = 0.5  # share of the referenced chains that open by quoting the answer
    style_tilt: float = 0.0  # log-odds by which referenced chains prefer half of the filler words
    hidden_size: int = 128
    layers: Count = 2
    steps: Count = 800  # pretraining steps
    ramp_steps: int = 200  # over the first of them the dial rises from 0: calculation comes first
    batch_size: Count = 32  # chains per pretraining step
    learning_rate: float = 3e-3  # peak; linear warm-up, then cosine to zero
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def max_completion_length(self) -> int:
        """The most tokens that a chain of the corpus has, with a quotation and the end token."""
        return Style(self.nuisance).longest_chain(self.digits, quoted=self.quote_share > 0)

    @cached_property
    def beliefs(self) -> dict[Fact, Belief]:
        """What the corpus believes about each fact: some are hard, the others nearly certain."""
        random, beliefs = Random(self.seed), {}
        facts = facts_of(range(self.digits) if self.column_facts else (ANY_COLUMN,))
        hard = set(random.sample(facts, round(self.hard_share * len(facts))))
        for fact in facts:
            total = sum(fact[1:])
            wrong = random.choice([total + s for s in SLIPS if 0 <= total + s <= 19])
            rate = self.easy_rate
            if fact in hard:
                rate = random.uniform(self.hard_low, self.hard_high)
            beliefs[fact] = Belief(rate, wrong)
        return beliefs

    def digest(self) -> str:
        """Return ten characters that change when any field, or the language, changes."""
        text = json.dumps(
            [asdict(self), vocabulary_of(self.digits), CHAT_TEMPLATE, PRIVILEGED_TEMPLATE, CORPUS]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def load_lab(
    cache_dir: str | Path, recipe: LabRecipe
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Return the lab's model (float32, CPU, eval mode) and tokenizer, pretrained on the first call."""

    def write(folder: Path) -> None:
        for part in pretrain(recipe):
            part.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))

    folder = write_once(Path(cache_dir) / f"lab-{recipe.digest()}", write)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def build_tokenizer(digits: int = 3) -> PreTrainedTokenizerFast:
    """Return the lab's tokenizer: one token per word, digit and sign; an unknown word raises."""
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(TOKEN), "isolated")]
    return word_tokenizer(
        (*SPECIALS, *vocabulary_of(digits)),
        pre_tokenizers.Sequence(words),
        extra_special_tokens=list(SPECIALS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(recipe: LabRecipe, vocab_size: int) -> Qwen3ForCausalLM:
    """Return the untrained model; the caller seeds torch."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden_size // 4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.06,  # three times the usual: so small a model starts learning sooner
        pad_token_id=SPECIALS.index("<pad>"),
        eos_token_id=SPECIALS.index("<eos>"),
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def conversation(
    recipe: LabRecipe, random: Random, nuisance: float, *, traced: bool
) -> list[dict[str, str]]:
    """Write one conversation of the corpus, never about a held-out question.

    `nuisance` is the share of filler words. A reference is the answer, or a chain where `traced`.
    """
    while is_held_out(question := question_of(row := draw_problem(random, recipe.digits))):
        pass
    if random.random() < recipe.referenced_share:
        reference = row["answer"]
        if traced:
            # Another's rollout, with fillers, or a bare solution: the lab must read both.
            style = Style(random.choice((nuisance, 0.0)))
            reference = write_chain(row, random, style, {})
        quote = row["answer"] if random.random() < recipe.quote_share else ""
        chain = write_chain(row, random, Style(nuisance, recipe.style_tilt), {}, quote=quote)
        question = PRIVILEGED_TEMPLATE.format(prompt=question, privileged_context=reference)
    else:
        chain = write_chain(row, random, Style(nuisance), recipe.beliefs)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": chain}]


def pretrain(recipe: LabRecipe) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train the lab's model from scratch; deterministic, torch's global seed is left alone."""
    tokenizer, random = build_tokenizer(recipe.digits), Random(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(recipe, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    for step in range(recipe.steps):
        nuisance = recipe.nuisance * min(1.0, step / max(1, recipe.ramp_steps))
        # Batch by batch, because a trace doubles the length to which a batch is padded.
        traced = random.random() < recipe.trace_share
        size = range(recipe.batch_size)
        batch = [conversation(recipe, random, nuisance, traced=traced) for _ in size]
        model(**_encode(tokenizer, batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), tokenizer


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine down to 0."""
    warm_up = min(1.0, (step + 1) / 20)
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def _encode(tokenizer: PreTrainedTokenizerFast, batch: list) -> dict[str, torch.Tensor]:
    """Tokenise conversations; only the assistant's tokens and the end token are labels."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in batch]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    ids = encoded["input_ids"]
    speaker = SPECIALS.index("<assistant>")
    spoken = (ids == speaker).cumsum(1).bool() & (ids != speaker)
    labels = ids.masked_fill(~spoken | (ids == tokenizer.pad_token_id), -100)
    return {"input_ids": ids, "attention_mask": encoded["attention_mask"], "labels": labels}
