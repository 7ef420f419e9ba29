"""The GVPO objective (arXiv 2504.19599): weights, loss and diagnostics, in pure torch.

For a prompt x with k responses of sequence log-probability S_i under the policy and S'_i under the
reference, rewards R_i and temperature β, the implicit reward is Rθ_i = β (S_i − S'_i), and

    L(x) = 1/(2(k−1)) Σ_i d_i²,    d_i = (Rθ_i − mean Rθ) − (R_i − mean R)

averaged over the G prompts of an optimizer step. Because Σ_i d_i = 0, ∂L/∂S_i = β d_i / ((k−1) G): the
step is a log-likelihood step with fixed *weights* w_i = −∂L/∂S_i, and any split of −Σ w_i S_i into
micro-batches, ranks and orders has exactly the same gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gvpo.errors import NonFiniteError


@dataclass(frozen=True)
class GVPOLoss:
    """What `gvpo_loss` returns.

    Attributes:
        loss: the mean of L(x) over the groups. Its gradient with respect to this rank's `policy_logps` is
            −weights; with a `process_group` its value is that of the union of all ranks.
        weights: w_i = −∂L/∂S_i for this rank's rows, without gradient.
        metrics: diagnostics of the union of all ranks, each a 0-dimensional float64 tensor (reading one
            with `.item()` is what synchronises a device):

            - `loss`: mean of L(x) = ½ `implicit_reward_variance` − `covariance` + ½ `reward_variance`;
            - `implicit_reward_variance`, `covariance`, `reward_variance`: group means of Var(Rθ),
              Cov(Rθ, R) and Var(R), unbiased (k−1);
            - `explained_variance`: 1 − Var(Rθ − R)/Var(R); 1 where the optimum is reached on these groups,
              0 where θ is the reference, NaN if no group's rewards differ;
            - `weight_abs_mean`, `weight_zero_fraction`: over the valid rows;
            - `groups`, `groups_dropped`: groups that count in G, and groups with fewer than two valid rows;
            - `kl`: mean of S − S' in nats per sequence, which estimates KL(π‖π_ref) without bias if the rows
              were sampled from the policy.
    """

    loss: Float[Tensor, ""]
    weights: Float[Tensor, "batch"]
    metrics: dict[str, Float[Tensor, ""]]


def gvpo_weights(
    policy_logps: Float[Tensor, "batch"],
    reference_logps: Float[Tensor, "batch"],
    rewards: Float[Tensor, "batch"],
    group_ids: Int[Tensor, "batch"],
    *,
    beta: float = 0.1,
    mask: Bool[Tensor, "batch"] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch"]:
    """Weights w_i = −∂L/∂S_i = −β d_i / ((k−1) G) of each response's log-likelihood.

    −(weights · policy_logps).sum() has exactly the gradient of `gvpo_loss`, however the rows are split.
    A group whose rewards are all equal, scored where the policy is the reference, has weights of exactly 0.

    Args:
        policy_logps: S, sequence log-probabilities under the policy, in nats. No gradient is taken.
        reference_logps: S', the same under the reference, in nats; one reference for all rows of a group.
        rewards: R, in any unit; β is in that unit per nat.
        group_ids: which prompt a row answers. Any integers, in any order, in groups of any size.
        beta: β > 0, the temperature of the KL-constrained optimum π* ∝ π_ref exp(R/β).
        mask: False drops a row: its group shrinks. Groups with fewer than two valid rows get weight 0 and
            do not count in G.
        process_group: if given, groups may be spread over its ranks in uneven row counts (a rank may have
            none): the weights are those of the union of all rows, and G is global. A collective call.

    Returns:
        The weights of this rank's rows, in the dtype of `policy_logps` or float32 if that is wider,
        computed in float64.

    Raises:
        ValueError: a non-finite log-probability or reward in a valid row, β ≤ 0, or arguments whose shape,
            dtype or device do not fit. With a `process_group`, it is raised on every rank.
    """
    given = _Given(policy_logps, reference_logps, rewards, group_ids, mask)
    return _solve(given, beta, process_group)[2]


def gvpo_loss(
    policy_logps: Float[Tensor, "batch"],
    reference_logps: Float[Tensor, "batch"],
    rewards: Float[Tensor, "batch"],
    group_ids: Int[Tensor, "batch"],
    *,
    beta: float = 0.1,
    mask: Bool[Tensor, "batch"] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> GVPOLoss:
    """The GVPO loss, its weights and its diagnostics; arguments and errors as for `gvpo_weights`.

    Gradients flow to `policy_logps` only, and are those of this rank's rows: the gradient of the union is
    their *sum* over ranks, so an engine that averages gradients over n ranks needs the loss times n.
    """
    given = _Given(policy_logps, reference_logps, rewards, group_ids, mask)
    rows, terms, weights = _solve(given, beta, process_group)
    metrics = _diagnose(rows, terms)
    # A row that is masked out may hold anything, NaN too, and 0 · NaN is NaN.
    scored = policy_logps if mask is None else policy_logps.masked_fill(~mask.bool(), 0.0)
    linear = -(weights * scored).sum()
    value = metrics["loss"].to(linear)
    return GVPOLoss(loss=linear - linear.detach() + value, weights=weights, metrics=metrics)


class _Given(NamedTuple):
    """The arguments of this rank that have a value a row."""

    policy_logps: Tensor
    reference_logps: Tensor
    rewards: Tensor
    group_ids: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Rows:
    """The rows of all ranks in float64; `local` is where this rank's rows stand among them."""

    policy: Float[Tensor, "rows"]
    reference: Float[Tensor, "rows"]
    rewards: Float[Tensor, "rows"]
    group_ids: Int[Tensor, "rows"]
    valid: Bool[Tensor, "rows"]
    local: slice
    first_row: list[int]  # of each rank


