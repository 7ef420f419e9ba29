"""Steps over replayed and on-policy groups together: the gradient of the formula, on one rank and on two."""

import copy
import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gvpo.batch import GroupBatch
from gvpo.step import Backend, GVPOStep
from tests.gloo import run_ranks
from tests.models import gradients, literal_logps, random_batch, relative_error, tiny_model
from tests.test_objective import literal_loss

BETA = 0.4


def mixed_batch() -> GroupBatch:
    """Groups at the policy's own reference beside groups with stored ones; one row of each takes no part."""
    fresh, stored = random_batch(groups=4, seed=1), random_batch(groups=3, seed=2, reference=True)
    stored.group_ids = -1 - stored.group_ids
    stored.valid = torch.arange(len(stored)) != 5
    batch = GroupBatch.concatenate([fresh.as_on_policy(), stored])
    assert batch.valid.sum() == len(batch) - 1
    return batch


def literal(batch: GroupBatch) -> tuple[dict[str, torch.Tensor], float]:
    model = tiny_model().double()
    policy = literal_logps(model, batch)
    reference = torch.where(batch.on_policy, policy.detach(), batch.reference_logps)
    loss = literal_loss(policy, reference, batch.rewards, batch.group_ids, BETA, batch.valid)
    loss.backward()
    return gradients(model), loss.item()


@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_free_and_stored_groups_in_one_step(budget):
    batch, model = mixed_batch(), tiny_model()
    expected, loss = literal(batch)
    step = GVPOStep(model, beta=BETA, token_budget=budget)
    scored = []
    original = step.token_logps
    step.token_logps = lambda b, rows: scored.extend(rows) or original(b, rows)
    report = step(batch)
    assert relative_error(gradients(model), expected) < 1e-5
    assert report.loss.item() == pytest.approx(loss, rel=1e-5)
    # Free rows cost no scoring pass, whatever stands in their reference.
    assert set(scored) == set((~batch.on_policy & batch.valid).nonzero()[:, 0].tolist())
    batch.reference_logps[batch.on_policy] = float("nan")
    other = tiny_model()
    GVPOStep(other, beta=BETA, token_budget=budget)(batch)
    assert relative_error(gradients(other), gradients(model)) == 0


def errors_of(rank: int, world: int) -> list[float]:
    errors = []
    batch = mixed_batch()
    expected, loss = literal(batch)
    trusted = replace(batch, rollout_logps=torch.randn(batch.input_ids.shape).double() - 5)
    whole = tiny_model()
    alone = GVPOStep(whole, beta=BETA, trust=0.2, backend=Backend(None))
    assert alone(trusted).tokens_beyond_trust > 20
    # Rows of rank 0: only on-policy ones, all on-policy ones, cut groups, none.
    for first, trust in itertools.product((14, 16, 9, 0), (None, 0.2)):
        used, wanted = (batch, expected) if trust is None else (trusted, gradients(whole))
        rows = slice(0, first) if rank == 0 else slice(first, None)
        share = copy.copy(used)
        for name in (field.name for field in fields(used)):
            value = getattr(used, name)
            setattr(share, name, None if value is None else value[rows])
        vars(share).pop("first_equal", None)  # of the whole
        model = tiny_model()
        report = GVPOStep(DistributedDataParallel(model), beta=BETA, token_budget=60, trust=trust)(share)
        errors += [relative_error(gradients(model), wanted), abs(report.loss.item() / loss - 1)]
    return errors


@pytest.mark.slow
def test_two_ranks_make_the_step_of_the_union():
    for errors in run_ranks(errors_of, 2):
        assert max(errors) < 1e-5, errors
