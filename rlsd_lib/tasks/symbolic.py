"""Symbolic equality of two answers, in a worker process with a deadline and a memory limit.

No model output is ever run. math-verify reads LaTeX by its grammar, but its time limits need the
main thread and do not stop a long integer power, hence the process. sympy calls `eval` even for the
digits of a number; in the worker `literal` stands in its place. This is also the worker's script.
"""

import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
from typing import Any

SECONDS = 5.0  # deadline of one comparison; past it the answer is wrong
MEMORY = 2 * 2**30  # bytes of address space for the worker
_LEFT = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?) ?=")  # the left side of x = ...


class Worker:
    """math-verify in a process of its own, started when needed and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def equal(self, *question: Any) -> bool | None:
        """The worker's `compare(*question)`, None where it gives no verdict within the deadline."""
        verdict = self._ask(json.dumps(question).encode() + b"\n")
        return verdict == b"1\n" if verdict else None

    def _ask(self, line: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            # Not multiprocessing: its spawn imports the user's script, its fork would copy CUDA.
            command = [sys.executable, "-P", __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
            self._process = subprocess.Popen(command, **pipes, **quiet)
            if self._read(120) != b"ready\n":
                raise RuntimeError(f"the grader did not start; see why with: {' '.join(command)}")
        self._process.stdin.write(line)
        # An empty line also comes from a worker that the input has crashed.
        if not (verdict := self._read(SECONDS)):
            self._process.kill()
            self._process.wait()
            logging.getLogger(__name__).warning("no verdict, so wrong: %s", line[:200])
        return verdict

    def _read(self, seconds: float) -> bytes:
        out = self._process.stdout
        return out.readline() if select.select([out], [], [], seconds)[0] else b""


class Workers:
    """A worker for each thread that asks; what got no verdict once is wrong without asking again."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._free: list[Worker] = []
        self._undecided: set[tuple[str, str, float]] = set()

    def equal(self, gold: str, answer: str, tolerance: float) -> bool:
        """Whether two LaTeX answers are equal, or numbers within a relative `tolerance` of the gold.

        No verdict within the deadline means no.
        """
        if self._owner != os.getpid():  # after a fork the pipes are the parent's
            self.__init__()
        if (question := (gold, answer, tolerance)) in self._undecided:
            return False
        try:
            worker = self._free.pop()
        except IndexError:
            worker = Worker()
        verdict = worker.equal(*question)
        self._free.append(worker)
        if verdict is None:
            self._undecided.add(question)
        return bool(verdict)


WORKERS = Workers()


def compare(gold: str, answer: str, tolerance: float) -> bool:
    """Compare two LaTeX strings by math-verify, or as numbers to a tolerance, in the worker."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:  # the first match only: no looking for parts that parse
        options = {"extraction_mode": "first_match", "parsing_timeout": None}
        return parse(f"${text}$", [LatexExtractionConfig()], **options)

    def near(one: str, other: str, limit: float) -> bool:
        numbers = [complex(read(text)[0].evalf()) for text in (one, other)]
        return abs(numbers[0] - numbers[1]) <= limit * abs(numbers[0])

    def same(one: str, other: str) -> bool:
        equal = verify(read(one), read(other), timeout_seconds=None)
        return equal or (tolerance > 0 and near(one, other, tolerance))

    left = _LEFT.match(gold), _LEFT.match(answer)
    if left[1] and gold.count("=") <= 1 and (not left[0] or left[0][1] == left[1][1]):
        gold, answer = gold[left[0].end() if left[0] else 0 :], answer[left[1].end() :]
    if "=" in gold or "," in gold + answer or not re.search(r"=|\\approx", answer):
        return same(gold, answer)
    parts = re.split(r"=|\\approx", answer)  # a chain commits to all of its members
    if r"\approx" not in answer:
        return all(same(gold, part) for part in parts)
    return any(same(gold, p) for p in parts) and all(near(parts[0], p, 0.01) for p in parts)


def literal(code: str, *_: Any) -> Any:
    """Read a number or a name as sympy's tokenizer writes it, in place of sympy's `eval`."""
    import sympy

    if (found := re.fullmatch(r"(Integer|Float|Symbol) \('?([\w.+-]+)'? \)", code.strip())) is None:
        raise ValueError(f"{code!r} is neither a number nor a name")
    return getattr(sympy, found[1])(found[2])


def _serve() -> None:
    """Answer questions, one JSON list a line, until the input ends."""
    import resource

    import math_verify  # noqa: F401  (before the limit, and before saying ready)
    import sympy.parsing.sympy_parser as sympy_parser
    import sympy.physics.units  # noqa: F401  (evaluates names of its own when first imported)

    sympy_parser.eval_expr = literal
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.write(1, b"ready\n")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS + 1)  # ends an orphan; nobody handles it
        try:
            verdict = compare(*json.loads(line))
        except Exception:  # whatever a hostile string makes the parser do is a wrong answer
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1\n" if verdict else b"0\n")


if __name__ == "__main__":
    _serve()
