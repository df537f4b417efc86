"""Looking shows what training does: the same prompts, gap, credit and divergence, and no trace."""

from dataclasses import asdict, replace

import pytest
import tiny
import torch
from datasets import Dataset
from dense import script

from rlsd_lib import METHODS, RLSDTrainer
from rlsd_lib.divergence import divergence
from rlsd_lib.measure import rollouts as lens
from rlsd_lib.methods import PRIVILEGED, Method
from rlsd_lib.tasks import Task


def sevenths(completion: str, row: dict) -> float:
    return sum(map(ord, completion)) % 7 / 7


TOLD = [f"the answer is {7 + i}" for i in range(4)]


@pytest.fixture(scope="module")
def task() -> Task:
    """Rewards between the verdicts, so that who takes one for the other is seen."""
    prompts = [[{"role": "user", "content": f"{i}?"}] for i in range(4)]
    data = Dataset.from_dict({"prompt": prompts, "privileged_context": TOLD})
    return Task(
        name="letters",
        train=data,
        test=data,
        verify=lambda completion, row: sevenths(completion, row) > 0.8,
        reference_pattern="ref",
        score=sevenths,
    )


class Watched(RLSDTrainer):
    """Keeps what its first step computed of every rollout, in the order of generation."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["place"] = torch.arange(len(inputs))  # follows the rollout through TRL's shuffle
        ids, mask = output["completion_ids"], output["completion_mask"].bool()
        self.completions = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        self.found = [{} for _ in inputs]
        self.prompt = inputs[0]["prompt"]
        return output

    def _token_advantages(self, inputs, logps):
        credited = super()._token_advantages(inputs, logps)
        gap = inputs["teacher_per_token_logps"] - logps
        self.keep(inputs, credit=credited, gap=gap, advantage=inputs["advantages"])
        return credited

    def _distillation_loss(self, model, hidden, inputs):
        def kept(*args, **kwargs):
            values = divergence(*args, **kwargs)
            self.keep(inputs, divergence=values.detach() * inputs.get("weight", 1.0))
            return values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rlsd_lib.trainer.trainer.divergence", kept)
            return super()._distillation_loss(model, hidden, inputs)

    def keep(self, inputs, **values):
        for name, rows in values.items():
            for place, row in zip(inputs["place"].tolist(), rows, strict=True):
                self.found[place][name] = row


CASES = {
    "rlsd": {},
    "rlsd, every option": {
        "lambda_init": 0.9,
        "epsilon_w": 0.7,
        "weight_clip": "log",
        "conserve_credit": True,
        "scale_rewards": "none",
        "chat_template_kwargs": {"add": "x"},
    },
    "rlsd, a peer": {"peer_context": True, "success_reward_threshold": 0.5},
    "rlsd_neutral": {},
    "sdpo": {"success_reward_threshold": 0.5},
    "opsd": {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.3},
    "opsd, sampled": {"distillation_mode": "sampled_token"},
    "opsd_teacher_top1, no peer": {"peer_context": True, "success_reward_threshold": 2.0},
    "opd": {"distillation_token_clip": 0.5},
    "cepo, wrong references": {},
    "rlsd_contrast, wrong references": {"wrong_references": 2},
    "opsd_value_contrast, wrong references": {"success_reward_threshold": 0.5},
    "privileged_baseline": {"success_reward_threshold": 0.5},
    "antisd": {"credit_settings": {}},
    "srpo": {"distillation_mode": "full_logits", "credit_settings": {"beta": 0.5}},
    "opsd_value": {"success_reward_threshold": 0.5, "policy_weight": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_a_look_shows_what_the_trainer_computes(tmp_path, monkeypatch, task, case):
    """The trainer's completions, looked at with its config: one prompt, a group of eight."""
    method = case.split(",")[0]
    config = tiny.config(
        tmp_path,
        method=method,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=1,
        temperature=0.8,
        reward_weights=[2.0],
        **CASES[case],
    )
    teacher = tiny.model(1).eval() if method == "opd" else None
    student, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>", "<assistant>{{ add }}")
    watched = Watched(
        student,
        task.reward,
        config,
        task.train if case.endswith("wrong references") else task.train.select([1]),
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    script(watched).train()
    monkeypatch.setattr(lens, "sample", lambda *_, **__: watched.completions)
    row = task.train["prompt"][:].index(watched.prompt)
    looked = lens.look(tiny.model(), tokenizer, task, row, config, teacher=teacher)
    assert len({rollout.reward for rollout in looked}) > 2
    for rollout, expected in zip(looked, watched.found, strict=True):
        for name, value in expected.items():
            found = torch.tensor(asdict(rollout)[name])
            value = value[: len(rollout.tokens)] if value.dim() else value
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, msg=name)
        assert bool(rollout.divergence) == ("divergence" in expected)
    assert any(any(rollout.gap) for rollout in looked) == (not case.endswith("no peer"))


