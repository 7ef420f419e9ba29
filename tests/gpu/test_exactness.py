"""Updates, head and weights on the device against the formula: the cases of `benchmarks.gpu.exactness`."""

import pytest
import torch

from benchmarks.gpu.exactness import CASES, Case, head, invariance, outcome, statistics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_update_is_that_of_the_formula(case: Case, device: str) -> None:
    row = outcome(case, device, tiny=device == "cpu")
    assert row["within"], row


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_head_alone(dtype: torch.dtype, softcap: float | None, device: str) -> None:
    row = head(device, dtype, softcap)
    assert row["within"], row


def test_weights_are_the_cpu_s(device: str) -> None:
    assert statistics(device)["within"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuts_orders_and_padding_change_nothing(dtype: torch.dtype, device: str) -> None:
    for name, difference in invariance(dtype, device, tiny=device == "cpu"):
        row = difference()
        assert row["within"], (name, row)
