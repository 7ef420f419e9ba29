"""Groups spread over 1–4 gloo ranks, in uneven and empty shares, change nothing."""

import pytest
import torch
import torch.distributed as dist

from gvpo import gvpo_loss
from tests.gloo import run_ranks
from tests.test_objective import literal_loss

CASES = 40
BETA = 0.3


def make_case(seed: int, world: int):
    """A batch of ragged groups, and the rank that holds each of its rows."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 40, (), generator=generator))
    batch = {
        "policy": torch.randn(n, generator=generator, dtype=torch.float64) * 5 - 30,
        "reference": torch.randn(n, generator=generator, dtype=torch.float64) * 5 - 30,
        "rewards": torch.randint(0, 3, (n,), generator=generator).double(),
        "group_ids": torch.randint(0, 8, (n,), generator=generator) + 2**60,  # no float tells them apart
        "mask": torch.rand(n, generator=generator) < 0.8,
    }
    # Every third case leaves a rank empty.
    ranks = range(world) if seed % 3 or world == 1 else range(world - 1)
    owner = torch.tensor(list(ranks))[torch.randint(0, len(ranks), (n,), generator=generator)]
    return batch, owner.sort().values


def compare_with_literal(rank: int, world: int) -> tuple[float, list]:
    worst, metrics = 0.0, []
    for seed in range(CASES):
        batch, owner = make_case(seed, world)
        mine = owner == rank
        whole = batch["policy"].clone().requires_grad_()
        expected = literal_loss(**{**batch, "policy": whole}, beta=BETA)
        expected.backward()
        part = {k: v[mine] for k, v in batch.items()}
        policy = part["policy"].clone().requires_grad_()
        result = gvpo_loss(
            policy,
            part["reference"],
            part["rewards"],
            part["group_ids"],
            beta=BETA,
            mask=part["mask"],
            process_group=dist.group.WORLD,
        )
        result.loss.backward()
        assert whole.grad is not None
        for got, want in (
            (policy.grad, whole.grad[mine]),
            (-result.weights, whole.grad[mine]),
            (result.loss, expected),
        ):
            worst = max([worst, *(got - want).abs().flatten().tolist()])
        metrics.append({k: v.item() for k, v in result.metrics.items()})
    return worst, metrics


def raise_for_bad_input(rank: int, world: int) -> list[str]:
    """Rank 0 alone gets something wrong; every rank must hear of it, or the others would hang."""
    logps, ids = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    messages = []
    for rewards in (torch.zeros(3), torch.tensor([0.0, float("nan")])):
        try:
            gvpo_loss(logps, logps, rewards if rank == 0 else logps, ids, process_group=dist.group.WORLD)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_spreading_groups_over_ranks_changes_nothing(world):
    results = run_ranks(compare_with_literal, world)
    assert max(worst for worst, _ in results) < 1e-10
    assert len({repr(metrics) for _, metrics in results}) == 1  # repr: NaN is not equal to itself


@pytest.mark.slow
def test_bad_input_on_one_rank_is_an_error_on_all():
    first, second = run_ranks(raise_for_bad_input, 2)
    assert first == [
        "rewards has shape (3,), but every argument needs the shape (batch,) of policy_logps, here (2,): "
        "one sequence log-probability a row.",
        "rewards is nan in row 1 of rank 0: set mask to False there to leave the row out of its group, "
        "or repair what made it.",
    ]
    assert second == ["The arguments are not valid on rank 0.", first[1]]
