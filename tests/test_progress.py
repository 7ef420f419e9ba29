"""What long work shows of itself, on terminals of all kinds and in files."""

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gvpo.progress import Ticker, duration, shortened, sparkline, speed
from gvpo.samples import Sample

STEP = {"step_time": 10.0, "profiling/generation": 6.0, "profiling/update": 4.0}
METRICS = [
    {"step": 1, "reward": 0.25, "gvpo/kl": 0.0, "eval_loss": 3.0, **STEP},
    {"step": 2, "critic/score/mean": 0.5, "gvpo/explained_variance": float("-inf"), "gvpo/kl": 0.5, **STEP},
    {"step": 3, "reward": 0.75, "accuracy": 1 / 3, "gvpo/kl": None, **STEP},
]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr("gvpo.progress.time.monotonic", lambda: clock[0])
    return clock


def test_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    ticker = Ticker(Console(file=out, force_terminal=False), "Work", 8)
    for done in (*range(1, 9), 8):
        ticker.advance(done)
    assert out.getvalue().splitlines() == ["Work 2/8", "Work 4/8", "Work 6/8", "Work 8/8"]


def test_every_record_of_metrics_is_a_plain_line(now: list[float]) -> None:
    out = io.StringIO()
    ticker = Ticker(Console(file=out, width=40), "Work", 100)
    ticker.advance(20)  # resumed there, at no cost
    assert ticker.seconds_left(20) is None
    ticker.sample = Sample("1+1=", "2", 1.0)
    with ticker.running():
        for done, seconds, metrics in ((21, 9, METRICS[0]), (30, 91, METRICS[2]), (100, 7000, {})):
            now[0] += seconds
            ticker.advance(done, "[so far]" * (done == 100), metrics)
    assert out.getvalue().splitlines() == [
        "Work 21/100  reward 0.25  KL 0  10 s a step (generation 60%, update 40%)  12 min left",
        "Work 30/100  reward 0.75  accuracy 33.3%  10 s a step (generation 60%, update 40%)  12 min left",
        "Work 100/100  [so far]",
    ]
    assert ticker.seconds_left(60) == 7100


def drawn(width: int = 100, sample: Sample | None = None, **options: Any) -> list[str]:
    """The lines of a terminal after a few steps, with what the terminal obeys."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, **options)
    ticker = Ticker(console, "Work", 8)
    ticker.sample = sample
    with ticker.running():
        for done, metrics in enumerate(METRICS, start=1):
            ticker.advance(done, metrics=metrics)
    return out.getvalue().splitlines()


def shown(lines: list[str]) -> list[str]:
    """What stands there in the end: the last frame."""
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in lines]
    start = max(i for i, line in enumerate(plain) if line.lstrip("\r").startswith("Work"))
    return [line.lstrip("\r") for line in plain[start:] if line]


def test_a_terminal_shows_curves_and_the_last_sample() -> None:
    bar, reward, accuracy, kl, below, prompt, completion, mark = shown(
        drawn(sample=Sample("1 + 1 = ?\n\x1b[2J", "It is\n\n2." + "\x07" * 5, 1.0))
    )
    assert "3/8" in bar
    assert re.fullmatch(r"reward +0\.75  ▁▅█ +0\.25 to 0\.75", reward)
    assert re.fullmatch(r"accuracy +33\.3%  ▁ +33\.3% to 33\.3%", accuracy)
    assert re.fullmatch(r"KL +0\.5  ▁█ +0 to 0\.5", kl)
    assert below.endswith("left  10 s a step (generation 60%, update 40%)")
    assert prompt.split(maxsplit=1) == ["prompt", "1 + 1 = ? [2J"]
    assert completion.split(maxsplit=1) == ["completion", "It is 2."]
    assert mark.split() == ["its", "reward", "1"]


@pytest.mark.parametrize("width", [20, 36, 50, 64, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = shown(drawn(width, Sample("long " * 100, "longer " * 300, None)))
    assert max(map(len, lines)) <= width
    assert ("▁" in "".join(lines)) == (width >= 36)
    assert ("0.25 to 0.75" in "".join(lines)) == (width >= 64)
    assert "0.75" in "".join(lines)


def test_no_color_has_no_colours_and_a_dumb_terminal_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert any(map(colour.search, drawn()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(map(colour.search, drawn()))
    assert "▁▅█" in "".join(drawn())
    monkeypatch.setenv("TERM", "dumb")
    assert [line.split()[:2] for line in drawn()] == [["Work", f"{n}/8"] for n in (1, 2, 3)]


def test_a_terminal_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    frame = shown(drawn())
    assert any("_=#" in line or "_~#" in line for line in frame)
    assert all(line.isascii() for line in frame[:-1])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 80))
def test_sparklines_go_from_the_lowest_to_the_highest(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    if len(values) <= width and max(values) > min(values):
        assert line[values.index(max(values))] == "█"
        assert line[values.index(min(values))] == "▁"


@given(st.text(), st.integers(10, 80))
def test_shortened_text_fits_and_cannot_move_the_cursor(text: str, most: int) -> None:
    line = shortened(text, most)
    assert len(line) <= most
    assert line.isprintable()


def test_speed_in_words() -> None:
    entry = {"step_time": 20.0, "profiling/generation": 11.0, "profiling/update": 8.2, "profiling/other": 0.8}
    more = {"step": 1, "tokens_per_second": 1234.5, "memory/peak_gib": 3.14, "memory/peak_fraction": 0.131}
    assert speed(entry | more) == "20 s a step (generation 55%, update 41%)  1,234 tokens/s  3.1 GiB (13%)"
    assert speed({"step": 1, "eval_loss": 1.0}) == ""


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.4, 99, 100, 3599, 12_000)] == [
        "0 s",
        "99 s",
        "2 min",
        "1 h 00 min",
        "3 h 20 min",
    ]
