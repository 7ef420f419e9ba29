"""Generation that runs ahead in another process: its updates, its lag and its end."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

from gvpo.errors import InputError
from gvpo.replay.store import GroupStore
from gvpo.trl import GVPOTrainer
from gvpo.trl.producer import seed_of
from tests.gloo import run_ranks
from tests.models import tiny_model
from tests.trl.common import config, dataset, distance, parameters, tokenizer, trainer
from tests.trl.oracle import Oracle, Records, Row, Snapshots
from tests.trl.test_exactness import compare


class Seen(Records):
    """What the reward functions saw: completions come from another process."""

    def recognised(self, text: str, ids: list[int], demonstrations: list[str]) -> Row:
        asked = tokenizer()(text)["input_ids"]
        return Row(asked, asked, ids, [True] * len(ids))


def ahead(folder: Path, cls: type[GVPOTrainer] = GVPOTrainer, **changes: Any) -> GVPOTrainer:
    settings = {"generate_ahead": 1, "max_steps": 5, "learning_rate": 0.3, "output_dir": str(folder)}
    return trainer(cls, **{"model": tiny_model().double(), **settings, **changes})


def others() -> list[int]:
    """Processes that generate for this one."""
    found = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child.pid for child in found if "gvpo.trl.producer" in child.cmdline()]


ROUTES: dict[str, dict[str, Any]] = {
    "rollout, two ahead, two updates": {"generate_ahead": 2, "steps_per_generation": 8},
    "moving, replay": {"reference": "moving", "reference_every": 2, "replay_ratio": 5.0},
    "initial, LoRA": {"reference": "initial", "learning_rate": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "route", [pytest.param(route, marks=[pytest.mark.cluster] if i else []) for i, route in enumerate(ROUTES)]
)
def test_updates_on_stale_groups_are_the_oracle_s(route: str, tmp_path: Path) -> None:
    """Against literal autograd: sampled by the policy of some updates ago, each group under one reference."""
    records, snapshots = Seen(), Snapshots()
    rewards = [records.digits, records.lengths]
    settings = {"temperature": 0.7, "reward_weights": [1.0, -0.5], "callbacks": [snapshots]}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if "LoRA" in route else None
    run = ahead(tmp_path, rewards=rewards, peft_config=lora, **settings, **ROUTES[route])
    policy = tiny_model().double()
    if lora is not None:
        policy = get_peft_model(policy, lora)
        policy.load_state_dict(run.model.state_dict())
    run.train()
    steps = Oracle([records.generations], run.args, policy).run()
    compare(run.args, steps, snapshots, run.state.log_history)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    every, lag = run.args.updates_per_rollout, run.args.generate_ahead
    ages = [step - max(0, (step // every - lag) * every) for step in range(5)]
    assert [entry["staleness/age_max"] for entry in logged] == ages
    assert max(step.kl for step in steps) > 0.01
    assert (max(step.replayed for step in steps) > 0) is ("replay" in route)
    assert others() == []
    assert not list(tmp_path.glob("ahead/weights/*"))


class Seeded(GVPOTrainer):
    """Samples each rollout by the seed that the other process would have."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        set_seed(seed_of(self.args.seed, self._step // self.args.steps_per_generation))
        return super()._generate_single_turn(*args, **kwargs)


@pytest.mark.slow
def test_without_lag_a_run_is_the_ordinary_one(tmp_path: Path) -> None:
    """Over epochs: the same prompts and tokens, and the same updates as far as float64 goes."""
    settings: dict[str, Any] = {"steps_per_generation": 8, "max_steps": 10, "learning_rate": 0.1}
    ordinary = ahead(tmp_path / "a", Seeded, generate_ahead=0, **settings)
    ordinary.train()
    run = ahead(tmp_path / "b", **settings)
    assert run.ahead is not None
    run.ahead.ahead = 0
    run.train()
    assert distance(parameters(run), parameters(ordinary)) < 1e-9
    tokens = [[e["num_tokens"] for e in r.state.log_history if "num_tokens" in e] for r in (ordinary, run)]
    assert tokens[0] == tokens[1]


class KillAt(TrainerCallback):
    """Kills a process without a chance to tidy up."""

    def __init__(self, step: int, pid: Any) -> None:
        self.step, self.pid = step, pid

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(self.pid(), signal.SIGKILL)


CHECKPOINTED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
CHECKPOINTED |= {"optim": "adamw_torch", "generate_ahead": 2}


