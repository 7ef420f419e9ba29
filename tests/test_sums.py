"""The quickstarts' problem: held out is held out, and the teacher is neither right nor hopeless."""

import pytest

from gvpo import sums


@pytest.mark.parametrize("name", list(sums.TASKS))
def test_tasks(name: str) -> None:
    task = sums.TASKS[name]
    train, held_out = task.pairs(3)
    assert len(held_out) == 1000
    assert not set(train) & set(held_out)
    assert task.pairs(3) == (train, held_out)
    assert task.pairs(4) != (train, held_out)
    for a, b in held_out:
        number = int(task.right(a, b)[::-1])
        assert number == (a + b if name == "addition" else a - b)
        assert len(task.sloppy(a, b)) == len(task.right(a, b)) == 3
    # A teacher that is always wrong or always right would teach nothing.
    agree = sum(task.right(a, b) == task.sloppy(a, b) for a, b in held_out)
    assert 100 < agree < 700
