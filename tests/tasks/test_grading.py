"""Graders: a table of answers with their verdicts, hostile input, the worker, and the reward."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import sympy.physics.units  # the worker has it loaded, too
from sympy.parsing import sympy_parser

from rlsd_lib.tasks import Task, symbolic
from rlsd_lib.tasks.grading import final_answer, grade, is_formatted, weighted

# reference, completion, verdict
MATHS = [
    ("42", "42", True),
    ("42", "43", False),
    ("42", "The answer is 42.", True),
    ("42", "So we get **Answer:** 42", True),
    ("42", "<think>It is 41? No.</think>\nThe final answer is \\boxed{42}.", True),
    ("42", "<thought>\\boxed{41}</thought><answer>42</answer>", True),
    ("42", "<answer>\\boxed{42}</answer>", True),
    ("42", "$42$", True),
    ("42", "42.0", True),
    ("-3", "−3", True),
    ("3", "-3", False),
    ("1234", "1,234", True),
    ("1234567", "\\boxed{1{,}234{,}567}", True),
    ("1/2", "0.5", True),
    ("\\frac{1}{2}", "\\dfrac12", True),
    ("$\\frac{3}{4}$", "3/4", True),
    ("3/4", "4/3", False),
    ("-\\frac{1}{2}", "\\frac{-1}{2}", True),
    ("1\\frac{1}{2}", "1.5", True),
    ("0.333", "1/3", False),
    ("0.3333333", "1/3", True),
    ("1e5", "100000", True),
    ("3 \\times 10^5", "300000", True),
    ("3×10⁵", "3×10⁵", True),
    ("6.02e23", "6.02 \\times 10^{23}", True),
    ("50\\%", "0.5", True),
    ("50%", "50", True),
    ("50%", "50 percent", True),
    ("50%", "5%", False),
    ("0.25", "25\\%", True),
    ("12 cm", "12", True),
    ("12", "12\\text{ cm}", True),
    ("12 cm", "12 centimeters", True),
    ("12 cm", "12 m", False),
    ("12\\,\\mathrm{cm}^2", "12 square centimeters", True),
    ("12 cm^2", "12 cm", False),
    ("5 km/h", "5 km per hour", True),
    ("5 m/s", "5 km/h", False),
    ("12 apples", "12", True),
    ("12 apples", "12 oranges", False),
    ("$5", "\\$5", True),
    ("30^\\circ", "30", True),
    ("30°", "30 degrees", True),
    ("30^{\\circ}", "60^\\circ", False),
    ("5x", "5", False),
    ("10", "10_2", False),
    ("10", "{10}_{2}", False),
    ("10_2", "10_{2}", True),
    ("2\\sqrt{2}", "\\sqrt{8}", True),
    ("2√2", "2\\sqrt2", True),
    ("2\\pi", "2π", True),
    ("2\\pi", "6.28", False),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+1", False),
    ("x=5", "5", True),
    ("5", "x = 5", True),
    ("x=5", "y=5", False),
    ("5", "x = 2+3 = 5", True),
    ("5", "5 = 6", False),
    ("6", "5 = 6", False),
    ("\\sqrt{2}", "\\sqrt{2} \\approx 1.41", True),
    ("1.41", "\\sqrt{2} \\approx 1.41", True),
    ("5", "5 \\approx 6", False),
    ("y=2x+1", "y = 1 + 2x", True),
    ("\\{1,2,3\\}", "\\{3, 1, 2\\}", True),
    ("\\{1,2,3\\}", "\\{1, 2\\}", False),
    ("\\{1,2\\}", "1, 2", True),
    ("x=1 or x=2", "1 and 2", True),
    ("[1,2)", "\\left[1, 2\\right)", True),
    ("[1,2)", "[1,2]", False),
    ("(1,2)", "\\{1,2\\}", False),
    ("(1,2)", "(2,1)", False),
    ("(-\\infty,2]\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2]", True),
    ("x>2", "(2,\\infty)", True),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}", True),
    ("\\text{red}", "Red", True),
    ("red", "blue", False),
    ("listen", "silent", False),
    ("5", "5 or 6", False),
    ("5", "\\boxed{5} or \\boxed{6}", False),
    ("5", "<answer>5</answer><answer>6</answer>", False),
    ("5", "<answer>6</answer> \\boxed{5}", False),
    ("5", "The answer is 5. No, the answer is 6.", False),
    ("5", "\\boxed{5}, that is \\boxed{ 5 }", True),
    ("5", "<think>cut off while \\boxed{5}", False),
    ("5", "I do not know\nwhat to say", False),
    ("5", "", False),
]
NUMBERS = [
    ("3.14", "3.14159", True),
    ("3.14", "3.15", False),
    ("6.28", "2\\pi", True),
    ("1999", "2000", False),
    ("1000", "1000.4", False),
    ("0.5", "0.504", True),
    ("0.5", "0.54", False),
    ("12.50 kg", "12.5", True),
    ("12.5 kg", "12.5 g", False),
    ("1/3", "0.3333", True),
    ("12.5%", "12.5 percent", True),
    ("2.5", "two and a half", False),
]
LETTERS = [
    ("A", "A", True),
    ("A", "(A)", True),
    ("A", "A.", True),
    ("A", "a", True),
    ("A", "\\boxed{A}", True),
    ("A", "\\boxed{\\text{(A)}}", True),
    ("A", "The answer is A", True),
    ("A", "The correct answer is **A**.", True),
    ("A", "<answer>Option A</answer>", True),
    ("A", "A. red", True),
    ("A. red", "A", True),
    ("D", "D. Vitamin B", True),
    ("A", "B", False),
    ("A", "A or B", False),
    ("A", "A, B", False),
    ("A", "(A) (B)", False),
    ("A", "A. red / B. 12 cm", False),
    ("A", "not A", False),
    ("A", "green", False),
    ("A", "А", False),  # a Cyrillic letter
    ("A, C", "C and A", True),
    ("A, C", "AC", True),
    ("A, C", "A", False),
]
BOOLEANS = [
    ("yes", "Yes", True),
    ("True", "yes", True),
    ("no", "<answer>False.</answer>", True),
    ("yes", "No", False),
    ("yes", "Yes, because it is round.", True),
    ("yes", "yes and no", False),
    ("yes", "not true", False),
    ("no", "No, it is not.", True),
    ("yes", "maybe", False),
    ("yes", "1.5", False),
    ("yes", "1", True),
    ("yes", "correct me", False),
    ("no", "No idea", False),
    ("no", "0.5", False),
]
TABLES = {
    "math": MATHS,
    "numerical": NUMBERS,
    "multiple choice": LETTERS,
    "boolean": BOOLEANS,
}


@pytest.mark.parametrize("kind", TABLES)
def test_table(kind: str) -> None:
    wrong = [line for line in TABLES[kind] if grade(line[1], line[0], kind) is not line[2]]
    assert wrong == []


HOSTILE = {
    "power tower": "9**9**9**9",
    "LaTeX power tower": "9^{9^{9^{9}}}",
    "boxed power tower": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "factorials": "((((9!)!)!)!)!",
    "huge exponent": "1e999999999",
    "huge fraction": "\\frac{1}{10^{10^{10}}}",
    "import": "__import__('os').system('touch hacked')",
    "boxed import": "\\boxed{__import__('os').system('touch hacked')}",
    "open": "open('hacked', 'w').write('x')",
    "eval in LaTeX": "$\\text{__import__('os').system('touch hacked')}$",
    "lambda": "(lambda: exec(\"open('hacked','w')\"))()",
    "nested braces": "\\boxed{" + "{" * 5000 + "42" + "}" * 5000 + "}",
    "nested fractions": "\\frac{1}{" * 60 + "42" + "}" * 60,
    "nested roots": "\\sqrt{" * 80 + "42" + "}" * 80,
    "nested parentheses": "(" * 240 + "42" + ")" * 240,
    "open braces": "\\boxed{" * 12_000,
    "open tags": "<answer>" * 12_000,
    "open boxes": "\\boxed{{a" * 10_000,
    "announcements": "the answer is: " * 6_000,
    "many boxes": "".join(f"\\boxed{{{i}}}" for i in range(5000)),
    "very long": "42" * 2_000_000,
    "long digits": "4" * 499,
    "spaces": "<thought>" + " " * 90_000,
    "carets": "^" * 499,
    "dollars": "$" * 9_999,
    "backslashes": "\\" * 9_999,
    "fullwidth digits": "\\boxed{４２}",
    "Arabic digits": "\\boxed{٤٢}",
    "zero width": "\\boxed{4\u200b2}",
    "right to left": "\\boxed{\u202e24}",
    "null byte": "\\boxed{42\x00}",
    "half a surrogate": "\\boxed{42\ud800}",
    "integral": "\\int_0^{10^{99}} \\sin(x^{x^{x}}) dx",
    "sum": "\\sum_{n=1}^{10^{12}} \\frac{1}{n^n}",
    "choices": "A" * 400,
    "options": "A, " * 160,
}


@pytest.mark.parametrize("kind", TABLES)
def test_hostile_text_is_wrong_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "SECONDS", 0.3)
    gold = {"multiple choice": "B", "boolean": "yes"}.get(kind, "42")
    for name, completion in HOSTILE.items():
        begun = time.monotonic()
        assert grade(completion, gold, kind) is False, name
        # The deadline and a new worker, on a busy machine.
        assert time.monotonic() - begun < 10.0, name
        assert not os.path.exists("hacked"), name


def test_no_answer_reaches_an_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, float]] = []
    monkeypatch.setattr(symbolic.Worker, "equal", lambda _, *q: bool(asked.append(q)))
    for kind, table in TABLES.items():
        for gold, completion, _ in table:
            grade(completion, gold, kind)
    assert len(asked) > 30

    def refuse(*_: object) -> None:
        raise AssertionError("eval was called")

    monkeypatch.setattr(sympy_parser, "eval", refuse, raising=False)
    with pytest.raises(AssertionError, match="eval was called"):
        sympy.sympify("1 + 1")
    monkeypatch.setattr(sympy_parser, "eval_expr", symbolic.literal)
    with pytest.raises(ValueError, match="neither a number nor a name"):
        sympy.sympify("().__class__")
    assert sum(symbolic.compare(*question) for question in asked) > 20


def test_verdicts_do_not_need_the_main_thread() -> None:
    verdicts: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(grade(f"{n}-{n}+2", "2x/x", "math")))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8


def test_a_killed_worker_is_replaced() -> None:
    assert grade("7+7", "14", "math")
    worker = symbolic.WORKERS._free[-1]
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert grade("8+8", "16", "math")


def _in_child(queue: multiprocessing.Queue) -> None:
    queue.put([grade("9+9", "18", "math"), symbolic.WORKERS._free[-1]._process.pid])


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    assert grade("4+4", "8", "math")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    verdict, worker = queue.get(timeout=60)
    child.join()
    assert verdict
    assert worker != symbolic.WORKERS._free[-1]._process.pid
    assert grade("5+5", "10", "math")


def test_a_timeout_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(symbolic, "SECONDS", 0.2)
    assert not grade("9^{9^{9^{7}}}", "5", "math")
    assert "no verdict" in caplog.text


def test_what_got_no_verdict_is_not_asked_again_and_rows_are_graded_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight times the same, and eight that differ: two deadlines, not sixteen."""
    monkeypatch.setattr(symbolic, "WORKERS", symbolic.Workers())
    monkeypatch.setattr(symbolic, "SECONDS", 2.0)
    task = Task("t", [], [], lambda text, row: grade(text, row["answer"], "math"), "", judges=8)
    assert task.reward([f"{n}-{n}+2" for n in range(8)], answer=["2"] * 8) == [1.0] * 8  # started
    asked: list[str] = []
    ask = symbolic.Worker.equal
    monkeypatch.setattr(
        symbolic.Worker, "equal", lambda worker, *q: (asked.append(q[1]), ask(worker, *q))[1]
    )
    hard = ["10^{10^{10}}+" + str(n) for n in range(4)]
    begun = time.monotonic()
    assert task.reward([*hard, *hard], answer=["5"] * 8) == [0.0] * 8
    assert task.reward([*hard, *hard], answer=["5"] * 8) == [0.0] * 8
    assert len(asked) <= 8
    assert time.monotonic() - begun < 8 * symbolic.SECONDS


