"""A dense float64 reference of every method's loss, and rollouts that do not depend on the model.

It shares no line with the package: the teacher's turn is a string, both models are run plainly on
one unpadded row at a time, and divergences are textbook sums over probabilities (T, V).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from torch import Tensor
from torch.func import functional_call

from rlsd_lib import RLSDTrainer

EOS, FIRST_LETTER = 1, 6
LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo")
Weights = dict[str, Tensor]

# --- rollouts ------------------------------------------------------------------------------------


def scripted_ids(prompt_ids: Sequence[int], index: int, call: int) -> list[int]:
    """A completion that depends on the prompt and on its place in the global batch alone."""
    draw = random.Random(f"{list(prompt_ids)} {index} {call}")
    letters = [draw.randrange(FIRST_LETTER, 60) for _ in range(draw.randint(2, 7))]
    return letters + [EOS] * draw.randint(0, 1)


def script(trainer: RLSDTrainer, ids: Callable[..., list[int]] = scripted_ids) -> RLSDTrainer:
    """Replace sampling, so that every world size and every trainer trains on the same rollouts."""
    calls = iter(range(10**6))

    def generate(prompt_ids: list, *_: Any) -> tuple[list[list[int]], None]:
        first, call = trainer.accelerator.process_index * len(prompt_ids), next(calls)
        return [ids(row, first + i, call) for i, row in enumerate(prompt_ids)], None

    trainer._generate_single_turn = generate
    return trainer


# --- what a run computed -------------------------------------------------------------------------


@dataclass
class Generation:
    """One generation batch: its dataset rows, and the weights of both models when it was made."""

    rows: list[dict[str, Any]]
    completion_ids: list[list[int]]
    tokens: int  # that enter the loss
    student: Weights
    teacher: Weights


@dataclass
class Step:
    """One micro-step: what went into the loss, and value and gradients per loss type."""

    inputs: dict[str, Any]
    generation: Generation
    student: Weights
    lam: float
    losses: dict[str, tuple[float, Weights]] = field(default_factory=dict)


def record(trainer: RLSDTrainer, loss_types: Sequence[str]) -> list[Step]:
    """Train, and keep every micro-step. Other loss types than the run's are computed beside it."""
    steps: list[Step] = []
    generations: list[Generation] = []
    score, compute, own = (
        trainer._generate_and_score_completions,
        trainer._compute_loss,
        trainer.loss_type,
    )

    def scored(rows: list[dict[str, Any]]) -> dict[str, Any]:
        student = _copy(trainer.model)
        frozen = trainer.teacher and trainer.teacher.model
        teacher = student if frozen in (None, trainer.model) else _copy(frozen)
        output = score(rows)
        output["row"] = torch.arange(len(rows))  # follows the rollout through TRL's shuffle
        lengths = output["completion_mask"].sum(1)
        ids = [row[row != 0].tolist() for row in output["completion_ids"]]
        generations.append(Generation(rows, ids, int(lengths.sum()), student, teacher))
        return output

    def computed(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        lam = trainer.args.lambda_at(trainer.state.global_step)
        steps.append(Step(dict(inputs), generations[-1], _copy(model), lam))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for loss_type in loss_types:
            trainer.loss_type = trainer.args.loss_type = loss_type
            loss = compute(model, inputs)
            grads = torch.autograd.grad(loss, list(trained.values()))
            steps[-1].losses[loss_type] = loss.item(), dict(zip(trained, grads, strict=True))
        trainer.loss_type = trainer.args.loss_type = own
        return compute(model, inputs)

    trainer._generate_and_score_completions, trainer._compute_loss = scored, computed
    trainer.train()
    return steps


def _copy(model: torch.nn.Module) -> Weights:
    return {name: p.detach().double() for name, p in model.named_parameters()}


# --- the same by hand ----------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def top_with_tail(k: int, divergence: Callable) -> Callable:
    """A divergence of the student's k likeliest tokens and one bucket for all others."""

    def cut(p_t: Tensor, p_s: Tensor) -> Tensor:
        order = p_s.detach().argsort(-1, descending=True)
        p_t, p_s = (p.gather(-1, order) for p in (p_t, p_s))
        halves = [torch.cat([p[:, :k], p[:, k:].sum(-1, keepdim=True)], -1) for p in (p_t, p_s)]
        return divergence(*halves)

    return cut


def at(p: Tensor, tokens: Tensor) -> Tensor:
    return p.gather(-1, tokens[:, None])[:, 0]


# D(P_T, P_S) on probabilities (T, V), as the paper writes them.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "opd": lambda p_t, p_s: kl(p_s, p_t),
    "opsd": kl,
    "opsd_teacher_top1": lambda p_t, p_s: -at(p_s, p_t.argmax(-1)).log(),
    "opsd_student_top1": lambda p_t, p_s: at(p_t / p_s, p_s.argmax(-1)),
    "sdpo": top_with_tail(100, jsd),
    "grpo_opsd": kl,
}


def credit(method: str, advantage: Tensor, gap: Tensor, lam: float) -> Tensor:
    """Token advantages (T,) of one rollout; epsilon_w is 0.2."""
    if method.startswith("rlsd"):
        log_weight = gap * advantage.sign() if method == "rlsd" else gap.abs()
        return advantage * (1 - lam + lam * log_weight.exp().clamp(0.8, 1.2))
    return advantage.expand_as(gap) if method.startswith("grpo") else torch.zeros_like(gap)


