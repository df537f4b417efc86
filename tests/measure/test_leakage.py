"""Three measures of leakage: planted cases, null values, intervals, bad input."""

import itertools
import math

import grimp
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from scripted import CHAT, Scripted, talk, tokenizer

from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.intervals import share_interval
from rlsd_lib.measure.leakage import (
    highest_capital,
    measure,
    other_references,
    summarise,
    value_leakage,
    view_ratios,
)
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.lab.arithmetic import make_row, underived

TEMPLATE = "{prompt} ; {privileged_context}"
CHAIN = "well ones 3 + 5 + 0 = 0 8 tens 7 + 8 + 0 = 1 5 so hundreds 4 + 2 + 1 = 0 7 answer 7 5 8"


# ---- value level ------------------------------------------------------------------------------


CHAINS = [
    (CHAIN, 0.0),  # derived, then stated
    (f"reference says 7 5 8 {CHAIN}", 1.0),
    (CHAIN.replace("so", "so 7 5 8"), 1.0),  # before the last column is added
    (f"reference says 7 6 8 {CHAIN}", 0.0),  # an invented value is not the row's
    (f"the reference {CHAIN}", 0.0),  # the word alone is no value
    (f"1 7 5 8 3 {CHAIN}", 1.0),  # digits that stand apart cannot be told
    ("answer 7 5 8", 1.0),  # nothing was added at all
    ("ones 3 + 5 + 0 = 0 8", 0.0),
]


def test_a_value_leaks_where_it_stands_before_it_was_derived():
    rows = [make_row(473, 285), make_row(111, 222)]
    for completion, leaks in CHAINS:
        found = value_leakage([completion, CHAIN], rows, underived)
        assert (found["value"][0], found["chance"][0]) == (leaks, 0.0), completion


TEXTS = [
    ("It is 1,008. Let me check: 500 and 508 make that number.", 1.0),
    ("500 and 508 make, when we add the two of them, 1,008.", 0.0),
    ("It is 31,008 or 1,008.5 or x1,008, let me see what else.", 0.0),
    ("1,008", 0.0),
]


def test_without_a_known_chain_the_first_half_of_the_words_decides():
    rows = [{"prompt": f"{i}?", "privileged_context": v} for i, v in enumerate(["1,008", "77"])]
    for completion, leaks in TEXTS:
        assert value_leakage([completion, ""], rows)["value"][0] == leaks, completion


def test_chance_is_the_share_of_other_values_and_shown_values_are_left_out():
    values = ["12", "34", "56", "78"]
    rows = [{"prompt": f"what of {v}?", "privileged_context": v} for v in values[1:]]
    rows = [{"prompt": "what of 78?", "privileged_context": "12"}, *rows]
    found = value_leakage(["34 and 78 or 12, who could ever say that?"] * 4, rows)
    assert found["value"].tolist()[:1] == [1.0] and found["value"][1:].isna().all()
    assert found["chance"][0] == 0.5  # 34 of 34 and 56; 78 stands in the prompt
    assert found["chance"][1:].isna().all()


def test_a_random_guess_is_at_chance():
    draw = np.random.default_rng(0)
    rows = [{"prompt": "?", "privileged_context": str(v)} for v in draw.integers(0, 10, 2000)]
    texts = [f"{v} is my guess, and nothing else" for v in draw.integers(0, 10, 2000)]
    found = value_leakage(texts, rows)
    rate = share_interval(found["value"])
    assert rate.low < found["chance"].mean() < rate.high
    assert found["chance"].mean() == pytest.approx(0.1, abs=0.01)


# ---- information level ------------------------------------------------------------------------


BASE = Scripted(talk(quoting=1e-6))
ROWS = [
    {"prompt": [{"role": "user", "content": f"{i} ?"}], "privileged_context": str(9 - i)}
    for i in range(10)
]
LIMIT = 8


def task_of(rows: list[dict], pattern: str = r"\breference\b") -> Task:
    data = Dataset.from_list(rows)
    texts = {"reference_pattern": pattern, "privileged_template": TEMPLATE}
    return Task("words", train=data, test=data, verify=lambda text, row: False, **texts)


def ids_of(tokens, text: str, limit: int) -> list[int]:
    """The tokens of a text that was sampled under a limit: with the end token where it fits."""
    return [*tokens.encode(text, add_special_tokens=False), tokens.eos_token_id][:limit]


def evidence(completions: list[str], rows: list[dict] | None = None) -> np.ndarray:
    rows = rows or [ROWS[i % 10] for i in range(len(completions))]
    prompts, references = ([row[k] for row in rows] for k in ("prompt", "privileged_context"))
    ids = [ids_of(tokenizer(), text, LIMIT) for text in completions]
    ratios = view_ratios(BASE, tokenizer(), prompts, ids, references, template=TEMPLATE)
    return highest_capital(ratios, LIMIT).numpy()


