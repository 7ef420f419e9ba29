"""The estimate of the published run: the page has what the script says, as its assumptions have it."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
_SPEC = importlib.util.spec_from_file_location("cost", DOCS / "cost.py")
assert _SPEC
assert _SPEC.loader
cost = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cost)


def test_the_page_has_what_the_script_says() -> None:
    page = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    said = page.partition("<!--cost-->")[2].partition("<!--/cost-->")[0].strip()
    assert said == "\n".join(cost.lines()), "python docs/cost.py"


def test_the_measured_share_is_the_benchmark_s() -> None:
    page = (DOCS / "gpu.md").read_text(encoding="utf-8")
    assert f"{cost.measured_utilisation():.3f}" in page


def test_hours_are_operations_by_speed() -> None:
    a = replace(cost.cases()["pessimistic"], equal=0.0, eight=1.0, between=0.0)
    found = cost.estimate(a, "TRL")
    tokens = 219 * 4096 * (a.prompt + a.completion)
    seconds = 6 * cost.WEIGHTS * tokens / (8 * cost.PEAK * a.utilisation)
    assert found["gradients"] == pytest.approx(seconds / 3600)
    assert found["scoring"] == pytest.approx(1.5 / 4 * found["gradients"])
    assert found["H100-hours"] == pytest.approx(8 * found["hours"])
    # Leaving out rows of weight 0 saves at most a fourth: the free update's.
    assert cost.estimate(replace(a, equal=1.0), "TRL")["gradients"] == pytest.approx(
        0.75 * found["gradients"]
    )
    assert cost.estimate(a, "verl")["scoring"] > found["scoring"]
