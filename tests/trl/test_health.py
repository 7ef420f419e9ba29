"""Numbers that go wrong do not reach the parameters, and do not go on for ever."""

import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.run import Rule
from gvpo.trl import GVPOTrainer
from gvpo.trl.health import Health
from gvpo.trl.rollouts import load_rollouts
from tests.gloo import run_ranks
from tests.models import gradients, literal_logps, relative_error, tiny_model
from tests.test_objective import literal_loss
from tests.trl.common import parameters, trainer


def poison(made: GVPOTrainer, at: set[int]) -> None:
    """A gradient that is not finite in the steps `at`, on this process."""
    weight = list(made.model.parameters())[1]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan if made.state.global_step in at else gradient

    weight.register_hook(spoil)


def test_bad_gradient_skips_the_step_and_keeps_its_inputs(tmp_path: Path) -> None:
    made = trainer(output_dir=str(tmp_path), optim="adamw_torch", max_steps=3)
    seen: list[dict[str, torch.Tensor]] = []
    original = made._update

    def recorded(model: Any) -> torch.Tensor:
        seen.append(parameters(made))
        return original(model)

    made._update = recorded  # type: ignore[method-assign]
    poison(made, {1})
    with pytest.warns(UserWarning, match="Step 1 is skipped: A gradient is not finite"):
        made.train()
    assert not all(seen[0][name].equal(seen[1][name]) for name in seen[0])  # step 0 was made
    assert all(seen[1][name].equal(seen[2][name]) for name in seen[0])  # step 1 was not
    assert all(value.isfinite().all() for value in parameters(made).values())
    assert not all(seen[2][name].equal(value) for name, value in parameters(made).items())  # step 2 was
    assert [entry.get("gvpo/steps_skipped") for entry in made.state.log_history[:3]] == [None, 1.0, None]
    slices, state = load_rollouts(tmp_path / "incidents" / "step-1-rank-0.safetensors", torch.device("cpu"))
    assert len(slices[0].batch) == 32
    assert "not finite" in state["why"]


def test_policy_without_finite_probabilities_stops_with_a_diagnosis(tmp_path: Path) -> None:
    made = trainer(output_dir=str(tmp_path), reference="initial", max_steps=5, max_bad_steps=2)
    with torch.no_grad():
        next(made.model.parameters()).fill_(torch.nan)
    with (
        pytest.warns(UserWarning, match="Step 0 is skipped"),
        pytest.raises(InputError, match=r"2 steps in a row, the last at step 1, .* lower learning_rate"),
    ):
        made.train()
    assert len(list((tmp_path / "incidents").iterdir())) == 2


