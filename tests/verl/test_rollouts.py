"""The driver's weights against autograd of the formula, and the published recipe's scale against its loop."""

import math

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gvpo.verl.rollouts import Rollouts, choose_rows, row_sums, weigh
from tests.test_objective import literal_loss


def make(prompts, sessions=None, seed=0, valid=None):
    n = len(prompts)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(3, n, generator=generator, dtype=torch.float64)
    names = [(p, str(i)) for i, p in enumerate(prompts)] if sessions is None else sessions
    return Rollouts(
        sessions=names,
        reference=random[0] - 20,
        start=random[1] - 20,
        rewards=random[2],
        valid=torch.ones(n, dtype=torch.bool) if valid is None else valid,
        ages=torch.zeros(n, dtype=torch.long),
    )


@hypothesis.settings(deadline=None)  # a busy machine is no error
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_weights_are_minus_the_gradient_of_the_formula(sizes, seed):
    prompts = [f"p{i}" for i, size in enumerate(sizes) for _ in range(size)]
    rollouts = make(prompts, seed=seed)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    rollouts = rollouts.take(order)
    policy = (torch.randn(len(prompts), dtype=torch.float64) - 20).requires_grad_()
    weights, result = weigh(rollouts, policy.detach(), 0.3)
    ids = torch.tensor([int(p[1:]) for p in rollouts.prompts])
    every = torch.ones(len(ids), dtype=torch.bool)
    loss = literal_loss(policy, rollouts.reference, rollouts.rewards, ids, 0.3, every)
    loss.backward()
    torch.testing.assert_close(weights, -policy.grad, rtol=1e-9, atol=1e-12)
    assert math.isclose(result.metrics["loss"], loss.item(), rel_tol=1e-9, abs_tol=1e-12)


def test_the_rows_of_a_session_are_one_response():
    """Its log-probabilities add up, its reward counts once, its weight goes to each of its rows."""
    sessions = [("a", "0"), ("a", "0"), ("a", "1"), ("a", "2"), ("a", "2"), ("a", "2")]
    rollouts = make(["a"] * 6, sessions)
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.3, 0.3, 0.3], dtype=torch.float64)
    rollouts = Rollouts(**{**rollouts.__dict__, "rewards": rewards})
    policy = (torch.randn(6, dtype=torch.float64) - 20).requires_grad_()

    def joined(rows):
        return torch.stack([rows[:2].sum(), rows[2], rows[3:].sum()])

    loss = literal_loss(
        joined(policy),
        joined(rollouts.reference),
        torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64),
        torch.zeros(3, dtype=torch.long),
        0.3,
        torch.ones(3, dtype=torch.bool),
    )
    loss.backward()
    weights, _ = weigh(rollouts, policy.detach(), 0.3)
    torch.testing.assert_close(weights, -policy.grad, rtol=1e-9, atol=1e-12)


def test_a_response_without_a_token_that_counts_is_no_member_of_its_group():
    whole = make(["a"] * 4)
    valid = torch.tensor([True, True, False, True])
    policy = torch.randn(4, dtype=torch.float64)
    left_out, _ = weigh(Rollouts(**{**whole.__dict__, "valid": valid}), policy, 0.3)
    smaller, _ = weigh(whole.take([0, 1, 3]), policy[[0, 1, 3]], 0.3)
    assert left_out[2] == 0
    torch.testing.assert_close(left_out[valid], smaller)


def test_a_response_without_a_reward_is_no_member_of_its_group():
    whole = make(["a"] * 4)
    rewards = whole.rewards.clone()
    rewards[2] = math.nan
    policy = torch.randn(4, dtype=torch.float64)
    left_out, _ = weigh(Rollouts(**{**whole.__dict__, "rewards": rewards}), policy, 0.3)
    smaller, _ = weigh(whole.take([0, 1, 3]), policy[[0, 1, 3]], 0.3)
    assert left_out.tolist() == [*smaller[:2].tolist(), 0.0, smaller[2].item()]


def test_row_sums_skip_tokens_that_do_not_count_whatever_they_hold():
    values = torch.nested.as_nested_tensor(
        [torch.tensor([1.0, math.nan, 3.0]), torch.tensor([5.0])], layout=torch.jagged
    )
    mask = torch.nested.as_nested_tensor([torch.tensor([1, 0, 1]), torch.tensor([0])], layout=torch.jagged)
    assert row_sums(values, mask).tolist() == [4.0, 0.0]


@pytest.mark.parametrize(("n", "micro_batch", "ranks"), [(4, 4, 2), (4, 8, 1), (4, 2, 2)])
def test_published_scale_is_the_gradient_of_the_published_micro_steps(n, micro_batch, ranks):
    """Their loop: a rank sums ½d²/(n−1) over a micro-batch and divides by the number of micro-batches, with
    the group's mean held constant; ranks are averaged."""
    groups, beta = 4, 0.3
    rollouts = make([f"p{i // n}" for i in range(groups * n)])
    policy = (torch.randn(groups * n, dtype=torch.float64) - 20).requires_grad_()
    implicit = beta * (policy - rollouts.reference)
    mean = implicit.detach().view(groups, n).mean(1).repeat_interleave(n)
    reward = rollouts.rewards - rollouts.rewards.view(groups, n).mean(1).repeat_interleave(n)
    rows = (0.5 * (implicit - mean - reward) ** 2 / (n - 1)).view(ranks, -1, micro_batch)
    theirs = (rows.sum(-1) / rows.shape[1]).sum(1).mean()
    theirs.backward()
    weights, _ = weigh(rollouts, policy.detach(), beta)
    torch.testing.assert_close(weights * micro_batch / n, -policy.grad, rtol=1e-9, atol=1e-12)


@hypothesis.settings(deadline=None)  # a busy machine is no error
@given(st.lists(st.sampled_from([0.0, 0.0, -0.3, 0.7]), min_size=1, max_size=40), st.integers(1, 9))
def test_rows_of_weight_stay_and_the_fewest_others_fill_up(weights, multiple):
    real = len(weights)
    padding = -real % multiple
    every = torch.tensor(weights + [0.0] * padding)
    lengths = [10 + i % 5 for i in range(real)] + [1] * padding
    chosen = choose_rows(every, lengths, multiple, padding=padding)
    used = {i for i, weight in enumerate(weights) if weight}
    assert used <= set(chosen)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) % multiple == 0
    assert len(chosen) - len(used) < multiple or not used
    idle = [i for i in range(real) if i not in used]
    filling = [i for i in chosen if i not in used]
    # Padding rows only where real rows do not suffice.
    assert all(i < real for i in filling) or set(idle) <= set(chosen)


def test_a_row_without_a_token_that_counts_has_no_part_in_its_session():
    rollouts = make(["a"] * 3, [("a", "0"), ("a", "0"), ("a", "1")])
    rewards = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    valid = torch.tensor([True, False, True])
    rollouts = Rollouts(**{**rollouts.__dict__, "rewards": rewards, "valid": valid})
    weights, _ = weigh(rollouts, rollouts.start, 0.3)
    alone, _ = weigh(rollouts.take([0, 2]), rollouts.start[[0, 2]], 0.3)
    assert weights.tolist() == [alone[0].item(), 0.0, alone[1].item()]
    assert alone[0] != 0
