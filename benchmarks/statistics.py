"""Group statistics: `gvpo.objective` against a loop over groups and rows, as the published recipe has it."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, minima, timed
from gvpo import gvpo_loss, gvpo_weights

ABOUT = (
    "CPU seconds from sequence log-probabilities (groups of 8) to the gradient of the loss with respect to "
    "them, one thread. loop: means by group and losses by row in Python and a backward, written from the "
    "published recipe's description. weights: gvpo_weights, which is that gradient. loss: gvpo_loss with all "
    "its metrics, and a backward."
)

GROUP, BETA = 8, 0.1


def loop_loss(
    policy: torch.Tensor, reference: torch.Tensor, centred_rewards: torch.Tensor, uids: torch.Tensor
) -> torch.Tensor:
    """½/(k−1) Σ_i (Rθ_i − mean Rθ − (R_i − mean R))², one group and one row after the other."""
    implicit = BETA * (policy - reference)
    detached = implicit.clone().detach()
    means = {}
    for uid in torch.unique(uids):
        members = uids == uid
        means[uid.item()] = detached[members].mean()
        assert detached[members].shape[0] == GROUP
    loss = torch.zeros(())
    for i in range(len(implicit)):
        loss = loss + 0.5 * ((implicit[i] - means[uids[i].item()]) - centred_rewards[i]) ** 2
    return loss / (GROUP - 1)


def measure(rows: int, repeats: int) -> Row:
    torch.manual_seed(0)
    policy = torch.randn(rows, requires_grad=True)
    reference, uids, rewards = torch.randn(rows), torch.arange(rows) // GROUP, torch.rand(rows)
    centred = rewards - rewards.view(-1, GROUP).mean(1).repeat_interleave(GROUP)

    def loop() -> torch.Tensor:
        return torch.autograd.grad(loop_loss(policy, reference, centred, uids), policy)[0]

    def weights() -> torch.Tensor:
        return -gvpo_weights(policy, reference, rewards, uids, beta=BETA)

    def loss() -> torch.Tensor:
        return torch.autograd.grad(gvpo_loss(policy, reference, rewards, uids, beta=BETA).loss, policy)[0]

    expected = loop() / (rows // GROUP)  # the recipe sums over prompts, the paper averages
    error = max(((got() - expected).norm() / expected.norm()).item() for got in (weights, loss))
    best = minima(
        {"loop": timed(loop), "weights": timed(weights, 20), "loss": timed(loss, 20)},
        repeats,
        seldom={"loop": min(4, repeats)},
    )
    return {
        "rows": rows,
        **{f"{name} s": seconds for name, seconds in best.items()},
        "loop / weights": best["loop"] / best["weights"],
        "loop / loss": best["loop"] / best["loss"],
        "gradient difference": error,
    }


def run(small: bool, repeats: int = 30) -> list[Row]:
    sizes = [16, 32] if small else [64, 256, 1024, 4096, 16_384]
    return [measure(rows, 1 if small else repeats) for rows in sizes]