def test_final_answer() -> None:
    for completion, answer in {
        "<think>a</think> b <answer>5</answer>": "5",
        "<think>The answer is 4.</think> The answer is 5.": "5",
        "<think><answer>5</answer></think>": None,
        "<thought>never closed <answer>5</answer>": "5",
        "<ANSWER> 5 </ANSWER>": "5",
        "two lines\nwithout an answer": None,
        "\\boxed{\\frac{1}{\\sqrt{2}}}": "\\frac{1}{\\sqrt{2}}",
        "\\boxed{5": "\\boxed{5",
    }.items():
        assert final_answer(completion) == answer, completion


GOOD = "<thought>2 + 3</thought>\n<answer>5</answer>"


def test_the_format_is_one_reasoning_block_then_one_answer_block() -> None:
    for text, formatted in {
        GOOD: True,
        GOOD.replace("thought", "think"): True,
        "  " + GOOD + "\n": True,
        "so " + GOOD: False,
        GOOD + " done": False,
        GOOD + GOOD: False,
        "<thought> </thought><answer>5</answer>": False,
        "<thought>a</think><answer>5</answer>": False,
        "<answer>5</answer>": False,
        "5": False,
    }.items():
        assert is_formatted(text) is formatted, text


def test_the_weighted_reward_is_the_released_codes() -> None:
    for completion, answer, kind, reward in [
        (GOOD, "5", "math", 1.0),
        ("5", "5", "Mathematics", 0.9),
        (GOOD.replace(">5<", ">6<"), "5", "math", 0.1),
        ("6", "5", "math", 0.0),
        (GOOD, "5", "numerical", 1.0),
        ("5", "5", "numerical", 1.0),
        ("B", "A", "multiple choice", 0.0),
    ]:
        assert weighted(completion, answer, kind) == pytest.approx(reward), (completion, kind)


def test_bad_references_are_refused() -> None:
    with pytest.raises(ValueError, match=r"problem_type='essay'.*expected one of \['binary"):
        grade("5", "5", "essay")
    with pytest.raises(ValueError, match=r"answer='\$\$'"):
        grade("5", "$$", "math")
