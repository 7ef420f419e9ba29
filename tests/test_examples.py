"""The examples that need no trainer."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_plain_pytorch_reaches_the_optimum_it_names() -> None:
    source = EXAMPLES / "plain_pytorch.py"
    assert len(source.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location("plain_pytorch", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rewards = module.main()
    assert rewards[0] == pytest.approx(0.5, abs=0.05)
    assert sum(rewards[-20:]) / 20 == pytest.approx(0.777, abs=0.04)