@pytest.mark.slow
@pytest.mark.cluster
def test_killed_it_is_a_sentence_and_the_resumed_run_is_the_same(tmp_path: Path) -> None:
    """No group is lost or learnt twice: rollouts in flight are those that they would have been."""
    whole = ahead(tmp_path / "whole", **CHECKPOINTED)
    whole.train()

    def victim() -> int:
        (other,) = others()
        assert psutil.Process(other).environ()["CUDA_VISIBLE_DEVICES"] == "7"
        return other

    settings = CHECKPOINTED | {"generate_ahead_devices": "7"}
    run = ahead(tmp_path / "killed", callbacks=[KillAt(3, victim)], **settings)
    with pytest.raises(
        InputError, match=r"generates ahead ended by SIGKILL \(see .*producer.log\): go on from"
    ):
        run.train()
    assert others() == []
    again = ahead(tmp_path / "killed", **CHECKPOINTED)
    again.train(resume_from_checkpoint=True)
    assert again.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    assert all(value.equal(parameters(again)[name]) for name, value in parameters(whole).items())
    with GroupStore(tmp_path / "killed" / "ahead" / "groups") as store:
        numbers = [group.metadata["rollout"] for group in store.read(range(len(store)))]
    assert all(numbers.count(number) == 8 for number in set(numbers))


@pytest.mark.slow
@pytest.mark.cluster
def test_it_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without a guard of its __main__
    script.write_text(
        "from pathlib import Path\n"
        "from tests.trl.test_ahead import KillAt, ahead\n"
        "import os\n"
        f"ahead(Path({str(tmp_path / 'run')!r}), callbacks=[KillAt(2, os.getpid)]).train()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    child = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
    found: list[psutil.Process] = []
    while child.poll() is None:
        found = psutil.Process(child.pid).children() or found
        time.sleep(0.05)
    assert child.returncode == -signal.SIGKILL
    assert len(found) == 1
    assert psutil.wait_procs(found, timeout=10)[1] == []


def _run_on_two(rank: int, world: int, folder: Path) -> tuple[Any, ...]:
    records, snapshots = Seen(rank), Snapshots()
    rewards = [records.digits, records.lengths]
    settings = {"reward_weights": [1.0, -0.5], "callbacks": [snapshots], "per_device_train_batch_size": 4}
    run = ahead(folder, rewards=rewards, reference="initial", **settings)
    run.train()
    return records.generations, snapshots, run.args, run.state.log_history


@pytest.mark.slow
@pytest.mark.cluster
def test_two_processes_learn_from_one_that_generates(tmp_path: Path) -> None:
    first, second = run_ranks(_run_on_two, 2, tmp_path)
    steps = Oracle([first[0], second[0]], first[2]).run()
    for _, snapshots, args, history in (first, second):
        compare(args, steps, snapshots, history)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_tiny_run_learns(tmp_path: Path) -> None:
    """Digits, from random weights, two rollouts behind."""

    def digits(completions: list[str], **_: Any) -> list[float]:
        return [sum(c.isdigit() for c in text) / 12 for text in completions]

    settings = {"optim": "adamw_torch", "learning_rate": 0.006, "beta": 0.02, "generate_ahead": 2}
    run = ahead(tmp_path, model=tiny_model(), rewards=digits, max_steps=40, reference="initial", **settings)
    run.train()
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    assert sum(rewards[:4]) / 4 < 0.2
    assert sum(rewards[-4:]) / 4 > 0.6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trust": 0.2, "num_iterations": 2}, "trust: how likely each token was"),
        ({"dynamic_sampling": "resample"}, "they choose prompts by rewards that are not there yet"),
        ({"demonstrations_per_group": 1, "remove_unused_columns": False}, "use 'initial' or 'moving'"),
        ({"generate_ahead": -1}, "generate_ahead=-1 must be a number of rollouts"),
        ({"generate_ahead": 0, "generate_ahead_devices": "1"}, "generate_ahead_devices are for"),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(**{"generate_ahead": 1, **changes})


def test_what_only_the_trainer_s_process_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not go with rollout_func: it runs in the trainer's process"):
        ahead(tmp_path, rollout_func=Records().tools)
    with pytest.raises(InputError, match="give a data set with a length, no stream"):
        ahead(tmp_path, train_dataset=dataset().to_iterable_dataset())

    class Local(type(tiny_model())):  # type: ignore[misc]
        pass

    model = tiny_model()
    model.__class__ = Local
    with pytest.raises(InputError, match=r"cannot be done here \(.*Local.*give the model's name"):
        ahead(tmp_path, model=model)
    assert not list(tmp_path.glob("ahead/*"))


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = ahead(tmp_path, model=tiny_model())
    monkeypatch.setattr("gvpo.trl.ahead.publish", full)
    monkeypatch.setattr(run.ahead, "_start", lambda: None)
    with pytest.raises(InputError, match=r"Weights cannot be written .*No space left on device\): make room"):
        run.train()


def test_rollouts_in_flight_of_another_layout_are_made_anew(tmp_path: Path) -> None:
    run = ahead(tmp_path, model=tiny_model())
    assert run.ahead is not None
    run.ahead._requests = {3: 2}
    run.ahead._weights(2).parent.mkdir()
    run.ahead._weights(2).write_bytes(b"weights")
    state = run.ahead.state_dict(tmp_path / "checkpoint")
    run.ahead.load_state_dict(state | {"layout": [1]}, tmp_path / "checkpoint")
    assert run.ahead._requests == {}
    run.ahead.load_state_dict(state, tmp_path / "checkpoint")
    assert run.ahead._requests == {3: 2}
    assert run.ahead._weights(2).read_bytes() == b"weights"
