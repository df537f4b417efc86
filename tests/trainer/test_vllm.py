"""Rollouts by vLLM in the training process: the same test on a CPU and on a GPU.

`make test-vllm` runs this in an environment that has vLLM; elsewhere it is left out. Two runs of
three steps, on all weights and with LoRA, are watched from inside, and the tests read the records.
vLLM serves float32 weights in half precision, which is where its small differences come from.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3ForCausalLM

from rlsd_lib import RLSDTrainer
from rlsd_lib.credit import rlsd
from rlsd_lib.methods import METHODS

pytestmark = pytest.mark.vllm

STEPS = 3
SERVED = 0.08  # nats per token between vLLM and transformers on the same weights, at most
MOVED = 1.0  # nats per token that one step at this learning rate moves them, at least
SHIFT = 2.0  # nats by which some reported log-probabilities are made wrong


@pytest.fixture(scope="module", autouse=True)
def _cpu_build() -> None:
    pytest.importorskip("vllm", reason="run by `make test-vllm`")
    if not torch.cuda.is_available():
        import vllm_cpu

        vllm_cpu.keep_weights_loadable()


class Watched:
    """A run of three steps, and what was true at each of its generations and losses."""

    def __init__(self, folder: Path, *, lora: bool) -> None:
        self.served: list[torch.Tensor] = []  # vLLM's log-probabilities of fixed sequences
        self.trained: list[torch.Tensor] = []  # the policy's, at the same moment
        self.active: list[Any] = []  # the adapter that was active while weights went to vLLM
        self.losses: list[dict[str, Any]] = []  # what each was given, and the gaps of its credit
        self.teacher_rows = 0
        self.trainer = self._trainer(folder, lora)
        self.sequences = torch.randint(6, 40, (4, 12), generator=torch.Generator().manual_seed(3))
        self.watch_vllm()
        self.watch_teacher()
        self.watch_credit()
        with pytest.MonkeyPatch.context() as patch:
            row = dataclasses.replace(METHODS["rlsd"], credit=self.credit)
            patch.setitem(METHODS, "rlsd", row)
            self.trainer.train()
        self.history = [row for row in self.trainer.state.log_history if "loss" in row]

    def _trainer(self, folder: Path, lora: bool) -> RLSDTrainer:
        # vLLM loads from a folder, and its CPU kernels know no head of 16 numbers.
        start = tiny.model(hidden_size=64, intermediate_size=128, head_dim=32)
        start.save_pretrained(folder / "start")
        tiny.tokenizer().save_pretrained(folder / "start")
        student: Any = Qwen3ForCausalLM.from_pretrained(folder / "start")
        if lora:
            student = get_peft_model(student, LoraConfig(r=4, init_lora_weights=False))
        return tiny.trainer(
            folder / "run",
            student,
            use_vllm=True,
            vllm_max_model_length=256,
            use_cpu=not torch.cuda.is_available(),
            max_steps=STEPS,
            learning_rate=0.3 if lora else 0.05,
            teacher_sync_steps=2,
        )

    def watch_vllm(self) -> None:
        """Score the fixed sequences with both models whenever rollouts are about to be drawn."""
        backend = self.trainer.vllm_generation
        generate, sync = backend.generate, backend.sync_weights

        def synced() -> None:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self.active.append(getattr(model, "active_adapter", None))
            sync()

        def generated(*args: Any, **kwargs: Any) -> tuple:
            self.served.append(self.by_vllm())
            self.trained.append(self.by_policy())
            prompts, completions, logps, ids = generate(*args, **kwargs)
            # Every second token is reported wrong, and the first of each rollout as no number.
            logps = [
                [[value - SHIFT * (t % 2) for value in tokens] for t, tokens in enumerate(row)]
                for row in logps
            ]
            for row in logps:
                row[0] = [None]  # how TRL passes on a NaN
            return prompts, completions, logps, ids

        backend.sync_weights, backend.generate = synced, generated

    def watch_teacher(self) -> None:
        """Count the rows that the teacher scores."""
        score = self.trainer.teacher_scores

        def counted(prompts: list, contexts: list, output: dict, **kwargs: Any) -> Any:
            before = self.forward_rows
            result = score(prompts, contexts, output, **kwargs)
            self.teacher_rows += self.forward_rows - before
            return result

        self.forward_rows = 0
        self.trainer.teacher_scores = counted
        for model in {self.trainer.model, self.trainer.teacher.model}:
            layers = model.get_base_model() if isinstance(model, PeftModel) else model
            layers.model.register_forward_pre_hook(self.add_rows, with_kwargs=True)

    def add_rows(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.forward_rows += kwargs["input_ids"].size(0)

    def watch_credit(self) -> None:
        """Keep what the loss was given, with the teacher's and the policy's log-probabilities."""
        token_advantages = self.trainer._token_advantages

        def kept(inputs: dict, logps: torch.Tensor) -> torch.Tensor:
            self.losses.append({**inputs, "fresh": logps, "gaps": []})
            return token_advantages(inputs, logps)

        self.trainer._token_advantages = kept

    def credit(self, advantages: Any, gap: Any, mask: Any, **kwargs: Any) -> torch.Tensor:
        self.losses[-1]["gaps"].append(gap)
        return rlsd(advantages, gap, mask, **kwargs)

    def by_vllm(self) -> torch.Tensor:
        """log P of tokens 1.. of the fixed sequences, by the engine."""
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=1, prompt_logprobs=0)
        rows = self.sequences.tolist()
        prompts = [{"prompt_token_ids": row} for row in rows]
        outputs = self.trainer.vllm_generation.llm.generate(prompts, wanted, use_tqdm=False)
        return torch.tensor(
            [
                [
                    given[token].logprob
                    for given, token in zip(out.prompt_logprobs[1:], row[1:], strict=True)
                ]
                for out, row in zip(outputs, rows, strict=True)
            ]
        )

    @torch.no_grad()
    def by_policy(self) -> torch.Tensor:
        """The same by transformers."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        ids = self.sequences.to(model.device)
        logps = model(ids).logits[:, :-1].float().log_softmax(-1)
        return logps.gather(-1, ids[:, 1:, None])[..., 0].cpu()


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp(request.param), lora=request.param == "lora")


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().mean().item()