def _one_rank_spoils(rank: int, world: int) -> tuple[dict[str, torch.Tensor], int]:
    made = trainer(max_steps=2, per_device_train_batch_size=4, max_bad_steps=5)
    before = parameters(made)
    if rank == 1:
        poison(made, {0, 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    unchanged = all(value.equal(before[name]) for name, value in parameters(made).items())
    return unchanged, made.health.bad_steps  # type: ignore[return-value]


@pytest.mark.slow
def test_one_rank_s_bad_gradient_skips_the_step_on_all() -> None:
    assert run_ranks(_one_rank_spoils, 2) == [(True, 2), (True, 2)]


@pytest.mark.parametrize(
    ("text", "logs", "holds"),
    [
        ("gvpo/kl > 100", {"gvpo/kl": 101.0}, True),
        ("gvpo/kl>1e2", {"gvpo/kl": 99.0}, False),
        ("entropy < .5", {"entropy": 0.4}, True),
        ("entropy < .5", {"entropy": float("nan")}, False),
        ("entropy < .5", {}, False),
    ],
)
def test_rules(text: str, logs: dict[str, float], holds: bool) -> None:
    assert Rule.parse(text).holds(logs) is holds


def test_rules_warn_once_and_stop(tmp_path: Path) -> None:
    made = trainer(
        output_dir=str(tmp_path),
        max_steps=5,
        warn_when=["reward > 0"],
        stop_when=["gvpo/groups > 7.5", "reward > 1e9"],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    messages = [str(w.message) for w in caught]
    assert sum("sign of divergence" in message for message in messages) == 1
    assert sum("Training stops at step 1: gvpo/groups is 8" in message for message in messages) == 1
    assert made.state.global_step == 1
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    "changes", [{"warn_when": ["kl is big"]}, {"stop_when": ["kl >"]}, {"max_bad_steps": 0}]
)
def test_settings_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        trainer(**changes)


def test_tracker_that_is_away_does_not_stop_training(tmp_path: Path) -> None:
    made = trainer(output_dir=str(tmp_path), report_to=["tensorboard"], max_steps=3)
    for callback in made.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback":
            tracker: Any = callback

    class Away:
        def __getattr__(self, name: str) -> Any:
            raise FileNotFoundError("the folder is gone")

    original = made._update

    def lose_it(model: Any) -> torch.Tensor:
        tracker.tb_writer = Away()
        return original(model)

    made._update = lose_it  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    assert made.state.global_step == 3
    assert sum("TensorBoardCallback failed (FileNotFoundError" in str(w.message) for w in caught) == 1


def odd_trainer(kind: str, **changes: Any) -> GVPOTrainer:
    """Samples completions at the edge: `kind` says which."""

    def sample(_: Any, prompt_ids: list[list[int]], *others: Any, **kwargs: Any) -> Any:
        rows = {
            "no token": [[7 + i % 5, 2] if i % 2 else [] for i in range(len(prompt_ids))],
            "one token": [[2]] * len(prompt_ids),
            "to the last position": [[7] * (128 - len(ids)) for ids in prompt_ids],
            "identical": [[7, 8, 9, 2]] * len(prompt_ids),
            "all truncated": [[7, 8, 9, 10 + i % 4] for i in range(len(prompt_ids))],
        }
        return rows[kind], None

    made = trainer(GVPOTrainer, max_completion_length=128, **changes)
    made._portions = sample  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    "kind", ["no token", "one token", "to the last position", "identical", "all truncated"]
)
@pytest.mark.parametrize("reference", ["rollout", "initial"])
def test_odd_completions_give_finite_steps(kind: str, reference: str) -> None:
    def by_place(completions: list[str], **_: Any) -> list[float]:
        return [i % 3 / 2 for i, _ in enumerate(completions)]

    made = odd_trainer(kind, rewards=by_place, reference=reference, num_iterations=2)
    made.train()
    assert made.health.bad_steps == 0
    assert all(value.isfinite().all() for value in parameters(made).values())
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize("reference", ["rollout", "initial"])
def test_a_completion_without_tokens_has_no_log_probability(reference: str) -> None:
    """S = 0 under policy and reference: the end that TRL is given for it was not sampled.

    docs/upstream/trl-empty-completion.md.
    """

    def by_place(completions: list[str], **_: Any) -> list[float]:
        assert completions[::2] == [""] * 16
        return [i % 3 / 2 for i, _ in enumerate(completions)]

    made = odd_trainer("no token", rewards=by_place, reference=reference, num_iterations=2, max_steps=2)
    batches: list[GroupBatch] = []
    original = made._update

    def compared(model: Any) -> torch.Tensor:
        loss = original(model)
        batch = GroupBatch.concatenate([item.batch for item in made._window])
        batches.append(batch)
        twin = tiny_model().double()
        twin.load_state_dict(parameters(made), strict=False)
        twin.tie_weights()
        policy = literal_logps(twin, batch)
        assert policy[::2].tolist() == [0.0] * 16
        with torch.no_grad():
            s_ref = literal_logps(tiny_model().double(), batch)  # both references are the policy at first
        valid = torch.ones(32, dtype=torch.bool)
        rewards = batch.rewards.double()
        expected = literal_loss(policy, s_ref, rewards, batch.group_ids, made.args.beta, valid)
        expected.backward()
        assert relative_error(gradients(made.model), gradients(twin)) < 1e-5
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        return loss

    made._update = compared  # type: ignore[method-assign]
    made.train()
    assert len(batches) == 2
    assert (batches[0].rewards == torch.tensor([i % 3 / 2 for i in range(32)])).all()


def test_when_all_are_truncated_and_masked_there_is_no_update() -> None:
    made = odd_trainer("all truncated", mask_truncated_completions=True, max_steps=1)
    before = parameters(made)
    with pytest.warns(UserWarning, match="makes no update"):
        made.train()
    assert all(value.equal(before[name]) for name, value in parameters(made).items())


def test_bad_steps_with_good_ones_between_do_not_stop_a_run(tmp_path: Path) -> None:
    made = trainer(output_dir=str(tmp_path), max_steps=4, max_bad_steps=2)
    poison(made, {0, 2})
    with pytest.warns(UserWarning, match="Step 2 is skipped"):
        made.train()
    assert made.state.global_step == 4


def test_a_bad_step_goes_by_though_the_disk_is_full(tmp_path: Path) -> None:
    batch = GroupBatch.from_tokens([[5]] * 4, [[6] * 999] * 4, [0.0] * 4, [0] * 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.warns(UserWarning, match="cannot be kept"):
            Health(2).bad_step(batch, "nan", step=0, path=tmp_path / "step.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_skipped_with_replay_too() -> None:
    made = trainer(replay_ratio=1.0, max_steps=2, max_bad_steps=2)
    with torch.no_grad():
        next(made.model.parameters()).fill_(torch.nan)
    with pytest.warns(UserWarning, match="Step 0 is skipped"), pytest.raises(InputError, match="2 steps in"):
        made.train()
    assert made.replay is not None
    assert len(made.replay.buffer) == 0


def test_a_rollout_function_may_give_nothing() -> None:
    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [[7] * (i % 4) for i in range(len(prompts))]
        masks = [[1] * len(row) for row in ids]
        return {
            "prompt_ids": [[5, 6]] * len(ids),
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": masks,
        }

    made = trainer(GVPOTrainer, rollout_func=rollout, max_steps=1)
    seen: list[GroupBatch] = []
    weigh = made._gvpo_step.weigh
    made._gvpo_step.weigh = lambda batch: (seen.append(batch), weigh(batch))[1]  # type: ignore[assignment]
    made.train()
    assert seen[0].completion_mask.sum(1).tolist() == [0, 1, 2, 3] * 8
