"""Reward functions that raise, hang, die or return nonsense."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer import grpo_trainer

from gvpo.errors import InputError
from gvpo.rewards.worker import RewardTimeout, RewardWorker
from gvpo.trl import GVPOTrainer
from gvpo.trl.guard import Incidents, guard
from tests.rewards.hanging import hangs, hangs_on_7
from tests.trl.chat_model import save_chat_model
from tests.trl.common import config, digit_reward, trainer

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


def test_a_failure_is_found_by_halves_of_whole_groups() -> None:
    sizes = []

    def ranked(completions: list[str], **_: Any) -> list[float]:
        sizes.append(len(completions))
        return raises_on_bad(completions)

    score(ranked)
    assert sizes == [6, 4, 2, 2, 1, 1, 2]


def outage(reward: Any, rows: int, tolerated: float, **settings: Any) -> tuple[list[float | None], Incidents]:
    incidents = Incidents(tolerated)
    completions = [str(i) for i in range(rows)]
    return guard(reward, incidents, group=8, **settings)(
        prompts=completions, completions=completions
    ), incidents


@pytest.mark.parametrize(("tolerated", "failed", "most"), [(0.01, 6, 20), (0.0, 1, 10), (5 / 512, 6, 20)])
def test_an_outage_is_tried_no_longer_than_it_is_tolerated(tolerated: float, failed: int, most: int) -> None:
    calls = []

    def down(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        raise ConnectionError("no server")

    values, incidents = outage(down, 512, tolerated)
    assert values == [None] * 512
    assert len(incidents.rows) == failed  # one more than is tolerated, which stops the run
    assert len(calls) <= most


def test_as_many_failures_as_are_tolerated_cost_themselves_only() -> None:
    def odd(completions: list[str], **_: Any) -> list[float]:
        if bad & set(completions):
            raise ValueError
        return [1.0] * len(completions)

    bad = {"0", "99", "100", "317", "511"}
    values, incidents = outage(odd, 512, 5 / 512)
    assert incidents.rows == {int(row) for row in bad}
    assert [row for row, value in enumerate(values) if value is None] == sorted(incidents.rows)
    assert not incidents.beyond(512)


@pytest.mark.slow
@pytest.mark.parametrize("tolerated", [0.01, 1.0])
def test_rows_that_hang_cost_a_few_time_limits_in_all(
    tolerated: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[float] = []
    real = RewardWorker.__call__

    def timed(self: RewardWorker, columns: dict[str, Any], timeout: float) -> Any:
        try:
            return real(self, columns, timeout)
        except RewardTimeout:
            lost.append(timeout)
            raise

    monkeypatch.setattr(RewardWorker, "__call__", timed)
    _, incidents = outage(hangs, 16, tolerated, timeout=1.0)
    assert 0 < sum(lost) <= 4
    assert incidents.rows == ({0} if tolerated < 1 else set(range(16)))


@pytest.mark.slow
def test_one_completion_that_hangs_costs_itself_only() -> None:
    values, incidents = outage(hangs_on_7, 32, 0.05, timeout=1.0)
    assert incidents.rows == {7}
    assert values == [None if row == 7 else 1.0 for row in range(32)]


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


def test_failures_that_cannot_be_kept_are_told(tmp_path: Path) -> None:
    _, incidents = score(raises_on_bad)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept"):
        rows, _ = incidents.drain(tmp_path / "file" / "rewards.jsonl", step=0)
    assert rows == {2}


class Server:
    async def __call__(self, completions: list[str], scale: float = 1.0, **_: Any) -> list[float]:
        return [scale * len(c) for c in completions]


async def server(completions: list[str], scale: float = 1.0, **_: Any) -> list[float]:
    return [scale * len(c) for c in completions]


def test_async_functions_in_any_form() -> None:
    made = trainer(rewards=[functools.partial(server, scale=2.0), Server(), digit_reward], max_steps=1)
    made.train()
    means = [made.state.log_history[0][f"rewards/{name}/mean"] for name in ("server", "Server")]
    assert means[0] == 2 * means[1] > 0


class Environment:
    """Its third instance has lost its server."""

    made = 0

    def __init__(self) -> None:
        Environment.made += 1
        self.number = Environment.made

    def reset(self, **_: Any) -> str:
        return ""

    def get_reward(self) -> float:
        if self.number == 3:
            raise ConnectionError("no server")
        return float(self.number)


@pytest.mark.filterwarnings("ignore:beta=.* cannot be felt")
@pytest.mark.skipif(not hasattr(grpo_trainer, "supports_tool_calling"), reason="TRL of before")
def test_an_environment_s_reward_is_guarded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What TRL needs for tool calls, of which there are none here.
    monkeypatch.setattr(grpo_trainer, "is_jmespath_available", lambda: True)
    monkeypatch.setattr(grpo_trainer, "supports_tool_calling", lambda _: True)
    folder = save_chat_model(tmp_path / "model")
    Environment.made = 0
    made = GVPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=config(output_dir=str(tmp_path), max_steps=1, reward_error_tolerance=0.1),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]] * 8}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        environment_factory=Environment,
    )
    made.train()
    assert made.state.log_history[0]["gvpo/reward_incidents"] == 1
    assert made._failed_rows.nonzero().tolist() == [[2]]
