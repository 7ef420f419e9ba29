"""A reward function may do what it likes in its own process."""

import os
import time
from typing import Any

import pytest

from gvpo.rewards.worker import RewardFailure, RewardWorker


@pytest.mark.slow
def test_worker_survives_what_the_function_does() -> None:
    offset = 5.0

    def reward(completions: list[str], **_: Any) -> list[float]:
        """A closure, as people write in notebooks."""
        if "HANG" in completions:
            time.sleep(600)
        if "DIE" in completions:
            os._exit(7)
        if "RAISE" in completions:
            raise ValueError("cannot read it")
        return [len(c) + offset for c in completions]

    worker = RewardWorker(reward, timeout=3.0)
    assert worker({"completions": ["ab"]}) == [7.0]
    with pytest.raises(RewardFailure, match="ValueError: cannot read it") as caught:
        worker({"completions": ["RAISE"]})
    assert "in reward" in caught.value.trace
    first = worker._process
    assert worker({"completions": ["abc"]}) == [8.0]  # by the same process
    assert worker._process is first
    with pytest.raises(RewardFailure, match=r"its process died"):
        worker({"completions": ["DIE"]})
    with pytest.raises(RewardFailure, match="took longer than 3 s"):
        worker({"completions": ["HANG"]})
    assert not first.is_alive()
    assert worker._process is None
    assert worker({"completions": ["abcd"]}) == [9.0]  # by a new one
    last = worker._process
    worker.close()
    assert not last.is_alive()
