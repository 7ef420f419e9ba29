"""Real vLLM on a CPU, small: before it is imported."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the tests' machine is shared


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine in this process leaves variables (RANK, MASTER_PORT …) that the next process would heed."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
