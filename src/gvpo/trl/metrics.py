"""What a step reports: each process's share, brought together in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gvpo.batch import widest_float
from gvpo.step import StepReport


@dataclass(frozen=True)
class Share:
    """This process's share of a metric.

    Over all processes it is Σ total / Σ count; without a `count` Σ total; with `largest` the largest total.
    A metric whose counts add up to 0 is left out.
    """

    total: float
    count: float | None = None
    largest: bool = False


def gathered(
    shares: Mapping[str, Share], gather: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """The metrics over all processes, each of which gives the same names."""
    if not shares:
        return {}
    rows = [[share.total, 0.0 if share.count is None else share.count] for share in shares.values()]
    everyone = gather(torch.tensor([rows], dtype=widest_float(device), device=device))
    sums, most = everyone.sum(0).tolist(), everyone[:, :, 0].amax(0).tolist()
    found = {}
    for (name, share), (total, count), largest in zip(shares.items(), sums, most, strict=True):
        if share.count is None or count:
            found[name] = largest if share.largest else total if share.count is None else total / count
    return found


def shares_of(report: StepReport, *, with_trust: bool) -> dict[str, Share]:
    """What a step tells of this process's rows; `with_trust` also what the trust mask left out of them."""
    scored, beyond = report.scored_tokens, report.tokens_beyond_trust
    shares = {
        "entropy": Share(report.entropy * scored if scored else 0.0, scored),
        "gvpo/useful_token_fraction": Share(report.useful_tokens, report.tokens),
    }
    return shares | ({"gvpo/beyond_trust_fraction": Share(beyond, scored + beyond)} if with_trust else {})
