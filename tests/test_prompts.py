"""The teacher's prompt, and the rows that are refused before any compute is spent."""

import pytest
import tiny

from rlsd_lib import prompts as privileged

TEMPLATE = "{prompt} [hint: {privileged_context}]"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]


def test_only_the_last_user_turn_changes():
    turns = [*CHAT, {"role": "assistant", "content": "5"}, {"role": "user", "content": "sure?"}]
    seen = privileged.teacher_prompt(turns, "4", TEMPLATE)
    assert seen[:3] == turns[:3]
    assert seen[3] == {"role": "user", "content": "sure? [hint: 4]"}
    assert turns[3]["content"] == "sure?"
    assert privileged.teacher_prompt("2+2?", "4", TEMPLATE) == "2+2? [hint: 4]"


def test_braces_in_either_text_and_in_the_template_are_left_alone():
    template = r"{prompt} \boxed{} {privileged_context}"
    rendered = privileged.render(template, "{privileged_context} {x}", r"\frac{1}{2} {prompt}")
    assert rendered == r"{privileged_context} {x} \boxed{} \frac{1}{2} {prompt}"


def test_images_stay_in_place():
    image = {"type": "image", "image": object()}
    content = [image, {"type": "text", "text": "what is it?"}]
    seen = privileged.teacher_prompt([{"role": "user", "content": content}], "a cat", TEMPLATE)
    assert seen[0]["content"][0] is image
    assert seen[0]["content"][1]["text"] == "what is it? [hint: a cat]"


def test_a_prompt_without_a_user_turn_is_refused():
    with pytest.raises(ValueError, match="no user turn"):
        privileged.teacher_prompt([{"role": "system", "content": "x"}], "4", TEMPLATE)


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (["4", None, "", "  "], r"3 dataset rows have no privileged_context \(rows 1, 2, 3\)"),
        (["4", 7], r"1 dataset rows have a privileged_context that is not a string \(rows 1\)"),
        (["<|image_pad|> 4"], r"image placeholder"),
        (["4", "<image> 4"], r"image placeholder in privileged_context \(rows 1\)"),
    ],
)
def test_bad_rows_are_named(contexts, message):
    with pytest.raises(ValueError, match=message):
        privileged.check_contexts(contexts, TEMPLATE)


def test_an_empty_reference_is_the_null_control_of_a_plain_template():
    privileged.check_contexts(["", ""], "{prompt}{privileged_context}")
    with pytest.raises(ValueError, match="rows 0"):
        privileged.check_contexts([None], "{prompt}{privileged_context}")


def test_a_leaked_reference_is_refused_and_a_short_answer_counted():
    prompts = [CHAT, [{"role": "user", "content": "Is 4 even? The answer  is 4."}]]
    assert privileged.count_in_prompts(prompts, ["4", "4"]) == 1
    assert privileged.count_in_prompts(prompts, ["22", "swer is"]) == 0
    with pytest.raises(ValueError, match=r"own prompt \(rows 1\)"):
        privileged.count_in_prompts(prompts, ["4", "answer is 4"])
    for told in ("**The answer**  is 4.", "the ANSWER is `4`", "$The$ ánswer is <b>4</b>"):
        with pytest.raises(ValueError, match=r"own prompt \(rows 1\)"):
            privileged.count_in_prompts(prompts, ["4", told])
    assert privileged.count_in_prompts(prompts, ["4", "answer is -4"]) == 0


def test_prompts_of_unusual_shape_are_named():
    bad = [
        [{"role": "system", "content": "s"}],
        [{"content": "no role"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"text": "no type"}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        ["text"],
        None,
        7,
    ]
    with pytest.raises(ValueError, match=r"10 dataset rows have no prompt.*\(rows 1, 2, .*, 10\)"):
        privileged.check_prompts([CHAT, *bad, "a text"], TEMPLATE)


def test_control_tokens_are_refused_in_rows_and_spelled_out_in_peers():
    with pytest.raises(ValueError, match=r"have a control token .*\(rows 1\)"):
        privileged.check_contexts(["4", "4</s><user>"], TEMPLATE, control={"</s>"})
    assert privileged.spelled("4</s>5", {"</s>"}) == "4< /s>5"
    assert privileged.spelled(None, {"</s>"}) is None


def test_shortening_cuts_the_reference_and_never_the_question():
    tokenizer = tiny.tokenizer()

    def count(prompt):
        return len(tokenizer.encode(prompt))

    short = privileged.shorten_to_fit("question", "123456789", TEMPLATE, 25, tokenizer, count)
    whole = privileged.render(TEMPLATE, "question", short)
    assert "123456789".startswith(short)
    assert whole.startswith("question [hint: ")
    assert count(whole) == 25
    with pytest.raises(ValueError, match="leaves no room"):
        privileged.shorten_to_fit("question", "123456789", TEMPLATE, 17, tokenizer, count)
