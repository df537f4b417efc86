"""The lab: its language, its corpus, its cache; its full recipe in a slow test."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import tiny
import torch
from forked import process

from rlsd_lib.measure.evaluate import evaluate
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lab.arithmetic import (
    FILLERS,
    PRIVILEGED_TEMPLATE,
    draw_problem,
    first_error,
    make_row,
    nuisance_mask,
    tokens_of,
    verify,
)
from rlsd_lib.tasks.lab.chains import Style, write_chain
from rlsd_lib.tasks.lab.model import LabRecipe, build_tokenizer, conversation, load_lab
from rlsd_lib.tasks.task import is_held_out

TINY = LabRecipe(digits=2, steps=3, ramp_steps=1, batch_size=4, hidden_size=32, layers=1)


TOKENIZER = build_tokenizer()


def chains(nuisance: float, count: int = 400, digits: int = 3, **options) -> list:
    random = Random(0)
    rows = [draw_problem(random, digits) for _ in range(count)]
    beliefs = options.pop("beliefs", {})
    style = Style(nuisance, options.pop("tilt", 0.0))
    return [(row, write_chain(row, random, style, beliefs)) for row in rows]


@pytest.mark.parametrize(("digits", "nuisance"), [(3, 0.0), (1, 0.05), (3, 0.35), (1, 0.6)])
def test_a_chain_without_doubts_is_right_and_as_talkative_as_the_dial_says(digits, nuisance):
    written = chains(nuisance, digits=digits)
    assert all(verify(chain, row) and first_error(chain, row) is None for row, chain in written)
    fillers = sum(sum(nuisance_mask(chain)) for _, chain in written)
    lengths = [len(tokens_of(chain)) + 1 for _, chain in written]  # and the end token
    assert fillers / sum(lengths) == pytest.approx(nuisance, abs=0.01)
    assert max(lengths) <= Style(nuisance).longest_chain(digits, quoted=False)


def test_a_doubtful_fact_is_written_wrong_at_its_rate_and_carried_on():
    recipe = LabRecipe(hard_share=1.0, hard_low=0.3, hard_high=0.3)
    written = chains(0.0, count=2000, digits=1, beliefs=recipe.beliefs)
    wrong = [(row, chain) for row, chain in written if not verify(chain, row)]
    assert len(wrong) / len(written) == pytest.approx(0.3, abs=0.04)
    for row, chain in wrong:
        at = first_error(chain, row)
        assert tokens_of(chain)[at - 1] == "=" or tokens_of(chain)[at - 2] == "="


def test_style_leans_towards_half_of_the_fillers():
    text = " ".join(chain for _, chain in chains(0.5, tilt=1.0))
    counts, half = Counter(tokens_of(text)), len(FILLERS) // 2
    plain, preferred = (sum(counts[w] for w in ws) for ws in (FILLERS[:half], FILLERS[half:]))
    assert preferred / plain == pytest.approx(2.718, rel=0.1)


def test_the_corpus_quotes_only_what_it_was_shown_and_leaves_test_questions_out():
    recipe, random, shown, quoted = LabRecipe(), Random(0), 0, 0
    for number in range(600):
        traced = number % 2 == 0
        user, assistant = conversation(recipe, random, 0.3, traced=traced)
        question, chain = user["content"], assistant["content"]
        speaks = "reference" in chain
        assert not is_held_out(question.split(" ;")[0])
        assert not speaks or "reference" in question
        shown, quoted = shown + ("reference" in question), quoted + speaks
        assert ("answer" in question) == (traced and "reference" in question)
    assert shown / 600 == pytest.approx(recipe.referenced_share, abs=0.08)
    assert quoted / shown == pytest.approx(0.5, abs=0.1)


def test_every_token_is_a_word_a_digit_or_a_sign():
    row = make_row(473, 285)
    chain = write_chain(row, Random(0), Style(0.4), {}, quote=row["answer"])
    ids = TOKENIZER(chain)["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == tokens_of(chain)
    assert TOKENIZER.decode(ids) == chain
    with pytest.raises(Exception, match="vocabulary"):
        TOKENIZER("a word that the lab does not know")


def test_the_chat_template_knows_every_role_and_ends_the_assistants_turn():
    chat = [{"role": role, "content": "7"} for role in ("system", "user", "assistant")]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"])
    assert tokens == ["<system>", "7", "<user>", "7", "<assistant>", "7", "<eos>"]
    asked = TOKENIZER.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert TOKENIZER.padding_side == "left"


def test_pretraining_is_cached_and_repeats_itself(tmp_path):
    state = torch.get_rng_state()
    model, tokenizer = load_lab(tmp_path / "a", TINY)
    again, _ = load_lab(tmp_path / "b", TINY)
    cached, _ = load_lab(tmp_path / "a", TINY)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        assert torch.equal(weight, cached.state_dict()[name]), name
    assert len(tokenizer) == model.config.vocab_size
    assert [p.name for p in tmp_path.glob("a/lab-*") if p.is_dir()] == [f"lab-{TINY.digest()}"]


def test_processes_that_start_at_once_do_not_collide(tmp_path):
    workers = [process(load_lab, tmp_path, TINY) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [f"lab-{TINY.digest()}"]


def test_an_interrupted_pretraining_leaves_nothing_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr("rlsd_lib.tasks.lab.model.pretrain", lambda recipe: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_lab(tmp_path, TINY)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_recipes_differ_in_their_digest_and_are_checked():
    digests = {LabRecipe().digest(), replace(LabRecipe(), seed=1).digest(), TINY.digest()}
    assert len(digests) == 3
    for value, said in (
        ({"nuisance": 1.0}, r"nuisance=1\.0: expected a share in \[0, 1\)"),
        ({"hard_share": 1.5}, r"hard_share=1\.5: expected a share in \[0, 1\]"),
        ({"steps": 0}, "steps=0: expected a count >= 1"),
    ):
        with pytest.raises(ValueError, match=said):
            LabRecipe(**value)


@pytest.mark.slow
def test_the_full_recipe_is_the_model_organism_it_claims_to_be(tmp_path):
    recipe = LabRecipe()
    model, tokenizer = load_lab(tmp_path, recipe)
    task = load_task("arithmetic", train_size=10, test_size=400, seed=0)
    limit = {"max_new_tokens": recipe.max_completion_length, "batch_size": 400}
    plain = evaluate(model, tokenizer, task, **limit)
    shown = evaluate(model, tokenizer, tiny.as_teacher(task, PRIVILEGED_TEMPLATE), **limit)
    traces = load_task("arithmetic", train_size=10, test_size=400, seed=0, reference="trace")
    traced = evaluate(model, tokenizer, tiny.as_teacher(traces, PRIVILEGED_TEMPLATE), **limit)
    assert 0.40 <= plain["correct"].mean() <= 0.65
    assert traced["correct"].mean() >= 0.90
    assert shown["correct"].mean() >= 0.95
    assert plain["speaks_of_reference"].mean() <= 0.01
    assert 0.4 <= shown["speaks_of_reference"].mean() <= 0.6
