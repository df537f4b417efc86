"""Tasks: deterministic and disjoint rows, and verifiers that hostile text does not get past."""

import pytest

from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.gym import answer_in
from rlsd_lib.tasks.lab.arithmetic import first_error, make_row, nuisance_mask, tokens_of, verify
from rlsd_lib.tasks.task import is_held_out

ROW = make_row(473, 285)
RIGHT = (
    "well ones 5 + 3 + 0 = 0 8 now tens 7 + 8 + 0 = 1 5 look hundreds 4 + 2 + 1 = 0 7 answer 7 5 8"
)
GYM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def questions(dataset) -> list[str]:
    return [row["prompt"][-1]["content"] for row in dataset]


@pytest.mark.parametrize(("name", "options"), [("arithmetic", {}), ("chain_sum", GYM)])
def test_rows_follow_the_seed_and_no_test_question_is_in_train(name, options):
    one, same, other = (
        load_task(name, train_size=60, test_size=30, seed=seed, **options) for seed in (0, 0, 1)
    )
    assert one.train.to_list() == same.train.to_list()
    assert one.test.to_list() == same.test.to_list()
    assert questions(one.train) != questions(other.train)
    train = set(questions(one.train)) | set(questions(other.train))
    assert not train & (set(questions(one.test)) | set(questions(other.test)))
    assert len(set(questions(one.train))) == 60
    assert len(set(questions(one.test))) == 30
    assert {"prompt", "privileged_context", "answer"} <= set(one.train.column_names)
    assert all(isinstance(text, str) and text for text in one.train["privileged_context"])


def test_a_trace_is_a_right_chain_of_the_same_questions():
    answers, traces = (
        load_task("arithmetic", train_size=200, test_size=20, seed=0, reference=reference)
        for reference in ("answer", "trace")
    )
    assert questions(answers.train) == questions(traces.train)
    for row in traces.train:
        chain = row["privileged_context"]
        assert verify(chain, row) and first_error(chain, row) is None
        assert not any(nuisance_mask(chain))


def test_the_side_of_a_question_depends_on_its_text_alone():
    sides = [is_held_out(f"{number} + 100") for number in range(100, 1100)]
    assert 0.15 < sum(sides) / len(sides) < 0.25


@pytest.mark.parametrize(("name", "options"), [("arithmetic", {}), ("chain_sum", GYM)])
def test_the_reference_answer_is_rewarded_as_text_and_as_messages(name, options):
    task = load_task(name, train_size=8, test_size=2, seed=0, **options)
    texts = [f"answer {answer}" for answer in task.train["answer"]]
    columns = {column: task.train[column][:] for column in task.train.column_names}
    assert task.reward(texts, **columns, trainer_state=object(), log_metric=print) == [1.0] * 8
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert task.reward(chats, **columns) == [1.0] * 8
    assert task.reward(["answer 99999"] * 8, **columns) == [0.0] * 8


def test_right_answers_are_verified_and_hostile_ones_are_not():
    for text in (RIGHT, "answer 758", "answer 7 5 8\n", "reference says 1 answer 758"):
        assert verify(text, ROW), text
    for text in (
        "",
        "758",
        "answer",
        "answer 0758",
        "answer 7580",
        "answer -758",
        "answer 758 answer 758",
        "answer 757 answer 758",
        "answer 758 so 759",
        "answer 7 5 8 <eos>",
        "answer ٧٥٨",
        "answer 7\u200b58",
        "answers 758",
        "answer seven hundred fifty eight",
        "answer " + "9" * 100_000,
        "answer " + " " * 50_000 + "x",
    ):
        assert not verify(text, ROW), text[:80]


def test_first_error_finds_the_first_wrong_token():
    right = tokens_of(RIGHT)
    for old, new, wrong in [
        ("ones 5 + 3", "ones 5 + 2", "2"),
        ("ones 5", "tens 5", "tens"),
        ("= 0 8", "= 1 8", "1"),
        ("= 1 5", "= 1 6", "6"),
        ("8 + 0 = 1", "8 + 1 = 1", "1"),
        ("answer 7 5 8", "answer 7 5 9", "9"),
        ("answer 7 5 8", "answer 7 5 8 8", "8"),
    ]:
        chain = RIGHT.replace(old, new)
        index, tokens = first_error(chain, ROW), tokens_of(chain)
        assert tokens[index] == wrong, chain
        assert tokens[:index] == right[:index], chain


def test_first_error_of_right_quoting_and_unfinished_chains():
    assert first_error(RIGHT, ROW) is None
    assert first_error(RIGHT.replace("5 + 3", "3 + 5"), ROW) is None
    assert first_error(f"reference says 1 2 3 {RIGHT}", ROW) is None
    assert first_error(RIGHT.removesuffix(" 8"), ROW) == len(tokens_of(RIGHT)) - 1
    assert first_error("", ROW) == 0


def test_nuisance_is_the_filler_words():
    marked = [t for t, free in zip(tokens_of(RIGHT), nuisance_mask(RIGHT), strict=True) if free]
    assert marked == ["well", "now", "look"]


def test_a_reference_is_noticed_in_any_case_and_form():
    task = load_task("arithmetic", train_size=1, test_size=1, seed=0)
    assert task.speaks_of_reference("Reference says 7 5 8 answer 758")
    assert task.speaks_of_reference([{"role": "assistant", "content": "the reference"}])
    assert not task.speaks_of_reference(RIGHT)


def test_an_answer_is_extracted_from_a_completion():
    for text, number in {
        "6 + 7 = 13": "13",
        "so it is -4.": "-4",
        "about 1,234.50 dollars": "1234.50",
        "**13**": "13",
        "none": None,
        "": None,
        "x13y": None,
        "٣": None,
        "12 or 13": "13",
        "so <answer> a cat </answer> of 13": "a cat",
        "<answer>12</answer><answer>13</answer>": None,
    }.items():
        assert answer_in(text) == number, text


def test_bad_requests_name_what_would_be_right():
    for name, options, message in [
        ("chain_sums", {}, "Unknown task 'chain_sums'. Did you mean 'chain_sum'"),
        ("chain_sum", {"min_term": 2}, "option of chain_sum 'min_term'. Did you mean 'min_terms'"),
        ("arithmetic", {"digits": 9}, "digits is 9; choose 1 to 8"),
        ("arithmetic", {"reference": "solution"}, "reference 'solution'.*Valid: answer, trace"),
        ("arithmetic", {"digits": 1, "test_size": 500}, "different test questions"),
        ("arithmetic", {"train_size": 0}, "train_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_task(name, **{"train_size": 1, "test_size": 1, "seed": 0, **options})


def test_an_instruction_stands_in_every_prompt_and_moves_no_question_to_the_other_side():
    plain, told = (
        load_task("chain_sum", train_size=20, test_size=10, seed=0, instruction=text)
        for text in ("", "In a tag.")
    )
    for side in ("train", "test"):
        expected = [f"{question} In a tag." for question in questions(getattr(plain, side))]
        assert questions(getattr(told, side)) == expected
