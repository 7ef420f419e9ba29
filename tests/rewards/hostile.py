"""Strings that a policy under reinforcement, or an attacker, might send to a verifier."""

import random
from collections.abc import Callable


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


def _tower(rng: random.Random) -> str:
    tower = "9"
    for _ in range(rng.randint(2, 30)):
        tower = f"{rng.randint(2, 99)}^{{{tower}}}"
    return tower


def _kinds(rng: random.Random) -> list[Callable[[], str]]:
    def digits(count: int) -> str:
        return _digits(rng, count)

    def times(low: int, high: int) -> int:
        return rng.randint(low, high)

    return [
        lambda: "9**9**9**9",
        lambda: "**".join(str(times(2, 99)) for _ in range(times(3, 8))),
        lambda: _tower(rng),
        lambda: _nested("(", ")", times(100, 3000)),
        lambda: _nested("{", "}", times(100, 3000)),
        lambda: _nested(r"\frac{1}{1+", "}", times(50, 800)),
        lambda: _nested(r"\sqrt{", "}", times(20, 800)),
        lambda: _nested(r"\left(", r"\right)", times(50, 800)),
        lambda: digits(times(1000, 20_000)),
        lambda: digits(5) + "!" * times(2, 6),
        lambda: f"{digits(7)}!",
        lambda: rf"\int_0^{{{digits(4)}}} e^{{x^x}} dx",
        lambda: rf"\sum_{{k=1}}^{{{digits(12)}}} \frac{{1}}{{k^{{{digits(3)}}}}}",
        lambda: f"(x+y+z+w)^{{{times(50, 999)}}}",
        lambda: f"({digits(3)}x+1)^{{{times(100, 999)}}}-(y+1)^{{{times(100, 999)}}}",
        lambda: "+".join(rf"\sqrt{{{times(2, 9999)}}}" for _ in range(times(5, 40))),
        lambda: rf"\binom{{{digits(9)}}}{{{digits(8)}}}",
        lambda: f"10^{{{digits(times(4, 12))}}}",
        lambda: f"1e{digits(times(3, 12))}",
        lambda: f"0.{digits(5000)}",
        lambda: "x=" * times(100, 5000) + "1",
        lambda: ",".join(digits(2) for _ in range(times(100, 5000))),
        lambda: "$" * times(100, 9000),
        lambda: "\\" * times(100, 9000),
        lambda: "the answer is " * times(100, 2000),
        lambda: r"\boxed{" * times(100, 2000),
        lambda: "#### " * times(100, 3000),
        lambda: "<answer>" * times(100, 2000),
        lambda: "Q:\nA:\n" * times(100, 2000),
        lambda: " " * times(100, 20_000),
        lambda: "1 " * times(100, 9000),
        lambda: "-" * times(100, 9000) + "1",
        lambda: "\x00" + chr(times(0x300, 0x36F)) * 500,
        lambda: "".join(chr(times(1, 0x2FFF)) for _ in range(500)),
        lambda: "__import__('os').system('sleep 60')",
        lambda: "().__class__.__bases__[0].__subclasses__()",
        lambda: r"\begin{pmatrix}" + "&".join(digits(3) for _ in range(200)) + r"\end{pmatrix}",
        lambda: "x^{x^{x^{x^{x^{x}}}}} = " + digits(3),
        lambda: rf"({digits(2)}, \infty) \cap " * times(5, 30) + "[1,2]",
        lambda: "a" * (2_000_000 if rng.random() < 0.02 else 1000),
        lambda: "1+" * (500_000 if rng.random() < 0.02 else 500) + "1",
    ]


def hostile_strings(count: int, seed: int = 0) -> list[str]:
    """`count` strings, each bare or stated as an answer in one of the usual forms."""
    rng = random.Random(seed)
    kinds = _kinds(rng)
    forms = ("{}", r"\boxed{{{}}}", "The answer is ${}$.", "#### {}", "The answer is {}")
    return [rng.choice(forms).format(rng.choice(kinds)()) for _ in range(count)]
