"""A reference that moves every N updates; see also `test_exactness` and `test_adapters`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from gvpo.errors import InputError
from gvpo.step import SequenceScorer
from gvpo.trl.moving import MovingReference
from tests.gloo import run_ranks
from tests.models import random_batch, tiny_model
from tests.trl.common import config, parameters, trainer


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    return own | {"steps_per_generation": 8, "reference": "moving", "reference_every": 2} | changes


def test_a_resumed_run_has_the_reference_it_had(tmp_path: Path) -> None:
    """Between two moves, and within a rollout."""
    whole = trainer(**settings(tmp_path), optim="adamw_torch")
    whole.train()
    again = trainer(**settings(tmp_path / "again"), optim="adamw_torch")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(value.equal(parameters(again)[name]) for name, value in parameters(whole).items())
    assert again.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    # Two updates per rollout, and a move just before each: 0 and then 1 update old.
    ages = [entry["staleness/reference_age"] for entry in whole.state.log_history if "loss" in entry]
    assert ages == [0, 1, 0, 1, 0, 1]


def test_groups_keep_the_reference_they_were_scored_with(tmp_path: Path) -> None:
    run = trainer(**settings(tmp_path, steps_per_generation=16, reference_every=3), replay_ratio=1.0)
    run.train()
    ages = [entry["staleness/reference_age"] for entry in run.state.log_history if "loss" in entry]
    # The second generation comes after four updates, one after the reference has moved.
    assert ages == [0, 1, 2, 3, 1, 2]
    assert run.replay is not None
    names = [group.reference.partition(" of run")[0] for group in run.replay.buffer.read(range(64))]
    assert names == ["step 0"] * 32 + ["step 3"] * 32


def test_a_checkpoint_without_the_reference_says_so(tmp_path: Path) -> None:
    trainer(**settings(tmp_path, reference="initial", reference_every=None, max_steps=2)).train()
    again = trainer(**settings(tmp_path, max_steps=3))
    with pytest.warns(UserWarning, match="has no moving reference: it is the policy as it is there"):
        again.train(resume_from_checkpoint=True)
    assert again.moving is not None
    assert again.moving.step == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "moving"},
        {"reference_every": 2},
        {"reference": "initial", "reference_every": 2},
        {"reference": "moving", "reference_every": 0},
    ],
)
def test_reference_every_belongs_to_a_moving_reference(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a moving reference, and no other, needs the number of updates"):
        config(**changes)


def _sharded(rank: int, world: int, folder: Path) -> list[float]:
    """Scores of a model in shards: as it was, after a change, as its reference, again, and restored."""
    model = tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    batch = random_batch(reference=True)
    scorer = SequenceScorer(model)

    def score() -> float:
        return float(scorer.sequence_logps(batch).sum())

    reference = MovingReference(2, lambda: model, rank)
    reference.follow(0)
    found = [score()]
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    reference._parameters()  # what was gathered is of the past
    found.append(score())
    state = reference.state_dict(folder)
    with reference.in_place(1):
        found.append(score())
    found.append(score())
    again = MovingReference(2, lambda: model, rank)
    again.load_state_dict(state, folder)
    with again.in_place(1):
        found.append(score())
    torch.distributed.barrier()
    assert {path.name for path in folder.iterdir()} == {
        f"gvpo_reference_{r}.safetensors" for r in range(world)
    }
    return found


@pytest.mark.slow
def test_shards_of_fsdp2_take_each_other_s_place(tmp_path: Path) -> None:
    for before, changed, reference, after, restored in run_ranks(_sharded, 2, tmp_path):
        assert before == reference == restored != changed
        assert changed == after