def test_every_method_can_be_looked_at(tmp_path, task):
    for method in METHODS:
        weight = {"distillation_weight": 1.0} if METHODS[method].needs_weight else {}
        config = tiny.config(tmp_path, method=method, success_reward_threshold=0.0, **weight)
        if method in (
            "oracle",
            "oracle_value",
            "rlsd_thought_only",
        ):  # this task does not know where it went wrong
            with pytest.raises(ValueError, match=r"This look has no (first_error|success|thought)"):
                lens.look(tiny.model(), tiny.tokenizer(), task, 0, config)
            continue
        rollouts = lens.look(tiny.model(), tiny.tokenizer(), task, 0, config, teacher=tiny.model(1))
        assert len(rollouts) == config.num_generations, method
        frame = lens.token_frame(rollouts)
        assert len(frame) == sum(len(r.gap) for r in rollouts), method
        assert frame.notna().all().all(), method
        assert all(any(r.credit) or any(r.divergence) for r in rollouts), method


def test_a_credit_with_options_is_given_lambda_and_the_clip(tmp_path, monkeypatch, task):
    asked = {}

    def mine(advantages, gap, mask, **options):
        asked.update(options)
        return advantages[:, None] + 0 * gap

    monkeypatch.setitem(
        METHODS, "mine", Method("of a reader", credit=mine, teacher_sees=PRIVILEGED)
    )
    lens.look(tiny.model(), tiny.tokenizer(), task, 0, tiny.config(tmp_path, method="mine"))
    assert asked == {"lam": 0.5, "epsilon_w": 0.2}


def test_a_look_samples_as_training_does_and_leaves_no_trace(tmp_path, task):
    """Many models are published with a top-k or a penalty, which training does not use either."""
    config, tokenizer = tiny.config(tmp_path), tiny.tokenizer()

    def texts(model, **changes) -> list[str]:
        looked = lens.look(model.train(), tokenizer, task, 1, config, **changes)
        return [rollout.completion for rollout in looked]

    model, state = tiny.model(), torch.random.get_rng_state()
    plain = texts(model)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    model.generation_config.update(top_k=1, repetition_penalty=1.5, suppress_tokens=[*range(2, 40)])
    assert texts(model) == plain
    assert len(set(texts(model, top_k=1))) == 1 < len(set(plain))
    assert texts(model, seed=1) != plain
    assert len(texts(model, num_generations=3)) == 3
    assert max(map(len, texts(model, max_completion_length=2))) == 2
    with pytest.raises(ValueError, match="epsilon_w=-1"):
        texts(model, epsilon_w=-1)


def test_a_task_that_knows_where_a_rollout_went_wrong_tells_the_trainer(tmp_path, task):
    """The first wrong token, T for none or for a right rollout, and the tokens that decide."""
    encode = tiny.tokenizer().encode
    texts = ["auxb", "ab", "uuu"]
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in map(encode, texts)])
    found = {"auxb": 2, "ab": None, "uuu": 3}
    knowing = replace(
        task,
        verify=lambda text, row: text == "ab",
        first_error=lambda text, row: found[text],
        decisions=lambda text: [letter != "u" for letter in text],
    )
    config = tiny.config(tmp_path, method="oracle")
    signals = lens.task_signals(tiny.model(), knowing, tiny.tokenizer(), config)
    given = signals([{}] * 3, ids, (ids != 0).long())
    assert given["first_error"].tolist() == [2, 6, 3]
    assert given["decisions"].int().tolist() == [
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert lens.task_signals(tiny.model(), task, tiny.tokenizer(), config) is None
    grpo = tiny.config(tmp_path, method="grpo")
    assert lens.task_signals(tiny.model(), knowing, tiny.tokenizer(), grpo) is None
    looked = lens.look(
        tiny.model(), tiny.tokenizer(), replace(knowing, first_error=lambda *_: 0), 0, config
    )
    assert len(looked) == config.num_generations
