"""The simulated pools against closed forms in their limits, and the command against bad assumptions."""

from dataclasses import fields, replace

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import scale
from benchmarks.lengths import drawer, quantiles_of
from benchmarks.pools import Pools, simulate
from benchmarks.scale import Assumptions, changed, pools, run

LENGTH, TOKEN, TRAIN = 100, 0.01, 3.0  # tokens, seconds a token, seconds an update


def cluster(**settings) -> Pools:
    """Constant times: decoding costs the same however many rows there are."""
    given = {"engines": 4, "slots": 64, "groups": 8, "k": 8, "ahead": 0, "prefill": lambda tokens: 0.0}
    given |= {"decode": lambda rows, context: TOKEN, "train": lambda tokens: TRAIN}
    return Pools(**given | settings)


def constant(k: int = 8):
    return lambda: [LENGTH] * k


def test_one_row_after_the_other() -> None:
    """One engine, one slot, one row an update: everything adds up, weights and prompt included."""
    one = cluster(
        engines=1, slots=1, groups=1, k=1, load=0.5, prompt=10, prefill=lambda tokens: 0.001 * tokens
    )
    found = simulate(one, constant(1))
    assert found.seconds == pytest.approx(10 * 0.001 + LENGTH * TOKEN + TRAIN + 0.5 + 0.5)
    assert (found.lag, found.tokens, found.spanning) == (0, LENGTH, 0)


@pytest.mark.parametrize(("slots", "waves"), [(64, 1), (16, 1), (8, 2), (4, 4), (1, 16)])
def test_synchronous_training_takes_as_many_waves_as_its_rows_need(slots: int, waves: int) -> None:
    found = simulate(cluster(slots=slots), constant())
    assert found.seconds == pytest.approx(waves * LENGTH * TOKEN + TRAIN)
    assert found.trainer == pytest.approx(TRAIN / found.seconds)
    assert found.rollout == pytest.approx(1 - found.trainer)
    assert found.lag_max == 0


@pytest.mark.parametrize("ahead", [1, 3, 7])
def test_a_pool_without_end_leaves_only_the_trainer_s_time(ahead: int) -> None:
    found = simulate(cluster(engines=50, ahead=ahead), constant())
    assert found.seconds == pytest.approx(TRAIN)
    assert found.trainer == pytest.approx(1)
    assert found.lag == found.lag_max == ahead  # what is ready waits its turn


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_trainer_without_cost_leaves_only_the_engines_throughput(ahead: int) -> None:
    found = simulate(cluster(slots=4, ahead=ahead, train=lambda tokens: 1e-9), constant())
    assert found.seconds == pytest.approx(8 * 8 * LENGTH * TOKEN / (4 * 4))
    assert found.rollout == pytest.approx(1)


@pytest.mark.parametrize("train", [0.2, 0.7, 1.3])
def test_one_update_ahead_costs_the_longer_of_the_two(train: float) -> None:
    found = simulate(cluster(slots=16, ahead=1, train=lambda tokens: train), constant())
    assert found.seconds == pytest.approx(max(train, LENGTH * TOKEN))
    assert found.lag == 1


def test_the_same_gpus_generate_or_train_but_not_both() -> None:
    apart = simulate(cluster(slots=16, ahead=1), constant())
    shared = simulate(cluster(slots=16, ahead=1, shared=True), constant())
    assert apart.seconds == pytest.approx(TRAIN)
    assert shared.seconds == pytest.approx(TRAIN + LENGTH * TOKEN, rel=0.01)


def test_a_row_that_sees_new_weights_spans_versions_and_its_group_is_mixed() -> None:
    lengths = iter([[LENGTH], [10 * LENGTH]] * 1000)
    found = simulate(cluster(groups=1, k=1, ahead=3, train=lambda tokens: 0.5), lambda: next(lengths))
    assert 0.4 < found.spanning == found.mixed < 0.6
    assert found.lag_max > 3  # overtaken by those that were begun later


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=4, max_size=4),
    ahead=st.integers(0, 4),
    engines=st.integers(1, 5),
    slots=st.integers(1, 9),
)
def test_nothing_is_faster_than_its_parts(lengths: list[int], ahead: int, engines: int, slots: int) -> None:
    found = simulate(
        cluster(groups=3, k=4, engines=engines, slots=slots, ahead=ahead), lambda: lengths, updates=8
    )
    work = 3 * sum(lengths) * TOKEN / (engines * slots)
    assert found.seconds >= max(TRAIN, (ahead == 0) * (TRAIN + max(lengths) * TOKEN)) * (1 - 1e-9)
    # What was begun before the first of the eight that count may be used in them.
    assert found.seconds * (8 + ahead + 1) >= 8 * work * (1 - 1e-9)
    assert found.tokens == 3 * sum(lengths)
    assert found.lag_max == 0 or ahead > 0


