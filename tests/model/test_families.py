"""Every family of the table in docs/exactness.md, with every adapter, against literal autograd in float64."""

import json
import warnings

import pytest

from benchmarks.families import ADAPTERS, FAMILIES, outcome
from benchmarks.measure import RESULTS

RECORDED = {row["family"]: row for row in json.loads((RESULTS / "families.json").read_text())["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exact_or_refused_and_the_table_says_so(family):
    for adapter in ADAPTERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way, error = outcome(family, adapter)
        assert RECORDED[family][adapter].startswith(way.partition(":")[0])
        # Some families compute parts in float32 whatever the model's dtype is.
        assert way.startswith("refused: The model's log-probabilities depend on what pads") or error < 1e-6