def report(model: Scripted, tokens, task: Task, **sampling):
    """The measures of a model beside those of the base model."""
    settings = {"base_model": BASE, "max_new_tokens": LIMIT, **sampling}
    return summarise(*(measure(m, tokens, task, **settings) for m in (model, BASE)))


def test_the_ratio_of_a_token_is_that_of_the_marginal_view_and_the_base_model():
    row = {"prompt": "<user> 3 ? <assistant>", "privileged_context": "6"}
    other = {"prompt": "<user> 3 ? <assistant>", "privileged_context": "2"}
    ratio, _ = view_ratios(
        BASE,
        tokenizer(),
        [row["prompt"], other["prompt"]],
        [ids_of(tokenizer(), text, 4) for text in ("reference 2 so", "so")],
        ["6", "2"],
        template="<user> ; {privileged_context} {prompt}",
    )
    first, later = (np.sqrt([*p, *[1e-6] * (19 - len(p))]) for p in ([1e-6, 1.0], [0.2, 0.5, 0.3]))
    expected = [
        math.log(0.9 / (first[0] / first.sum())),  # a careless writer says it more often
        math.log(0.82 / (1 / 10)),  # sees 2, the other row's; without one, digits are even
        0.0,
        math.log(0.2 / (later[0] / later.sum())),
    ]
    torch.testing.assert_close(ratio, torch.tensor(expected).double(), rtol=0, atol=0.02)


def test_a_batch_gives_what_each_text_gives_alone():
    """Prompts of different length, padded together: the same numbers as one forward pass each."""
    model, tokens = tiny.model().eval(), tiny.tokenizer()
    prompts, references = ["1?", "12+34?", "9-8?"], ["7", "46", "1"]
    texts = ["7 is", "46", "so 1"]
    settings = {"template": "{prompt}|{privileged_context}", "batch_size": 2}
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    completions = [ids_of(tokens, text, 8) for text in texts]
    found = view_ratios(model, tokens, asked, completions, references, **settings)
    for i, prompt in enumerate(prompts):
        ids = completions[i]
        scores = []
        for seen in (prompt, *[f"{prompt}|{r}" for r in references if r != references[i]]):
            prefix = tokens.encode(f"<user>{seen}</s><assistant>")
            with torch.no_grad():
                logits = model(torch.tensor([prefix + ids])).logits[0, len(prefix) - 1 : -1]
            chosen = torch.tensor(ids)[:, None]
            scores.append([(logits / t).log_softmax(-1).gather(1, chosen)[:, 0] for t in (1, 2)])
        plain, views = torch.maximum(*scores[0]), torch.stack([view for view, _ in scores[1:]])
        expected = (views.logsumexp(0) - math.log(2) - plain).double()
        torch.testing.assert_close(found[i, : len(ids)], expected, rtol=1e-4, atol=1e-4)
        assert (found[i, len(ids) :].abs() < 1e-12).all()


def test_a_model_is_sampled_and_judged_under_the_template_that_it_was_trained_with():
    """Where the template itself asks for a reference, speaking of one is no leak."""
    told = tokenizer()
    told.chat_template = "{% if ask %}reference {% endif %}" + CHAT
    task = task_of([ROWS[i % 10] for i in range(20)])
    settings = {"base_model": BASE, "max_new_tokens": LIMIT}
    silent = measure(BASE, told, task, **settings)
    asked = {"chat_template_kwargs": {"ask": True}}
    found = measure(BASE, told, task, **settings, **asked)
    assert not silent["phrase"].any()
    assert found["phrase"].mean() > 0.5, "the prompts that were sampled from lack it"
    # Nobody is shown a value, hence a bet on one is all that the view can win.
    assert (found["evidence"] < 0.2).mean() > 0.5, "the prompts that were judged lack it"
    frame = report(BASE, told, task, **asked)
    assert frame.set_index(["measure", "of"]).loc[("phrase", "base"), "mean"] > 0.5


def test_the_capital_is_a_mean_over_the_places_where_a_leak_may_begin():
    a, b = 1.0, 2.0
    first, second = (math.exp(a) + 1) / 2, (math.exp(a + b) + math.exp(b)) / 2
    found = highest_capital(torch.tensor([[a, b], [a, -9.0], [-1.0, 0.0]]), 2)
    expected = [math.log(second), math.log(first), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))
    third = (2 * math.exp(a + b + a) + math.exp(b + a) + math.exp(a)) / 4
    found = highest_capital(torch.tensor([[a, b, a]]), 3)
    torch.testing.assert_close(found, torch.tensor([math.log(third)]))
    torch.testing.assert_close(highest_capital(torch.tensor([[a]]), 1), torch.tensor([a]))