@dataclass(frozen=True)
class _Terms:
    """The centred terms of the rows of all ranks; rows that do not count are 0."""

    implicit: Float[Tensor, "rows"]  # Rθ − mean Rθ
    reward: Float[Tensor, "rows"]  # R − mean R
    residual: Float[Tensor, "rows"]  # d, their difference
    share: Float[Tensor, "rows"]  # 1/((k−1) G), and 0 in groups with fewer than two valid rows
    weights: Float[Tensor, "rows"]  # −β d share
    kept: Bool[Tensor, "rows"]
    kept_group: Bool[Tensor, "groups"]


def _solve(
    given: _Given, beta: float, process_group: dist.ProcessGroup | None
) -> tuple[_Rows, _Terms, Float[Tensor, "batch"]]:
    """The rows of all ranks and their centred terms in float64, and this rank's weights."""
    problem = _find_problem(given, beta)
    if process_group is None and problem:
        raise ValueError(problem)
    with torch.no_grad():
        rows = _union(given, process_group, problem)
        _check_finite(rows)
        terms = _centre(rows, float(beta))
    # Never in half precision, in which the weights of a group would not sum to 0.
    dtype = torch.promote_types(given.policy_logps.dtype, torch.float32)
    return rows, terms, terms.weights[rows.local].to(given.policy_logps.device, dtype)


def _centre(rows: _Rows, beta: float) -> _Terms:
    """Implicit rewards and rewards less their group's mean (docs/theory.md, fact 2)."""
    ids, group = torch.unique(rows.group_ids, return_inverse=True)
    n_ids = len(ids)
    # (bincount with weights has no deterministic form on CUDA; index_add_ has.)
    size = rows.policy.new_zeros(n_ids).index_add_(0, group, rows.valid.double())
    kept_group = size >= 2
    kept = rows.valid & kept_group.index_select(0, group)
    values = torch.stack([beta * (rows.policy - rows.reference), rows.rewards])
    values = torch.where(kept, values, -torch.inf)
    # Shifted by the group's maximum first: equal values then centre to exactly 0, not to 1e-17.
    both = group.expand(2, -1)  # gather is several times as fast as indexing
    top = values.new_full((2, n_ids), -torch.inf).scatter_reduce(1, both, values, "amax")
    shifted = torch.where(kept, values - top.gather(1, both), 0.0)
    mean = values.new_zeros(2, n_ids).index_add_(1, group, shifted) / size.clamp(min=1)
    implicit, reward = torch.where(kept, shifted - mean.gather(1, both), 0.0)
    per_group = 1 / ((size - 1) * kept_group.sum())
    share = torch.where(kept, per_group.index_select(0, group), 0.0)
    residual = implicit - reward
    # Centred terms that are both exactly 0 make a weight of exactly 0 (and not −0).
    weights = torch.where(residual == 0, 0.0, residual * share * -beta)
    return _Terms(implicit, reward, residual, share, weights, kept, kept_group)


@torch.no_grad()
def _diagnose(rows: _Rows, terms: _Terms) -> dict[str, Tensor]:
    """The metrics of `GVPOLoss` (docs/theory.md, fact 5)."""
    centred = torch.stack([terms.implicit, terms.reward, terms.residual])
    (implicit_variance, covariance, _), (_, reward_variance, _), (_, _, residual_variance) = (
        terms.share * centred
    ) @ centred.t()
    n_valid, n_groups = rows.valid.sum().clamp(min=1), terms.kept_group.sum().double()
    log_ratio = torch.where(terms.kept, rows.policy - rows.reference, 0.0)
    return {
        "loss": residual_variance / 2,
        "implicit_reward_variance": implicit_variance,
        "covariance": covariance,
        "reward_variance": reward_variance,
        "explained_variance": torch.where(
            reward_variance > 0, 1 - residual_variance / reward_variance, torch.nan
        ),
        "weight_abs_mean": terms.weights.abs().sum() / n_valid,
        "weight_zero_fraction": ((terms.weights == 0) & rows.valid).sum() / n_valid.double(),
        "groups": n_groups,
        "groups_dropped": len(terms.kept_group) - n_groups,
        "kl": log_ratio.sum() / terms.kept.sum().clamp(min=1),
    }


