"""Equality of expressions by Math-Verify, in a process of its own.

Run as a script this file is a worker: it forks a child that answers requests on standard input until one
takes too much processor time; the kernel then ends the child, however deep in C it is, and the next child is
forked in milliseconds because everything is imported already. It imports nothing of gvpo, hence no torch.

Protocol: a request is a line with a JSON list, of the seconds that each comparison may take and of [truth,
answer] pairs. For each pair, in order, comes one byte: `1` equal, `0` not, `!` the child died on it (the rest
of the request is then void).
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

# Imports Math-Verify and fills its parser's tables, once for all children.
_REHEARSAL = (
    (r"\frac{1}{2}+x", "x+0.5"),
    (r"\left[1,2\right)", r"(-\infty, 4] \cup (5,\infty)"),
    (r"1 \pm \sqrt{19}", r"\begin{pmatrix} -2 \\ 1/3 \end{pmatrix}"),
    ("x = 3", r"2 \le x < 5"),
    (r"\frac{n(n+1)}{2}", r"\binom{n}{2}+\lfloor\log_2 8+\sin \pi\rfloor"),
    (r"\{1, -2\}", "f(x) = e^{2t}-n!"),
)

READY, EQUAL, UNEQUAL, DIED = b"R", b"1", b"0", b"!"
MAX_LENGTH = 600
_MAX_DEPTH = 24


def too_complex(text: str) -> bool:
    """Whether an expression is beyond what a person writes as an answer: it is not handed to Math-Verify."""
    if len(text) > MAX_LENGTH:
        return True
    powers = text.count("^") + text.count("**")
    return max(depths(text), default=0) > _MAX_DEPTH or powers > 40 or _EXPLOSIVE.search(text) is not None


def depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(accumulate((character in "([{") - (character in ")]}") for character in text))


_EXPLOSIVE = re.compile(
    r"\d{60,}|"
    r"\d\s*\}?\)?\s*(?:\^|\*\*)\s*[{(]*\s*-?\d+\s*[)}]*\s*(?:\^|\*\*)"  # powers of powers of numbers
    r"|(?:\^|\*\*)\s*[{(\s]*-?[\d,.]{5,}"  # long exponents
    r"|\d{4,}\s*[)}]*\s*!|!\s*[)}]*\s*!"
    r"|\)\s*(?:\^|\*\*)\s*[{(]*\s*\d{3,}"  # a sum to a power of hundreds
    r"|(?:\^\s*\{?\s*\w+\s*){4,}"  # powers of powers of powers
    r"|\\[dt]?binom\s*\{?[^{}]*\d{5,}"
    r"|\\(?:int|sum|prod|lim)(?![a-zA-Z])"
)


def to_latex(text: str) -> str:
    """Plain-text mathematics as LaTeX: `sqrt(2)/2`, `2*pi`, `x**2`, `<=`."""
    for pattern, to in _TO_LATEX:
        text = pattern.sub(to, text)
    return text


_TO_LATEX = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\$", " "),
        (r"(?:(?<![\\a-zA-Z])|\\)sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(pi|theta|infty|sin|cos|tan|cot|sec|csc|log|ln)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![\\a-zA-Z])(?:inf|infinity|oo)(?![a-zA-Z])", r"\\infty "),
        (r"(?<=[\w)}])\s+[uU]\s+(?=[(\[])", r" \\cup "),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"(?<=[^\\])\*", r"\\cdot "),
        (r"\^\((-?[\w/]+)\)", r"^{\1}"),
        # Math-Verify's own removal of units takes single letters too, so that `6m` would equal 6.
        (
            r"(?<=[\w)}\s])\s+(?:(?:square|cubic|sq)\s+)?(?:units?|degrees?|radians?|[ckm]m|meters?|inch(?:es)?|feet|ft"
            r"|yards?|miles?|hours?|minutes?|seconds?|days?|weeks?|months?|years?|dollars?|cents?|grams?|kg|pounds?"
            r"|liters?|ways|people|mph)(?:\s*/\s*[a-z]{1,6}|\s+per\s+[a-z]{1,8})?(?:\s*\^\s*\{?\d\}?)?\s*$",
            "",
        ),
    )
]


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[Any, ...]:
    """Math-Verify's readings of one answer; empty when it has none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig
    from math_verify import parse as math_verify_parse

    config = LatexExtractionConfig()
    config = replace(config, normalization_config=replace(config.normalization_config, units=False))
    # Its own time limit sends signals, which only a main thread may; the worker has a better one.
    found = math_verify_parse(f"${to_latex(text)}$", [config], parsing_timeout=None)
    if all(isinstance(reading, str) for reading in found) and not re.search(r"[A-Za-z]{2,}", text):
        # Not in prose: a number picked out of it is not what was written.
        found = math_verify_parse(text, [ExprExtractionConfig()], parsing_timeout=None) or found
    return tuple(found)


