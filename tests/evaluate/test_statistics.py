"""Estimates against closed forms and brute force."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo.evaluate import bootstrap, majority_correct, paired_test, pass_at_k


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_closed_form(case):
    samples, correct, k = case
    assert pass_at_k(samples, correct, k) == pytest.approx(1 - comb(samples - correct, k) / comb(samples, k))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    outcomes = [1, 1, 0, 0, 0, 0]
    for k in range(1, 7):
        subsets = [any(subset) for subset in combinations(outcomes, k)]
        assert pass_at_k(6, 2, k) == pytest.approx(np.mean(subsets))


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1), (4, -1, 2)]
)
def test_pass_at_k_out_of_range(samples, correct, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, correct, k)


def test_majority():
    assert majority_correct(["a", "b", "b"], [1, 0, 0]) == 0
    assert majority_correct(["a", "b", "b", None, None, None], [1, 1, 1, 0, 0, 0]) == 1
    assert majority_correct(["a", "b"], [1, 0]) == 0.5
    assert majority_correct([None, None], [0, 0]) == 0


def test_bootstrap_interval_has_the_binomial_s_width():
    values = [1.0] * 300 + [0.0] * 700
    estimate = bootstrap(values, seed=0)
    half_width = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.mean - estimate.low == pytest.approx(half_width, rel=0.1)
    assert estimate.high - estimate.mean == pytest.approx(half_width, rel=0.1)
    assert bootstrap(values, seed=0) == estimate


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        estimate = bootstrap(generator.random(60) < 0.4, seed=trial)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 34 <= covered <= 40


def test_paired_test():
    same = [0.0, 1.0, 1.0, 0.0] * 10
    assert paired_test(same, same, seed=0).p_value == 1.0
    better = paired_test([1.0] * 40, same, seed=0)
    assert (better.better, better.worse) == (20, 0)
    assert better.difference.mean == 0.5
    assert better.p_value < 0.001
    # Exact sign test for 4 changes in one direction and none in the other: 2 / 2**4.
    assert paired_test([1.0] * 4, [0.0] * 4, seed=0).p_value == pytest.approx(0.125, abs=0.02)