def test_vllm_has_the_policys_weights_at_every_step(run: Watched) -> None:
    """Also with LoRA, where the adapter is merged on its way and the teacher's must not be."""
    assert len(run.served) == STEPS
    for served, trained in zip(run.served, run.trained, strict=True):
        assert distance(served, trained) < SERVED
    for i in range(1, STEPS):
        assert distance(run.trained[i], run.trained[i - 1]) > MOVED
        assert distance(run.served[i], run.trained[i - 1]) > MOVED


def test_trap_17_the_teachers_adapter_is_never_what_is_sent(run: Watched) -> None:
    lora = isinstance(run.trainer.model, PeftModel)
    assert run.active == ["default" if lora else None] * STEPS


def test_trap_4_the_gap_is_between_teacher_and_policy_whatever_vllm_reports(run: Watched) -> None:
    assert len(run.losses) == 2 * STEPS
    for loss in run.losses:
        mask = loss["completion_mask"].bool()
        expected = loss["teacher_per_token_logps"] - loss["old_per_token_logps"]
        assert loss["gaps"]
        assert all(torch.equal(gap[mask], expected[mask]) for gap in loss["gaps"])
        # The policy that drew the rollouts, rescored: up to rounding, the one that now learns
        # from them. What vLLM reported is no number, or two nats off.
        torch.testing.assert_close(loss["old_per_token_logps"], loss["fresh"], atol=1e-4, rtol=0)
        reported = loss["sampling_per_token_logps"][mask]
        assert reported.isnan().any()
        assert (reported - loss["old_per_token_logps"][mask]).abs().nanmean() > SHIFT / 4


def test_the_mismatch_is_corrected_per_token_so_that_credit_survives(run: Watched) -> None:
    assert run.trainer.args.vllm_importance_sampling_mode == "token_truncate"
    for loss in run.losses:
        ratio, mask = loss["importance_sampling_ratio"], loss["completion_mask"].bool()
        assert ratio.shape == mask.shape
        honest = ratio[:, 2::2][mask[:, 2::2]]
        assert (honest - 1).abs().max() < 0.5
        assert torch.all(ratio[:, 0] == 1), "no report, no correction"
        wrong = ratio[:, 1::2][mask[:, 1::2]]
        assert torch.all(wrong == run.trainer.args.vllm_importance_sampling_clip_max)
    for row in run.history:
        assert row["sampling/importance_sampling_ratio/max"] == 3.0
        assert torch.isfinite(torch.tensor([row["loss"], row["rlsd/gap_mean"]])).all()


def test_the_teacher_reads_each_prompt_and_scores_each_rollout_once(run: Watched) -> None:
    rollouts = run.trainer.args.generation_batch_size
    prompts = rollouts // run.trainer.args.num_generations
    assert run.teacher_rows == STEPS * (prompts + rollouts)
    assert [row["rlsd/teacher_age"] for row in run.history] == [0, 1, 0]