def test_the_seed_decides() -> None:
    a = Assumptions(groups=8, gpus=8, mean=500)
    once, again, other = (run(replace(a, seed=s), ahead=2, updates=4) for s in (0, 0, 1))
    assert once == again
    assert once != other


def test_lengths_have_their_distribution_and_a_group_shares_its_prompt_s_part() -> None:
    quantiles = quantiles_of("math500")
    draw = drawer(quantiles, k=8, within=0.5, cap=10**6, mean=1000)
    drawn = np.array([draw() for _ in range(2000)])
    assert drawn.mean() == pytest.approx(1000, rel=0.03)
    assert np.quantile(drawn, 0.9) / np.median(drawn) == pytest.approx(
        np.quantile(quantiles, 0.9) / np.median(quantiles), rel=0.05
    )
    assert len(set(drawer(quantiles, k=8, within=0, cap=10**6)())) == 1
    assert max(drawer(quantiles, k=8, within=1, cap=300)()) <= 300
    apart = np.array([drawer(quantiles, k=2, within=1, cap=10**6, seed=seed)() for seed in range(800)])
    assert abs(np.corrcoef(apart.T)[0, 1]) < 0.1


def test_a_file_of_lengths_and_a_lognormal(tmp_path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("10\n20\n30\n")
    assert (quantiles_of(str(file))[[0, -1]] == [10, 30]).all()
    assert quantiles_of("lognormal:800:0.5").mean() == pytest.approx(800, rel=0.01)
    file.write_text("10\nmany\n")
    with pytest.raises(typer.BadParameter, match="one number of tokens a line"):
        quantiles_of(str(file))


def test_the_cluster_is_what_the_assumptions_say() -> None:
    a = Assumptions(model="70B", gpus=128, rollout=0.5)
    found = pools(a, ahead=1)
    assert (found.engines, found.k, found.groups) == (8, 8, 128)
    # One token of one row: all weights are read once, by eight GPUs.
    assert found.decode(1, 0) == pytest.approx(0.0015 + 3e-5 + 2 * 70.6e9 / (3.35e12 * 0.7) / 8)
    plain, scored = (pools(a, ahead=1, scoring=s).train(1e6) for s in ((0, 0), (2, 0)))
    assert plain == pytest.approx(6 * 69.5e9 * 1e6 / (989e12 * 0.229) / 64)
    assert scored == pytest.approx(1.5 * plain)
    assert pools(a, ahead=0, way="shared").engines == 16


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("mfu", "write name=value"),
        ("nonsense=3", "names are model"),
        ("gpus=many", "is no int"),
        ("mfu=-1", "must be positive"),
        ("mfu=nan", "must be positive"),
        ("rollout=1", "below 1"),
        ("model=3B", "there are 7B, 70B"),
        ("gpus=1", "takes 1"),
        ("lengths=nowhere", "neither a file"),
    ],
)
def test_assumptions_that_make_no_sense_are_refused(setting: str, words: str) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        changed([setting])


def test_the_page_lists_every_assumption() -> None:
    names = [row["name"] for row in scale.assumptions(Assumptions())]
    assert names == [f.name for f in fields(Assumptions)]


def test_the_command_shows_a_cluster_and_refuses_in_a_sentence() -> None:
    app = typer.Typer()
    app.command()(scale.main)
    small = ["--set", "gpus=8", "--set", "groups=8", "--set", "mean=200"]
    shown = CliRunner().invoke(app, small)
    assert shown.exit_code == 0
    assert "50% generate, ahead 4" in shown.stdout
    assert CliRunner().invoke(app, ["--set", "gpus=1"]).exit_code == 2