def test_the_null_holds_exactly_for_any_two_models():
    """All texts of 6 tokens under two random models, their probabilities summed exactly."""
    length = 6
    texts = list(itertools.product(range(3), repeat=length))
    for seed in range(5):
        draw, laws = np.random.default_rng(seed), {}
        for text in texts:
            for end in range(length):
                if text[:end] not in laws:
                    laws[text[:end]] = draw.dirichlet([0.3] * 3, size=2) + 1e-9
        steps = np.array([[laws[t[:i]][:, t[i]] for i in range(length)] for t in texts])
        ratios = torch.tensor(np.log(steps[..., 1] / steps[..., 0]))  # (N, T)
        capital, chance = highest_capital(ratios, length).numpy(), steps[..., 0].prod(1)
        for alpha in (0.5, 0.2, 0.05, 0.01):
            assert chance[capital >= math.log(1 / alpha)].sum() <= alpha, (seed, alpha)
        assert 0 < (chance * capital).sum() <= 1.0, seed


def test_the_base_model_stays_within_the_null_however_it_talks():
    rows = [row for row in ROWS for _ in range(10)]
    prompts, references = ([row[k] for row in rows] for k in ("prompt", "privileged_context"))
    for quoting in (0.01, 0.3):
        model = Scripted(talk(quoting))
        ids = sample(model, tokenizer(), prompts, max_new_tokens=LIMIT, seed=1)
        ratios = view_ratios(model, tokenizer(), prompts, ids, references, template=TEMPLATE)
        found = highest_capital(ratios, LIMIT)
        said = tokenizer().batch_decode(ids)
        assert any("reference" in text for text in said), "it mentions one, now and then"
        assert share_interval(found >= math.log(20)).low <= 0.05, quoting
        assert found.mean() <= 1.0, quoting


def test_quotations_are_found_wherever_they_begin_and_whatever_they_quote():
    own, invented, late = (
        "reference 9 so answer",
        "reference 4 so answer",
        "so so so reference 4 so",
    )
    found = evidence([own, invented])
    assert (found > math.log(20)).all()
    # In the middle of a text the scripted view never quotes: nothing to find there.
    assert evidence([late, "so"])[0] < math.log(20)


def test_the_word_alone_is_not_counted_where_there_is_a_good_reason_for_it():
    asked = [{"prompt": [{"role": "user", "content": "reference 3 ?"}], "privileged_context": "6"}]
    said = ["reference", "3", "so", "answer", "<end>"]
    speaker = Scripted(lambda words: {said[min(len(words) - 1 - words.index("<assistant>"), 4)]: 1})
    task = task_of(asked * 9 + ROWS[:1], pattern="REFERENCE")
    judged = measure(speaker, tokenizer(), task, base_model=BASE, max_new_tokens=LIMIT)
    assert set(judged["completion"]) == {"reference 3 so answer"}
    assert judged["phrase"].all()
    assert judged["value"].fillna(0).sum() == 0
    assert (judged["evidence"][:9] < 0.2).all()
    assert judged["evidence"][9] > math.log(20)


def test_noise_is_no_leak():
    draw = np.random.default_rng(0)
    words = ["so", "answer", *"0123456789"]
    texts = [" ".join(draw.choice(words, LIMIT)) for _ in range(100)]
    assert share_interval(evidence(texts) >= math.log(20)).mean <= 0.05


def test_a_report_tells_a_leaking_model_from_its_base():
    task = task_of([ROWS[i % 10] for i in range(100)])
    leaking = Scripted(talk(quoting=0.6))
    frame = report(leaking, tokenizer(), task).set_index(["measure", "of"])
    for name in ("phrase", "privileged view", "evidence"):
        model, base, difference = (frame.loc[name, o] for o in ("model", "base", "difference"))
        assert base["low"] <= base["null"]
        assert model["low"] > model["null"]
        assert difference["low"] > 0
        assert difference["mean"] == pytest.approx(model["mean"] - base["mean"])
    assert frame.loc[("value", "model"), "problems"] == 100
    again = report(BASE, tokenizer(), task)
    same = again[again["of"] == "difference"]
    assert (same["mean"] == 0).all() and (same["low"] <= 0).all() and (same["high"] >= 0).all()


def test_what_cannot_be_measured_is_refused():
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match="at least two rows that differ"):
        evidence(["so", "so"], [ROWS[0], ROWS[0]])
    for shown in ({"prompt": prompt}, {"images": ["square.png"]}):
        task = task_of([{**ROWS[0], **shown}])
        with pytest.raises(ValueError, match="rows with images cannot be measured"):
            measure(BASE, None, task, base_model=BASE, max_new_tokens=4)


def test_the_references_shown_are_never_the_rows_own():
    shown = other_references(["1", "1", "2", "3"], seed=0)
    assert [sorted(row) for row in shown] == [["2", "3"], ["2", "3"], ["1", "3"], ["1", "2"]]


def test_nothing_that_measures_imports_the_trainer():
    graph = grimp.build_graph("rlsd_lib", include_external_packages=True, cache_dir=None)
    for module in graph.find_children("rlsd_lib.measure"):
        assert "rlsd_lib.trainer.trainer" not in graph.find_upstream_modules(module), module
    assert "trl" in graph.find_upstream_modules("rlsd_lib.trainer.trainer")
