"""Episodes with tools and environments: updates are the formula's, and what fails costs an answer at most."""

import asyncio
import copy
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from trl.trainer import grpo_trainer

from gvpo.errors import InputError
from gvpo.replay.tokens import Encoder
from gvpo.trl import GVPOTrainer
from gvpo.trl.episodes import Environments, check_rollout, limited
from tests.gloo import run_ranks
from tests.trl.agents import (
    LONGEST,
    TOKENIZER,
    TOOLS,
    Episodes,
    Room,
    SilentRoom,
    agent_model,
    agent_policy,
    sleep,
    tasks,
)
from tests.trl.common import config
from tests.trl.oracle import Oracle, Snapshots
from tests.trl.test_exactness import compare

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:beta=.* cannot be felt")]

ROOM = {"environment_factory": Room}
ROUTES = {
    "tools": {"tools": TOOLS},
    "tools, two updates": {"tools": TOOLS, "steps_per_generation": 4},
    "tools, one turn more": {"tools": TOOLS, "steps_per_generation": 4, "max_tool_calling_iterations": 1},
    "tools, trust": {"tools": TOOLS, "num_iterations": 2, "trust": 0.05},
    "tools, replay": {"tools": TOOLS, "num_iterations": 2, "replay_ratio": 5.0},
    "tools, unshared, truncated rows leave": {
        "tools": TOOLS, "reference": "initial", "share_prompts": False, "mask_truncated_completions": True,
    },
    "environment": {**ROOM, "steps_per_generation": 4},
    "environment and tools, initial": {**ROOM, "tools": TOOLS, "reference": "initial"},
    "environment, replay": {**ROOM, "num_iterations": 2, "replay_ratio": 5.0},
}  # fmt: skip


def prepared(episodes, snapshots, output, *, rewards=(), **changes):
    """A trainer of a model whose episodes are `episodes`."""
    grpo_trainer.is_jmespath_available = lambda: True  # the tests' response schema does without
    names = ("tools", "environment_factory", "rollout_func", "train_dataset")
    others = {name: changes.pop(name) for name in names if name in changes}
    settings = {
        "gradient_accumulation_steps": 2,
        "max_completion_length": LONGEST,
        "temperature": 0.7,
        "max_steps": 3,
        "micro_batch_tokens": 1200,
        "learning_rate": 0.1,
        "tool_timeout": 0.3,
        "output_dir": str(output),
    }
    episodes.temperature = 0.7
    return GVPOTrainer(
        agent_model(episodes),
        [episodes.length] if rewards == () else rewards,
        config(**{**settings, **changes}),
        processing_class=copy.deepcopy(TOKENIZER),
        callbacks=[snapshots],
        **{"train_dataset": tasks(), **others},
    )


def episodes_of(changes, rank=0):
    names = ("add", "double", "divide", "sleep", "unknown") if "tools" in changes else ()
    names += ("look", "look", "look", "listen") if "environment_factory" in changes else ()
    return Episodes(rank, names)


@pytest.mark.parametrize("route", ROUTES)
def test_a_run_with_episodes_is_the_oracle_s(route, tmp_path):
    changes = ROUTES[route]
    episodes, snapshots = episodes_of(changes), Snapshots()
    run = prepared(episodes, snapshots, tmp_path, **changes)
    run.train()
    steps = Oracle([episodes.generations], run.args, agent_policy()).run()
    compare(run.args, steps, snapshots, run.state.log_history)
    # What the route is there for must have happened.
    rows = [row for generation in episodes.generations for row in generation]
    turns = {str(row.counts).count("False, True") for row in rows}
    assert {0, 1} <= turns
    assert max(turns) == 1 if "max_tool_calling_iterations" in changes else max(turns) > 1
    assert any(row.truncated for row in rows)
    seen = [len({tuple(row.prompt) for row in rows if row.asked == [task]}) for task in range(32)]
    assert set(seen) - {0} == ({1, 4} if "environment_factory" in changes else {1})
    assert (max(step.kl for step in steps) > 0.01) is (
        changes.get("reference") == "initial"
        or not {"steps_per_generation", "num_iterations"}.isdisjoint(changes)
    )
    assert (max(step.replayed for step in steps) > 0) is ("replay" in route)
    if "tools" in changes:
        assert "{'error': 'integer division or modulo by zero'}" in episodes.heard
    if "tools" in changes and len(rows) > 32:
        assert "{'error': 'sleep took longer than 0.3 s'}" in episodes.heard
    if "environment_factory" in changes:
        assert "{'error': 'It is over.'}" in episodes.heard


def train_all(rank, world, folder):
    seen = []
    for i, changes in enumerate(({"tools": TOOLS, "num_iterations": 2}, {**ROOM, "replay_ratio": 5.0})):
        episodes, snapshots = episodes_of(changes, rank), Snapshots()
        # Groups of 4 cut by the processes, which hold 6 rows each.
        settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1} if i == 0 else {}
        run = prepared(episodes, snapshots, f"{folder}/{i}", **changes, **settings)
        assert run.accelerator.num_processes == world
        run.train()
        seen.append((episodes.generations, snapshots, run.args, run.state.log_history))
    return seen


