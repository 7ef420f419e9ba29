"""Reward functions that raise, hang, die or return nonsense."""

import json
from pathlib import Path
from typing import Any

import pytest

from gvpo.errors import InputError
from gvpo.trl.guard import Incidents, guard
from tests.trl.common import digit_reward, trainer

ROWS = ["a", "b", "BAD", "d", "e", "f"]


def raises_on_bad(completions: list[str], **_: Any) -> list[float]:
    if "BAD" in completions:
        raise ValueError("cannot read BAD")
    return [float(ord(c)) for c in completions]


def score(reward: Any) -> tuple[list[float | None], Incidents]:
    incidents = Incidents()
    guarded = guard(reward, incidents, group=2)
    return guarded(prompts=list("xxyyzz"), completions=ROWS, answer=ROWS, constant=[1]), incidents


def test_one_bad_completion_costs_itself_only() -> None:
    values, incidents = score(raises_on_bad)
    assert values == [97.0, 98.0, None, 100.0, 101.0, 102.0]
    assert incidents.rows == {2}
    assert incidents.first[0] == "Reward function raises_on_bad raised ValueError: cannot read BAD"
    assert "in raises_on_bad" in incidents.first[1]
    assert incidents.entries[0]["completion"] == "BAD"


def test_groups_stay_together_where_they_can() -> None:
    sizes = []

    def ranked(completions: list[str], **_: Any) -> list[float]:
        sizes.append(len(completions))
        return raises_on_bad(completions)

    score(ranked)
    assert sizes == [6, 2, 2, 1, 1, 2]


@pytest.mark.parametrize(
    ("value", "kept"),
    [(None, None), (True, 1.0), (3, 3.0), (float("inf"), None), ("1.0", None), ([1], None), ({}, None)],
)
def test_values(value: Any, kept: float | None) -> None:
    values, incidents = score(lambda completions, **_: [value] * len(completions))
    assert values == [kept] * 6
    assert bool(incidents.rows) is (kept is None and value is not None)


@pytest.mark.parametrize("returned", [1.0, None, "012345", [1.0] * 5])
def test_wrong_number_of_values_always_stops(returned: Any) -> None:
    with pytest.raises(InputError, match=r"return (a list with one number|one number)"):
        score(lambda completions, **_: returned)


def sometimes(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    if trainer_state.global_step == 1 and len(completions) > 1:
        raise RuntimeError("the batch is too large")
    values: list[Any] = list(digit_reward(completions))
    if trainer_state.global_step == 1 and completions[0].startswith(("a", "b", "c", "d", "e")):
        raise RuntimeError("no such letter")
    return values


@pytest.mark.parametrize("policy", ["drop_row", "drop_group"])
def test_tolerated_failures_leave_the_step_and_are_kept(policy: str, tmp_path: Path) -> None:
    made = trainer(
        output_dir=str(tmp_path),
        rewards=sometimes,
        on_reward_error=policy,
        reward_error_tolerance=0.5,
        max_steps=2,
    )
    made.train()
    entry = made.state.log_history[1]
    kept = (tmp_path / "incidents" / "rewards-rank-0.jsonl").read_text().splitlines()
    assert len(kept) == entry["gvpo/reward_incidents"] > 0
    assert json.loads(kept[0])["why"] == "raised RuntimeError: no such letter"
    assert "gvpo/reward_incidents" not in made.state.log_history[0]
    assert entry["gvpo/groups"] == 8 if policy == "drop_row" else entry["gvpo/groups"] < 8


@pytest.mark.parametrize("changes", [{}, {"on_reward_error": "error", "reward_error_tolerance": 1.0}])
def test_failures_beyond_tolerance_stop_with_the_first_traceback(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    made = trainer(output_dir=str(tmp_path), rewards=sometimes, **changes)
    with pytest.raises(
        InputError, match=r"sometimes raised RuntimeError: no such letter: \d+ of 32 "
    ) as caught:
        made.train()
    assert "in sometimes" in caught.value.details
    assert made.state.global_step == 1


@pytest.mark.parametrize(
    "changes", [{"on_reward_error": "ignore"}, {"reward_error_tolerance": 2.0}, {"reward_timeout": 0.0}]
)
def test_settings_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        trainer(**changes)
