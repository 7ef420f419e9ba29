"""Tests that want a GPU: `make gpu` runs them, and `pytest tests/gpu` does.

GVPO_TEST_DEVICE=cpu tries the tests themselves out, at tiny sizes.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    wanted = os.environ.get("GVPO_TEST_DEVICE", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here; GVPO_TEST_DEVICE=cpu tries the test itself out")
    return wanted