def test_two_processes_with_episodes_make_the_updates_of_one(tmp_path):
    """They make different numbers of turns."""
    for first, second in zip(*run_ranks(train_all, 2, tmp_path), strict=True):
        steps = Oracle([first[0], second[0]], first[2], agent_policy()).run()
        for _, snapshots, args, history in (first, second):
            compare(args, steps, snapshots, history)


def test_environments_of_several_kinds_each_have_their_tools_and_rewards(tmp_path):
    names = ["room", "silent"] * 16
    changes = {
        "environment_factory": {"room": Room, "silent": SilentRoom},
        "train_dataset": tasks(environment=names),
        "steps_per_generation": 4,
    }
    episodes, snapshots = Episodes(names=("look", "ring")), Snapshots()
    run = prepared(episodes, snapshots, tmp_path, **changes)
    run.train()
    assert run.reward_func_names == ["length", "Room"]
    for row in (row for generation in episodes.generations for row in generation):
        assert (row.rewards[1] is None) >= (names[row.asked[0]] == "silent")
    steps = Oracle([episodes.generations], run.args, agent_policy()).run()
    compare(run.args, steps, snapshots, run.state.log_history)
    assert {"dingding", "{'error': 'Tool ring not found.'}"} <= episodes.heard


class OwnTasks(Room):
    def reset(self, **_):
        return super().reset(self.number)


def test_an_environment_may_bring_the_tasks(tmp_path):
    """A group is then what the trainer asks for together."""
    Room.made = 0
    episodes = Episodes(names=("look",))
    settings = {"environment_factory": OwnTasks, "train_dataset": None, "rewards": None, "max_steps": 2}
    run = prepared(episodes, Snapshots(), tmp_path, **settings)
    run.train()
    assert Room.made == 16
    assert [entry["gvpo/groups"] for entry in run.state.log_history if "loss" in entry] == [4, 4]
    assert all(entry["gvpo/reward_variance"] > 0 for entry in run.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("vllm", "sharded", "refused"), [(None, True, True), ("server", False, True), ("colocate", False, False)]
)
def test_processes_that_would_wait_for_each_other_in_a_turn_are_refused(vllm, sharded, refused):
    run = SimpleNamespace(
        tools=TOOLS,
        use_vllm=vllm is not None,
        vllm_mode=vllm,
        args=SimpleNamespace(vllm_tensor_parallel_size=1),
        accelerator=SimpleNamespace(num_processes=2),
        _collective=sharded,
    )
    with pytest.raises(InputError, match="different numbers of turns") if refused else nullcontext():
        GVPOTrainer._check_turns(run)


def test_logged_episodes_are_learnt_as_they_were_made(tmp_path):
    """Messages come back as the tokens and the mask that they were, and as the oracle's update."""
    episodes = episodes_of({"tools": TOOLS})
    prepared(episodes, Snapshots(), tmp_path / "first", tools=TOOLS, max_steps=1).train()
    (generation,), (completions,) = episodes.generations, episodes.messages
    data, logged = tasks(), []
    encoder = Encoder(TOKENIZER, [TOKENIZER.eos_token_id])
    for row, messages in zip(generation, completions, strict=True):
        prompt = data[row.asked[0]]["prompt"]
        row.rewards = [row.rewards[0] or 0.0]
        logged.append({"prompt": prompt, "reward": row.rewards[0], "group": row.asked[0]})
        if row.truncated:  # messages do not say where
            logged[-1] |= {"completion_ids": row.completion, "counted": row.counts}
            continue
        assert encoder.episode(prompt, messages) == (row.completion, row.counts)
        logged[-1]["completion"] = messages
    assert sum(len(row.get("completion", [])) > 1 for row in logged) > 3
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    snapshots = Snapshots()
    settings = {
        "offline": str(tmp_path / "log.jsonl"),
        "reference": "initial",
        "num_iterations": 2,
        "max_steps": 2,
    }
    run = prepared(Episodes(), snapshots, tmp_path / "second", rewards=None, train_dataset=None, **settings)
    run.train()
    steps = Oracle([episodes.generations], run.args, agent_policy()).run()
    compare(run.args, steps, snapshots, run.state.log_history)


# ---------------------------------------------------------------------------------------------- failures


class Flaky(Room):
    """One of its instances cannot be reset, another does not come back from its reward."""

    def reset(self, task, **others):
        if self.number == 3:
            raise ConnectionError("no server")
        return super().reset(task, **others)

    def get_reward(self):
        while self.number == 5:
            time.sleep(60)
        return super().get_reward()