@dataclass
class Reference:
    """The loss of a recorded micro-step, from nothing but weights, token ids and dataset rows.

    `turns` gives what stands between <user> and </s> in the teacher's prompt of each row of a
    generation, and whether the row is distilled at all.
    """

    method: str
    turns: Callable[[Generation], list[tuple[str, bool]]]
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None
    credit: Callable[..., Tensor] = credit
    weight: float = 1.0
    temperature: float = 1.0
    accumulation: int = 2
    steps_per_generation: int = 2
    max_completion_length: int = 8
    teacher_model: Any = None  # a plain model, where the teacher has another architecture

    def losses(self, step: Step, loss_types: Sequence[str]) -> dict[str, tuple[float, Weights]]:
        """Value and gradients of the micro-step's loss, per loss type."""
        names = step.losses[loss_types[0]][1]
        student = {n: w.clone().requires_grad_(n in names) for n, w in step.student.items()}
        turns = self.turns(step.generation)
        rows = [self._row(step, student, turns, i) for i in range(len(step.inputs["row"]))]
        found = {}
        for loss_type in loss_types:
            loss = self._mean(rows, loss_type, step.generation.tokens)
            leaves = [student[name] for name in names]
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, leaves, retain_graph=True)
            else:
                grads = [torch.zeros_like(leaf) for leaf in leaves]
            found[loss_type] = loss.item(), dict(zip(names, grads, strict=True))
        return found

    def _row(self, step: Step, student: Weights, turns: list, i: int) -> Tensor:
        """Loss of each token that counts, (T,): policy term plus weighted divergence."""
        inputs, generation = step.inputs, step.generation
        index = int(inputs["row"][i])
        turn, distilled = turns[index]
        ids = torch.tensor(
            generation.completion_ids[index][: int(inputs["completion_mask"][i].sum())]
        )
        if not len(ids):
            return torch.zeros(0, dtype=torch.double)
        question = generation.rows[index]["prompt"][-1]["content"]
        p_s = self._probabilities(effective(student, "default"), question, ids)
        with torch.no_grad():
            p_t = self._probabilities(
                effective(generation.teacher, "teacher"), turn, ids, self.teacher_model
            )
            p_old = self._probabilities(effective(generation.student, "default"), question, ids)
        reused = "old_per_token_logps" in inputs
        log_p = at(p_s, ids).log()
        old = at(p_old, ids).log() if reused else log_p.detach()
        gap = (at(p_t, ids).log() - old) * distilled
        advantages = self.credit(self.method, inputs["advantages"][i].double(), gap, step.lam)
        ratio = (log_p - old).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        if self.divergence is not None and distilled:
            loss = loss + self.weight * self.divergence(p_t, p_s)
        return loss

    def _probabilities(self, weights: Weights, turn: str, ids: Tensor, model: Any = None) -> Tensor:
        prompt = torch.tensor(tiny.tokenizer().encode(f"<user>{turn}</s><assistant>"))
        model = _skeleton() if model is None else model
        logits = functional_call(model, weights, (torch.cat([prompt, ids])[None],)).logits[0]
        return (logits[len(prompt) - 1 : -1] / self.temperature).softmax(-1)

    def _mean(self, rows: list[Tensor], loss_type: str, tokens: int) -> Tensor:
        total, counted = sum(row.sum() for row in rows), sum(map(len, rows))
        if loss_type == "dapo":
            return total / (max(tokens, 1) * self.accumulation / self.steps_per_generation)
        if loss_type == "grpo":
            mean = sum(row.sum() / max(len(row), 1) for row in rows) / len(rows)
        elif loss_type == "bnpo":
            mean = total / max(counted, 1)
        else:
            mean = total / (len(rows) * self.max_completion_length)
        return mean / self.accumulation


def effective(weights: Weights, adapter: str, scaling: float = 2.0) -> Weights:
    """Weights of the plain model, W + scaling B A where there is LoRA (rank 4, alpha 8)."""
    merged = {}
    for name, value in weights.items():
        stem = name.removeprefix("base_model.model.")
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            factors = (name.replace("base_layer", f"lora_{x}.{adapter}") for x in "BA")
            b, a = (weights[factor] for factor in factors)
            stem, value = stem.replace(".base_layer", ""), value + scaling * b @ a
        merged[stem] = value
    return merged


def biased(model: Any) -> Any:
    """Give the LM head a bias, which Qwen3 has not and other families have."""
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(model.lm_head.weight)))
    return model


def _skeleton() -> torch.nn.Module:
    """A plain model for its structure; its own weights are never used."""
    global _MODEL
    if _MODEL is None:
        with torch.random.fork_rng():
            _MODEL = biased(tiny.model()).double().eval()
            torch.nn.init.zeros_(_MODEL.lm_head.bias)
    return _MODEL


_MODEL: torch.nn.Module | None = None


def assert_equal(found: dict, expected: dict, rel: float = 2e-5) -> None:
    """Compare value and every gradient, relative to the largest gradient of the micro-step."""
    for loss_type, (value, grads) in expected.items():
        ours, our_grads = found[loss_type]
        assert abs(ours - value) <= rel * max(abs(value), 0.1), (loss_type, ours, value)
        scale = max(grad.abs().max().item() for grad in grads.values())
        for name, grad in grads.items():
            error = (our_grads[name] - grad).abs().max().item()
            assert error <= rel * max(scale, 1e-3), (loss_type, name, error, scale)
