"""The examples, on their own."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from trl.trainer import grpo_trainer

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch_reaches_the_optimum_it_names() -> None:
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) < 60
    rewards = load("plain_pytorch").main()
    assert rewards[0] == pytest.approx(0.5, abs=0.05)
    assert sum(rewards[-20:]) / 20 == pytest.approx(0.777, abs=0.04)


def test_the_calculator_is_called_and_its_answers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo_trainer, "is_jmespath_available", lambda: True)  # its schema does without
    summary = load("calculator").main(0, tmp_path, warm_up_steps=100, steps=2)
    assert summary["hard_calls_start"] > 0.1
    assert 0 <= summary["easy_right_end"] <= 1
    assert {"calculator.png", "summary.json"} <= {path.name for path in tmp_path.iterdir()}
