"""Responses of old policies: the right versions reach the losses, and a run is what its formula says."""

from collections.abc import Callable

import pytest
import torch

from experiments import staleness
from experiments.comparison import Arm, Scale
from experiments.exact import Dice, draw
from experiments.losses import GVPO
from experiments.responses import Responses
from experiments.staleness import CYCLE, FEEDS, GROUPS, MOVES, RIGHT, K, Starts

SCALE = Scale((20, 21), quick=True)
START = Starts(SCALE.seeds, pretraining=30)  # better ones would change nothing here


def literal(lag: int, reference: Callable[[int, int], int], rate: float, beta: float, updates: int) -> float:
    """Accuracy after updates by torch's Adam on the formula, one run, every version kept."""
    policies = START.of([20])
    optimizer, dice = torch.optim.Adam(policies.parameters, lr=rate), Dice([20])
    versions: list[torch.Tensor] = []
    for t in range(updates):
        now = policies.table()[0].sum(-1)
        versions.append(now.detach())
        v = max(0, t - lag)
        prompts = (dice.throw(GROUPS) * len(now)).long()
        y = draw(versions[v][None], prompts, dice.throw(GROUPS, K))[0]
        x = prompts[0][:, None]
        implicit = beta * (now[x, y] - versions[reference(t, v)][x, y])
        d = (implicit - implicit.mean(1, keepdim=True)) - (RIGHT[x, y] - RIGHT[x, y].mean(1, keepdim=True))
        optimizer.zero_grad()
        (d.square().sum(1) / (2 * (K - 1))).mean().backward()
        torch.nn.utils.clip_grad_norm_(policies.parameters, staleness.CLIP)
        optimizer.step()
    return float((policies.table()[0].sum(-1).exp().detach() * RIGHT).sum(-1).mean())


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("name", ["gvpo", "gvpo_sampler", "gvpo_moving"])
def test_a_run_is_adam_on_the_formula(name: str, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness, "steps", lambda scale: 30)
    arm = Arm(name, "", lambda beta: GVPO(beta=beta), [])
    (found,) = staleness._run(arm, {"beta": 0.2}, lag, [(20, 0.01)], SCALE, START)
    expected = literal(lag, FEEDS[name].reference, 0.01, 0.2, 30)
    assert found["accuracy"] == pytest.approx(expected, abs=2e-5)


def test_each_algorithm_is_told_of_the_versions_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by what they say of the same responses: equal where versions are, else not."""
    monkeypatch.setattr(staleness, "steps", lambda scale: MOVES + 9)
    lag = 5

    def seen(name: str) -> list[Responses]:
        batches: list[Responses] = []

        def loss(responses: Responses) -> torch.Tensor:
            batches.append(responses)
            return GVPO(beta=0.2)(responses)

        staleness._run(Arm(name, "", lambda: loss, []), {}, lag, [(20, 0.01)], SCALE, START)
        return batches

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a.detach(), b.detach())

    for name, feed in FEEDS.items():
        for t, batch in enumerate(seen(name)):
            v = max(0, t - lag)
            reference, old = feed.reference(t, v), feed.old(t, v)
            assert batch.behaviour_tokens is not None
            assert same(batch.behaviour_tokens, batch.policy) == (v == t)
            assert same(batch.reference, batch.policy) == (reference == t)
            assert same(batch.reference, batch.behaviour_tokens) == (reference == v)
            assert same(batch.rollout, batch.policy) == (old == t)
            assert same(batch.rollout, batch.behaviour_tokens) == (old == v)
    moving, tba = FEEDS["gvpo_moving"].reference, FEEDS["tba"].reference
    # A group in flight keeps the reference that it was begun with; TBA's is today's.
    assert (moving(MOVES + 2, MOVES - 3), tba(MOVES + 2, MOVES - 3)) == (0, MOVES)
    assert [FEEDS["grpo_decoupled"].old(t, 0) for t in range(CYCLE + 1)] == [0] * CYCLE + [CYCLE]


def test_settings_are_as_many_for_all_and_chosen_on_seeds_that_are_not_reported() -> None:
    arms = staleness.arms(Scale((20,), quick=False))
    assert {len(arm.grid) for arm in arms} == {12}
    assert [arm.name for arm in arms] == list(FEEDS)
    assert not set(staleness.TUNING) & set(Scale.of(9, False).seeds)


def test_a_job_reports_each_lag_and_each_rate_at_the_longest(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(staleness, "steps", lambda scale: 4)
    monkeypatch.setattr(staleness, "LAGS", (0, 2))
    monkeypatch.setattr(staleness, "Starts", lambda seeds: START)
    records = staleness.run_job("grpo_is", SCALE, tmp_path)
    reported = {(r.condition, r.seed) for r in records if r.seed in SCALE.seeds}
    assert reported == {(c, seed) for c in ("lag 0", "lag 2", "rate 0.01") for seed in SCALE.seeds}
    rows = {row["condition"]: row for row in staleness.summary(records, SCALE, tmp_path)["rows"]}
    assert 0.0 < rows["lag 0"]["accuracy"]["mean"] < 0.4
