"""Shares of metrics, brought together."""

import torch

from gvpo.trl.metrics import Share, gathered


def test_shares_of_two_processes_are_the_metric_of_all() -> None:
    other = torch.tensor([[[6.0, 2.0], [4.0, 0.0], [9.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    shares = {
        "mean": Share(3.0, 1.0),
        "sum": Share(1.5),
        "largest": Share(7.0, 2.0, largest=True),
        "of nothing": Share(0.0, 0.0),
    }
    found = gathered(shares, lambda mine: torch.cat([mine, other]), torch.device("cpu"))
    assert found == {"mean": 3.0, "sum": 5.5, "largest": 9.0}
    assert gathered({}, lambda mine: mine, torch.device("cpu")) == {}
