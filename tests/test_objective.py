"""The objective against literal autograd of the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gvpo import gvpo_loss, gvpo_weights


def literal_loss(policy, reference, rewards, group_ids, beta, mask):
    """The formula of the paper, group by group, for autograd."""
    total, n_groups = policy.sum() * 0, 0
    for group in group_ids.unique().tolist():
        rows = (group_ids == group) & mask
        k = int(rows.sum())
        if k < 2:
            continue
        implicit = beta * (policy[rows] - reference[rows])
        residual = (implicit - implicit.mean()) - (rewards[rows] - rewards[rows].mean())
        total = total + residual.pow(2).sum() / (2 * (k - 1))
        n_groups += 1
    return total / max(n_groups, 1)


@st.composite
def batches(draw, max_groups=6, max_rows=7):
    """Ragged, unsorted groups with masks, some of one row, some of equal rewards."""
    seed = draw(st.integers(0, 2**31))
    sizes = draw(st.lists(st.integers(1, max_rows), min_size=1, max_size=max_groups))
    generator = torch.Generator().manual_seed(seed)
    names = torch.randperm(10_000, generator=generator)[: len(sizes)] - 5_000
    ids = torch.cat([names[i].repeat(size) for i, size in enumerate(sizes)])
    ids = ids[torch.randperm(len(ids), generator=generator)]
    n = len(ids)
    rewards = torch.rand(n, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        rewards = (rewards > 0.5).double()
    return {
        "policy": torch.randn(n, generator=generator, dtype=torch.float64) * 5 - 30,
        "reference": torch.randn(n, generator=generator, dtype=torch.float64) * 5 - 30,
        "rewards": rewards,
        "group_ids": ids,
        "beta": draw(st.floats(0.01, 3.0)),
        "mask": torch.rand(n, generator=generator) < draw(st.sampled_from([1.1, 0.7, 0.2])),
    }


def call(function, batch, **changes):
    b = {**batch, **changes}
    return function(b["policy"], b["reference"], b["rewards"], b["group_ids"], beta=b["beta"], mask=b["mask"])


@settings(max_examples=150, deadline=None)
@given(batches())
def test_loss_and_both_gradients_are_those_of_the_formula(batch):
    policy = batch["policy"].clone().requires_grad_()
    expected = literal_loss(**{**batch, "policy": policy})
    (expected_grad,) = torch.autograd.grad(expected, policy)
    result = call(gvpo_loss, batch, policy=policy)
    (grad,) = torch.autograd.grad(result.loss, policy)
    (linear_grad,) = torch.autograd.grad(-(call(gvpo_weights, batch) * policy).sum(), policy)
    for got in (grad, linear_grad):
        torch.testing.assert_close(got, expected_grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(0, 2**31))
def test_rows_may_come_in_any_order(batch, seed):
    order = torch.randperm(len(batch["rewards"]), generator=torch.Generator().manual_seed(seed))
    shuffled = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    torch.testing.assert_close(
        call(gvpo_weights, shuffled), call(gvpo_weights, batch)[order], rtol=1e-12, atol=1e-14
    )


@settings(max_examples=60, deadline=None)
@given(batches())
def test_metrics_split_the_loss_into_the_three_terms(batch):
    metrics = {k: v.item() for k, v in call(gvpo_loss, batch).metrics.items()}
    terms = metrics["implicit_reward_variance"] / 2 - metrics["covariance"] + metrics["reward_variance"] / 2
    assert terms == pytest.approx(metrics["loss"], abs=1e-9)
    if metrics["reward_variance"] > 0:
        ratio = 2 * metrics["loss"] / metrics["reward_variance"]
        assert metrics["explained_variance"] == pytest.approx(1 - ratio, abs=1e-9)
    else:
        assert math.isnan(metrics["explained_variance"])
    assert metrics["groups"] + metrics["groups_dropped"] == len(batch["group_ids"].unique())
    weights = call(gvpo_weights, batch)[batch["mask"]]
    if len(weights):
        assert metrics["weight_abs_mean"] == pytest.approx(weights.abs().mean().item(), abs=1e-12)
        assert metrics["weight_zero_fraction"] == pytest.approx((weights == 0).double().mean().item())


def test_the_optimum_has_no_loss_and_full_explained_variance():
    rewards = torch.tensor([1.0, 0.25, 0.0, 0.5], dtype=torch.float64)
    reference = torch.tensor([-9.0, -3.0, -7.0, -4.0], dtype=torch.float64)
    policy = reference + rewards / 0.2 - 1.7  # log π* = log π_ref + R/β − log Z
    result = gvpo_loss(policy, reference, rewards, torch.zeros(4, dtype=torch.long), beta=0.2)
    assert result.loss.item() < 1e-25
    assert result.metrics["explained_variance"].item() == pytest.approx(1)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e9 + 0.1])
@pytest.mark.parametrize("k", [3, 7, 16])
def test_equal_rewards_where_policy_is_reference_give_weights_of_exactly_zero(reward, k):
    logps = torch.randn(k, generator=torch.Generator().manual_seed(k)) - 20
    ids = torch.zeros(k, dtype=torch.long)
    result = gvpo_loss(logps, logps.clone(), torch.full((k,), reward), ids)
    assert result.weights.eq(0).all()
    assert result.metrics["weight_zero_fraction"].item() == 1


def test_a_masked_row_may_hold_anything_and_gets_no_gradient():
    policy = torch.tensor([-3.0, float("nan"), -4.0], requires_grad=True)
    rewards = torch.tensor([1.0, float("nan"), 0.0])
    mask = torch.tensor([True, False, True])
    ids = torch.zeros(3, dtype=torch.long)
    result = gvpo_loss(policy, policy.detach(), rewards, ids, mask=mask)
    result.loss.backward()
    assert result.loss.isfinite()
    assert policy.grad.tolist() == [pytest.approx(-0.05), 0.0, pytest.approx(0.05)]


def test_groups_below_two_valid_rows_do_not_count():
    ids = torch.tensor([0, 0, 1, 2, 2])
    mask = torch.tensor([True, True, True, True, False])
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    logps = torch.zeros(5)
    weights = gvpo_weights(logps, logps, rewards, ids, beta=0.5, mask=mask)
    assert weights.tolist() == [0.25, -0.25, 0.0, 0.0, 0.0]
    nothing = gvpo_loss(logps, logps, rewards, torch.arange(5))
    assert nothing.loss.item() == 0
    assert nothing.metrics["groups_dropped"].item() == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32_at_least(dtype):
    """In half precision the weights of a group would not sum to 0."""
    logps = torch.tensor([-1.0, -2.0, -2.5], dtype=dtype, requires_grad=True)
    result = gvpo_loss(logps, logps, torch.tensor([1.0, 0.3, 0.1]), torch.zeros(3, dtype=torch.int32))
    assert result.weights.dtype == result.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(result.weights.sum().item()) < 1e-8
    result.loss.backward()
    assert logps.grad.dtype == dtype


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_operation_is_refused_on_cuda_under_deterministic_algorithms():
    """Of those that `torch.use_deterministic_algorithms` refuses there, what an objective might use."""
    with _Operations() as operations:
        gvpo_loss(torch.zeros(4), torch.zeros(4), torch.rand(4), torch.tensor([0, 0, 1, 1]))
    assert "index_add_" in operations.seen
    assert not operations.seen & {"bincount", "cumsum", "put_", "histc", "median", "kthvalue", "resize_"}


def test_statistics_are_float64_inside():
    """A common offset of 1e4 nats would cost four digits of a float32 mean."""
    generator = torch.Generator().manual_seed(0)
    reference = (torch.randn(64, generator=generator) - 1e4).float()
    policy = reference + torch.randn(64, generator=generator) * 0.1
    rewards = torch.rand(64, generator=generator)
    ids = torch.arange(64) // 8
    low = gvpo_weights(policy, reference, rewards, ids)
    high = gvpo_weights(policy.double(), reference.double(), rewards.double(), ids)
    torch.testing.assert_close(low.double(), high, rtol=1e-6, atol=1e-9)


def test_an_empty_batch_is_no_error():
    empty = torch.zeros(0, requires_grad=True)
    result = gvpo_loss(empty, empty, empty.detach(), torch.zeros(0, dtype=torch.long))
    result.loss.backward()
    assert result.loss.item() == 0
    assert result.weights.shape == (0,)


BAD = {
    "beta must be a finite number above 0": {"beta": 0.0},
    "beta must be a finite": {"beta": float("nan")},
    r"rewards has shape \(3,\)": {"rewards": torch.zeros(3)},
    r"policy_logps has shape \(2, 1\)": {"policy_logps": torch.zeros(2, 1)},
    "policy_logps must be floating point": {"policy_logps": torch.zeros(2, dtype=torch.long)},
    "group_ids must be integers": {"group_ids": torch.zeros(2)},
    "mask has shape": {"mask": torch.ones(1, dtype=torch.bool)},
    "reference_logps is on meta": {"reference_logps": torch.zeros(2, device="meta")},
    "rewards must be a tensor, got list": {"rewards": [1.0, 0.0]},
    "rewards is nan in row 1: set mask": {"rewards": torch.tensor([0.0, float("nan")])},
    "policy_logps is -inf in row 0": {"policy_logps": torch.tensor([-float("inf"), 0.0])},
    "reference_logps is inf in row 1": {"reference_logps": torch.tensor([0.0, float("inf")])},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_arguments_are_named(message):
    good = {
        "policy_logps": torch.zeros(2),
        "reference_logps": torch.zeros(2),
        "rewards": torch.zeros(2),
        "group_ids": torch.zeros(2, dtype=torch.long),
    }
    for function in (gvpo_loss, gvpo_weights):
        with pytest.raises(ValueError, match=message):
            function(**{**good, **BAD[message]})
