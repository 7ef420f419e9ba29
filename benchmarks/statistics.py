"""Group statistics: `gvpo_loss` against a loop over groups and rows, as the published recipe has it."""

from __future__ import annotations

import torch

from benchmarks.measure import Row, minima, timed
from gvpo import gvpo_loss

ABOUT = (
    "CPU seconds from token log-probabilities (32 tokens a row, groups of 8) to their gradient, one thread. "
    "loop: mean by group and loss by row in Python, written from the published recipe's description. "
    "gvpo: sums, gvpo_loss with all its metrics, backward."
)

GROUP, TOKENS, BETA = 8, 32, 0.1


def loop_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor,
    centred_rewards: torch.Tensor,
    uids: torch.Tensor,
) -> torch.Tensor:
    """½/(k−1) Σ_i (Rθ_i − mean Rθ − (R_i − mean R))², one group and one row after the other."""
    implicit = BETA * ((policy * mask).sum(-1) - (reference * mask).sum(-1))
    means = {}
    for uid in torch.unique(uids):
        members = uids == uid
        assert members.sum() == GROUP
        means[uid.item()] = implicit.detach()[members].mean()
    loss = torch.zeros(())
    for i in range(len(implicit)):
        loss = loss + 0.5 * ((implicit[i] - means[uids[i].item()]) - centred_rewards[i]) ** 2
    return loss / (GROUP - 1)


def measure(rows: int, repeats: int) -> Row:
    torch.manual_seed(0)
    policy = torch.randn(rows, TOKENS, requires_grad=True)
    reference, mask = torch.randn(rows, TOKENS), torch.ones(rows, TOKENS)
    uids, rewards = torch.arange(rows) // GROUP, torch.rand(rows)
    centred = rewards - rewards.view(-1, GROUP).mean(1).repeat_interleave(GROUP)

    def loop() -> None:
        policy.grad = None
        loop_loss(policy, reference, mask, centred, uids).backward()

    def ours() -> None:
        policy.grad = None
        sums = (policy * mask).sum(-1), (reference * mask).sum(-1)
        gvpo_loss(*sums, rewards, uids, beta=BETA).loss.backward()

    loop()
    assert policy.grad is not None
    expected = policy.grad / (rows // GROUP)  # the recipe sums over prompts, the paper averages
    ours()
    error = ((policy.grad - expected).norm() / expected.norm()).item()
    best = minima({"loop": timed(loop), "gvpo": timed(ours, 20)}, repeats, seldom={"loop": min(3, repeats)})
    return {
        "rows": rows,
        "loop s": best["loop"],
        "gvpo s": best["gvpo"],
        "loop / gvpo": best["loop"] / best["gvpo"],
        "gradient difference": error,
    }


def run(small: bool, repeats: int = 30) -> list[Row]:
    sizes = [16, 32] if small else [64, 256, 1024, 4096, 16_384]
    return [measure(rows, 1 if small else repeats) for rows in sizes]