def _union(given: _Given, process_group: dist.ProcessGroup | None, problem: str | None) -> _Rows:
    """Gather the rows of all ranks, in rank order: a few numbers each, so that the union is computed as
    one process would compute it."""
    device = given.policy_logps.device
    home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    columns = torch.zeros(0, 5, dtype=torch.int64, device=home)
    if not problem:
        ids, mask = given.group_ids.to(home), given.mask
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(home).bool()
        policy, reference, reward = floats = [t.detach().to(home, torch.float64) for t in given[:3]]
        if process_group is None:
            return _Rows(policy, reference, reward, ids, valid, slice(0, len(ids)), [0])
        # int64 carries the bits of the float64 columns, and ids beyond 2^53, in one message.
        columns = torch.stack(
            [*(f.view(torch.int64) for f in floats), ids.to(torch.int64), valid.long()], dim=1
        )
    n, rank, world = len(columns), dist.get_rank(process_group), dist.get_world_size(process_group)
    counts = torch.zeros(world, dtype=torch.int64, device=home)
    mine = torch.tensor([-1 if problem else n], device=home)
    dist.all_gather(list(counts.split(1)), mine, group=process_group)
    sizes = counts.tolist()
    if problem or min(sizes) < 0:
        raise ValueError(problem or f"The arguments are not valid on rank {sizes.index(min(sizes))}.")
    width = max(sizes)
    gathered = [columns.new_zeros(width, 5) for _ in sizes]
    padded = torch.cat([columns, columns.new_zeros(width - n, 5)])
    dist.all_gather(gathered, padded, group=process_group)
    columns = torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
    first_row = [sum(sizes[:r]) for r in range(world)]
    local = slice(first_row[rank], first_row[rank] + n)
    policy, reference, reward = (c.contiguous().view(torch.float64) for c in columns[:, :3].unbind(1))
    return _Rows(policy, reference, reward, columns[:, 3], columns[:, 4].bool(), local, first_row)


def _find_problem(given: _Given, beta: float) -> str | None:
    """What is wrong with the arguments of this rank, in one sentence, or None. Touches no device memory."""
    if not (isinstance(beta, Real) and math.isfinite(beta) and beta > 0):
        return f"beta must be a finite number above 0, got {beta!r}; the published setting is 0.1."
    policy_logps, group_ids = given.policy_logps, given.group_ids
    for name, value in given._asdict().items():
        if name == "mask" and value is None:
            continue
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}."
        if value.dim() != 1 or value.shape != policy_logps.shape:
            return (
                f"{name} has shape {tuple(value.shape)}, but every argument needs the shape (batch,) of "
                f"policy_logps, here {tuple(policy_logps.shape)}: one sequence log-probability a row."
            )
        if value.device != policy_logps.device:
            return f"{name} is on {value.device} but policy_logps on {policy_logps.device}; move it there."
    for name in ("policy_logps", "reference_logps"):
        if not (logps := getattr(given, name)).is_floating_point():
            return f"{name} must be floating point (nats), got {logps.dtype}."
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        return f"group_ids must be integers, got {group_ids.dtype}."
    return None


def _check_finite(rows: _Rows) -> None:
    # The one host synchronisation of the good case: a sum is finite only if its terms are.
    if torch.where(rows.valid, rows.policy + rows.reference + rows.rewards, 0.0).isfinite().all():
        return
    columns = {"policy_logps": rows.policy, "reference_logps": rows.reference, "rewards": rows.rewards}
    bad = torch.stack([~c.isfinite() & rows.valid for c in columns.values()])
    if not bad.any():  # the sum was beyond float64
        return
    argument, row = (int(i) for i in bad.nonzero()[0])
    name = list(columns)[argument]
    value = columns[name][row].item()
    rank = sum(first <= row for first in rows.first_row) - 1
    place = f"row {row - rows.first_row[rank]}" + (f" of rank {rank}" if len(rows.first_row) > 1 else "")
    raise NonFiniteError(
        f"{name} is {value} in {place}: set mask to False there to leave the row out of its group, "
        "or repair what made it."
    )
