"""The range of TRL's versions that gvpo claims."""

import importlib
import os
import tomllib
from pathlib import Path

import pytest
import trl
from packaging.requirements import Requirement
from trl import GRPOTrainer

from gvpo.trl import compat

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["optional-dependencies"]["trl"]]


def test_installed_trl_is_in_the_range_and_is_the_one_that_was_meant() -> None:
    wanted = next(r for r in REQUIREMENTS if r.name == "trl")
    assert wanted.specifier.contains(trl.__version__)
    expected = os.environ.get("GVPO_EXPECTED_TRL")
    assert expected in (None, trl.__version__)


def test_missing_private_name_is_told_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    with pytest.raises(ImportError, match=r"the GRPOTrainer has no\s+_calculate_rewards"):
        importlib.reload(compat)