def equal(truth: str, answer: str) -> bool:
    """Whether Math-Verify finds the answer equal to the truth. May run for ever: call it in a worker."""
    from math_verify import verify
    from sympy import MatrixBase, Tuple  # type: ignore[import-untyped]

    expected, given = list(parse(truth)), list(parse(answer))
    if not expected or not given:
        return False
    first, other = expected[0], given[0]
    if _vacuous(first, other) or _differ_somewhere(first, other):
        return False
    if isinstance(first, MatrixBase) and isinstance(other, Tuple) and 1 in first.shape:
        return list(first.flat()) == list(other)  # a column vector, and the same numbers as a tuple
    return bool(verify(expected, given, timeout_seconds=None, allow_set_relation_comp=True))


def _differ_somewhere(expected: Any, given: Any) -> bool:
    """Whether two expressions have clearly different values at a point: then no algebra can make them equal.

    This is much faster than simplifying their difference, which is how Math-Verify finds out.
    """
    from sympy import Expr, Rational

    if not (isinstance(expected, Expr) and isinstance(given, Expr)):
        return False
    symbols = sorted(expected.free_symbols | given.free_symbols, key=str)
    if any(len(str(symbol)) > 1 and "_" not in str(symbol) for symbol in symbols):
        return False  # a word, which Math-Verify compares by its letters
    point = {symbol: Rational(7 + 3 * index, 5 + index) for index, symbol in enumerate(symbols)}
    try:
        left, right = (complex(side.subs(point).evalf(15)) for side in (expected, given))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False
    # Percentages may be meant as fractions, and floats are compared to six decimals: near misses are left
    # alone. The absolute bound is for zeros that come out as rounding errors.
    return all(
        abs(left * scale - right) > max(1e-10, 1e-4 * max(abs(left * scale), abs(right)))
        for scale in (1.0, 100.0, 0.01)
    )


def _vacuous(expected: Any, given: Any) -> bool:
    """Whether a side states nothing (`1 = 2`, a truth value): any two such would count as equal."""
    return expected != given and any(
        str(side) in ("True", "False", "nan", "zoo", "EmptySet")
        for side in (expected, given)
        if not isinstance(side, str)
    )


# --- The worker process -------------------------------------------------------------------------------------


def _serve() -> None:
    """Answer requests until standard input closes."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for request in sys.stdin.buffer:
        seconds, pairs = json.loads(request)
        for truth, answer in pairs:
            # Processor time, so that a busy machine does not turn right answers into wrong ones; wall time
            # in case something sleeps. The default action of both signals ends the process.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
            try:
                verdict = EQUAL if equal(truth, answer) else UNEQUAL
            except Exception:
                verdict = UNEQUAL
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(1, verdict)


def main(megabytes: int) -> None:
    """Fork children that serve, one after the other, until standard input closes."""
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(2_000)
    for truth, answer in _REHEARSAL:
        equal(truth, answer)
    child = 0

    def end(signum: int, frame: object) -> None:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except OSError:  # it had just ended by itself
            pass
        os._exit(0)

    os.write(1, READY)
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                _serve()
            except BaseException:
                os._exit(1)
            os._exit(0)
        signal.signal(signal.SIGTERM, end)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        os.write(1, DIED)


if __name__ == "__main__":
    main(int(sys.argv[1]))
