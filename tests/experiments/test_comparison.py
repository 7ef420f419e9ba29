"""Settings are chosen on the tuning seed alone, and intervals are Student's."""

import math

import pytest

from experiments.comparison import TUNING_SEED, Arm, Interval, Record, Scale, grid, summarise
from gvpo.errors import InputError


def record(condition: str, rate: float, seed: int, score: float, arm: str = "a") -> Record:
    return Record(arm, condition, {"lr": rate}, seed, {"score": score})


def arm(**others: bool) -> Arm:
    return Arm("a", "A", lambda: lambda r: r.policy.sum(), grid((0.1, 0.3)), **others)


RECORDS = [
    # At 0.3 the reported seeds are better, but the tuning seed, which decides, prefers 0.1.
    *[record("x", 0.1, seed, score) for seed, score in ((TUNING_SEED, 1.0), (20, 5.0), (21, 7.0))],
    *[record("x", 0.3, seed, score) for seed, score in ((TUNING_SEED, 2.0), (20, 0.0), (21, 0.0))],
    *[record("y", 0.1, seed, score) for seed, score in ((TUNING_SEED, 9.0), (20, 1.0), (21, 1.0))],
    *[record("y", 0.3, seed, score) for seed, score in ((TUNING_SEED, 0.1), (20, 2.0), (21, 4.0))],
]


def test_the_tuning_seed_decides_and_the_others_are_reported() -> None:
    x, y = summarise([arm()], RECORDS, "score")
    assert (x["condition"], x["setting"], x["score"]["seeds"]) == ("x", {"lr": 0.1}, [5.0, 7.0])
    assert (y["condition"], y["setting"], y["score"]["seeds"]) == ("y", {"lr": 0.3}, [2.0, 4.0])
    assert x["tried"] == 2
    highest = summarise([arm()], RECORDS, "score", highest=True)
    assert [row["setting"]["lr"] for row in highest] == [0.3, 0.1]


def test_one_setting_for_all_conditions_is_chosen_by_the_mean_logarithm() -> None:
    rows = summarise([arm(one_setting=True)], RECORDS, "score")
    assert [row["setting"]["lr"] for row in rows] == [0.3, 0.3]


def test_a_setting_that_diverged_is_not_chosen() -> None:
    broken = [record("x", 0.1, TUNING_SEED, math.nan), *RECORDS[1:]]
    assert summarise([arm()], broken, "score")[0]["setting"] == {"lr": 0.3}


def test_an_interval_is_student_s() -> None:
    cell = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert cell.mean == 3
    assert cell.high - cell.mean == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert cell.mean - cell.low == pytest.approx(cell.high - cell.mean)


def test_grids_are_all_combinations_and_seeds_never_the_tuning_one() -> None:
    assert len(grid((1e-3, 1e-2), beta=(0.1, 0.2, 0.5))) == 6
    assert TUNING_SEED not in Scale.of(14, quick=False).seeds
    with pytest.raises(InputError, match="--seeds 1"):
        Scale.of(1, quick=False)