@pytest.mark.parametrize("tolerance", [0.2, 0.1])
def test_an_environment_that_fails_costs_its_own_episode(tolerance, tmp_path):
    Room.made = 0
    episodes, snapshots = Episodes(names=("look",)), Snapshots()
    settings = {"max_steps": 1, "environment_factory": Flaky, "reward_error_tolerance": tolerance}
    run = prepared(episodes, snapshots, tmp_path, **settings)
    if tolerance == 0.1:
        message = r"^Environment Flaky could not be reset \(ConnectionError: no server\): 2 of 16 completions"
        with pytest.raises(InputError, match=message):
            run.train()
        return
    run.train()
    assert run._failed_rows.nonzero()[:, 0].tolist() == [2, 4]
    lines = (tmp_path / "incidents" / "rewards-rank-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["why"] for line in lines] == [
        "could not be reset (ConnectionError: no server)",
        "raised TimeoutError: get_reward took longer than 0.3 s",
    ]
    for row in (2, 4):
        episodes.generations[0][row].rewards = [None, None]
    steps = Oracle([episodes.generations], run.args, agent_policy()).run()
    compare(run.args, steps, snapshots, run.state.log_history)


class Judge(Room):
    """Asks someone else for its reward, which takes a while."""

    asking = most = 0

    async def get_reward(self):
        Judge.asking += 1
        Judge.most = max(Judge.most, Judge.asking)
        await asyncio.sleep(0.05 if self.number % 4 else 60)
        Judge.asking -= 1
        return self.score


def test_async_rewards_of_environments_are_awaited_together_and_fail_apart(tmp_path):
    Room.made = 0
    episodes = Episodes(names=("look",))
    settings = {"max_steps": 1, "environment_factory": Judge, "reward_error_tolerance": 0.5}
    run = prepared(episodes, Snapshots(), tmp_path, **settings)
    run.train()
    assert run._failed_rows.nonzero()[:, 0].tolist() == [3, 7, 11, 15]
    assert Judge.most == 16


@dataclass(frozen=True)
class Frozen:
    """Nothing can be set on it."""

    def reset(self):
        raise ConnectionError("no server")


def test_environments_that_are_frozen_are_looked_after_too():
    environments = Environments(None)
    environment = environments.made_by({"one": Frozen})["one"]()
    assert environments.failure(environment) is None
    assert environment.reset() is None
    assert isinstance(environments.failure(environment), ConnectionError)


class Unrewarding(Room):
    def get_reward(self):
        return None


def test_an_environment_without_any_reward_stops_the_run(tmp_path):
    run = prepared(
        Episodes(names=("look",)), Snapshots(), tmp_path, environment_factory=Unrewarding, rewards=None
    )
    with pytest.raises(InputError, match=r"Unrewarding\) returned None or NaN for all 16 completions"):
        run.train()


@pytest.mark.parametrize("call", [lambda: time.sleep(9), lambda: [None for _ in iter(int, 1)]])
def test_a_call_is_ended_when_its_time_is_up_and_other_timers_stay(call):
    before = signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"took longer than 0\.05 s"):
                limited(call, 0.05)()
        assert limited(lambda x: x + 1, 0.05)(1) == 2
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 400
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_a_limit_of_time_needs_signals():
    with (
        ThreadPoolExecutor() as pool,
        pytest.raises(InputError, match="tool_timeout=1 needs the main thread"),
    ):
        pool.submit(limited, sleep, 1.0).result()
    with pytest.raises(InputError, match=r"tool_timeout=0 must be above 0 seconds"):
        config(tool_timeout=0)


GOOD = {"prompt_ids": [[5], [6, 7]], "completion_ids": [[8, 9], [2]], "logprobs": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_mask": [[1, 0], [1, 1]]}, r"an env_mask of 2 values for the 1 tokens of completion 1: give 1"),
        ({"env_mask": [[1, 0]]}, r"returned 1 env_mask for 2 prompts"),
        ({"completion_ids": [[8]]}, r"returned 1 completion_ids for 2 prompts: return one each"),
    ],
)
def test_a_rollout_function_whose_answer_does_not_fit_is_told_so(changes, message):
    check_rollout({**GOOD, "env_mask": [[1, 0], [1]]}, 2, tools=False)
    with pytest.raises(InputError, match=message):
        check_rollout({**GOOD, **changes}, 2, tools=False)


def test_masks_that_trl_would_not_look_at_and_missing_columns_are_refused():
    with pytest.raises(InputError, match=r"which TRL does not look at beside tools"):
        check_rollout({**GOOD, "env_mask": [[1, 0], [1]]}, 2, tools=True)
    with pytest.raises(InputError, match=r"returned no logprobs and no prompt_ids"):
        check_rollout({"completion_ids": []}, 0, tools=False)


def test_a_short_mask_stops_the_run(tmp_path):
    def short(prompts, trainer):
        n = len(prompts)
        columns = {"prompt_ids": [[5]] * n, "completion_ids": [[8, 9, 2]] * n, "logprobs": [[0.0] * 3] * n}
        return {**columns, "env_mask": [[1, 0]] * n}

    run = prepared(Episodes(), Snapshots(), tmp_path, rollout_func=short)
    with pytest.raises(InputError, match=r"an env_mask of 2 values for the 3 tokens of completion 0"):
        run.train()
