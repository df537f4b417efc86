"""Tasks: deterministic and disjoint rows, and verifiers that hostile text does not get past."""

import pytest

from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.gym import answer_tag, last_number
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
    with pytest.raises(ValueError, match="reference is 'solution'"):
        load_task("arithmetic", train_size=1, test_size=1, seed=0, reference="solution")


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


@pytest.mark.parametrize(
    "text", [RIGHT, "answer 758", "answer 7 5 8\n", "reference says 1 answer 758"]
)
def test_right_answers_are_verified(text):
    assert verify(text, ROW)


@pytest.mark.parametrize(
    "text",
    [
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
    ],
)
def test_hostile_answers_are_not(text):
    assert not verify(text, ROW)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (("ones 5 + 3", "ones 5 + 2"), "2"),
        (("ones 5", "tens 5"), "tens"),
        (("= 0 8", "= 1 8"), "1"),
        (("= 1 5", "= 1 6"), "6"),
        (("8 + 0 = 1", "8 + 1 = 1"), "1"),
        (("answer 7 5 8", "answer 7 5 9"), "9"),
        (("answer 7 5 8", "answer 7 5 8 8"), "8"),
    ],
)
def test_first_error_finds_the_first_wrong_token(change, wrong):
    chain = RIGHT.replace(*change)
    right, tokens = tokens_of(RIGHT), tokens_of(chain)
    index = first_error(chain, ROW)
    assert tokens[index] == wrong
    assert tokens[:index] == right[:index]


def test_first_error_of_right_quoting_and_unfinished_chains():
    assert first_error(RIGHT, ROW) is None
    assert first_error(RIGHT.replace("5 + 3", "3 + 5"), ROW) is None
    assert first_error(f"reference says 1 2 3 {RIGHT}", ROW) is None
    assert (
        first_error(RIGHT.replace("answer 7 5 8", "answer 7 5"), ROW) == len(tokens_of(RIGHT)) - 1
    )
    assert first_error("", ROW) == 0


def test_nuisance_is_the_filler_words():
    marked = [t for t, free in zip(tokens_of(RIGHT), nuisance_mask(RIGHT), strict=True) if free]
    assert marked == ["well", "now", "look"]


def test_a_reference_is_noticed_in_any_case_and_form():
    task = load_task("arithmetic", train_size=1, test_size=1, seed=0)
    assert task.speaks_of_reference("Reference says 7 5 8 answer 758")
    assert task.speaks_of_reference([{"role": "assistant", "content": "the reference"}])
    assert not task.speaks_of_reference(RIGHT)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 + 7 = 13", "13"),
        ("so it is -4.", "-4"),
        ("about 1,234.50 dollars", "1234.50"),
        ("**13**", "13"),
        ("none", None),
        ("", None),
        ("x13y", None),
        ("٣", None),
        ("12 or 13", "13"),
    ],
)
def test_the_last_number_is_taken(text, number):
    assert last_number(text) == number


def test_one_answer_tag_is_taken_and_two_are_not():
    assert answer_tag("so <answer> 13 </answer>") == "13"
    assert answer_tag("<answer>12</answer><answer>13</answer>") is None
    assert answer_tag("13") is None


def test_bad_requests_name_what_would_be_right():
    with pytest.raises(ValueError, match="nearest valid name is 'chain_sum'"):
        load_task("chain_sums", train_size=1, test_size=1, seed=0)
    with pytest.raises(ValueError, match=r"no options \['min_term'\].*'min_terms'"):
        load_task("chain_sum", train_size=1, test_size=1, seed=0, min_term=2)
    with pytest.raises(ValueError, match="choose one of last_number"):
        load_task("chain_sum", train_size=1, test_size=1, seed=0, extract="last")
    with pytest.raises(ValueError, match="digits is 9; choose 1 to 4"):
        load_task("arithmetic", train_size=1, test_size=1, seed=0, digits=9)
    with pytest.raises(ValueError, match="different test questions"):
        load_task("arithmetic", train_size=1, test_size=500, seed=0, digits=1)
    with pytest.raises(ValueError, match="size is 0"):
        load_task("arithmetic", train_size=0, test_size=1, seed=0)


def test_solved_examples_open_every_prompt_and_are_in_neither_side():
    task = load_task("chain_sum", train_size=20, test_size=10, seed=0, examples=2, system="Add.")
    prompts = [*task.train["prompt"], *task.test["prompt"]]
    opening = prompts[0][:-1]
    assert [turn["role"] for turn in opening] == ["system", *["user", "assistant"] * 2]
    assert all(prompt[:-1] == opening for prompt in prompts)
    shown = {turn["content"] for turn in opening}
    assert not shown & {prompt[-1]["content"] for prompt in prompts}
