"""Dynamic sampling and curricula: which prompts are asked, which groups stay; updates are the formula's."""

import json

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.errors import InputError
from gvpo.trl.dynamic import Prompts, equal_groups
from tests.gloo import run_ranks
from tests.trl.common import config, dataset, trainer
from tests.trl.oracle import Oracle, Records, Snapshots
from tests.trl.test_exactness import compare, prepared
from tests.trl.test_offpolicy import run

# ---------------------------------------------------------------------------------------------- resampling

ROUTES = {
    "one update": {},
    "two updates, initial": {"steps_per_generation": 8, "reference": "initial"},
    "replay": {"replay_ratio": 5.0},
    "demonstrations, two updates": {"demonstrations_per_group": 1, "steps_per_generation": 8},
    "tools, trust": {"tools": True, "num_iterations": 2, "trust": 0.05},
    "one round": {"max_resamples": 1},
}


def resampled(calls, args):
    """The generations, by what was handed out in each round (`calls[rank][number]`); rounds; what is left."""
    oracle, k, rounds = Oracle([], args), args.num_generations, []

    def groups(rows):
        return [rows[i : i + k] for i in range(0, len(rows), k)]

    def is_equal(group):
        rewards = [r for row in group if (r := oracle.reward(row)) is not None]
        return len(rewards) < 2 or len(set(rewards)) == 1

    made, number = [[] for _ in calls], 0
    while number < len(calls[0]):
        chosen = [groups(rank[number]) for rank in calls]
        number, first = number + 1, number
        for _ in range(args.max_resamples):
            places = [[i for i, group in enumerate(mine) if is_equal(group)] for mine in chosen]
            if not any(places):
                break
            for mine, empty, rank in zip(chosen, places, calls, strict=True):
                more = groups(rank[number])
                assert len(more) == max(map(len, places))
                useful = [group for group in more if not is_equal(group)]
                for place, group in zip(empty, useful, strict=False):
                    mine[place] = group
            number += 1
        rounds.append(number - first)
        for mine, rank in zip(chosen, made, strict=True):
            rank.append([row for group in mine for row in group])
    left = [sum(map(is_equal, groups(rows))) for rank in made for rows in rank]
    return made, rounds, left


def coarse(records):
    """Rewards of which many groups are equal."""

    def reward(**columns):
        values = records.digits(**columns)
        for row, value in zip(records.generations[-1], values, strict=True):
            row.rewards[-1] = None if value is None else float(value > 0.8)
        return [row.rewards[-1] for row in records.generations[-1]]

    return reward


def resampling(records, snapshots, **changes):
    made = prepared(
        records,
        snapshots,
        rewards=[coarse(records)],
        reward_weights=None,
        dynamic_sampling="resample",
        **changes,
    )
    made.train()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_a_resampled_run_is_the_oracle_s(route):
    records, snapshots = Records(), Snapshots()
    made = resampling(records, snapshots, **ROUTES[route])
    generations, rounds, left = resampled([records.generations], made.args)
    compare(made.args, Oracle(generations, made.args).run(), snapshots, made.state.log_history)
    logged = [entry for entry in made.state.log_history if "dynamic/rounds" in entry]
    assert [entry["dynamic/rounds"] for entry in logged] == rounds
    assert [entry["dynamic/unfilled"] for entry in logged] == left
    assert max(rounds) > 2 or "max_resamples" in ROUTES[route]
    sampled = [row for generation in records.generations for row in generation if row.rewards != [None]]
    kept = [row for generation in generations[0] for row in generation if row.rewards != [None]]
    assert sum(entry["dynamic/discarded_responses"] for entry in logged) == len(sampled) - len(kept)
    tokens = sum(sum(row.counts) for row in sampled) - sum(sum(row.counts) for row in kept)
    assert sum(entry["dynamic/discarded_tokens"] for entry in logged) == tokens


def right(completions, **_):
    """1 or 0: many groups are equal."""
    return [float(any(c in "0123456789" for c in text)) for text in completions]


def filled_from_replay(**changes):
    made = run(dataset(), right, dynamic_sampling="replay", max_completion_length=6, max_steps=5, **changes)
    made.train()
    return made


def check_filled(made):
    """Each step is the formula's; what was replaced is left out, and was never stored."""
    assert max(made.errors) < 1e-5, made.errors
    world = made.accelerator.num_processes
    logged = [entry for entry in made.state.log_history if "dynamic/replaced" in entry]
    assert logged[0]["dynamic/replaced"] == 0 < logged[0]["dynamic/unfilled"]  # nothing to take yet
    assert all(entry["dynamic/unfilled"] == 0 < entry["dynamic/replaced"] for entry in logged[2:])
    assert all(
        entry["gvpo/groups"] == 8 * world + entry["replay/groups"] - entry["dynamic/replaced"]
        for entry in logged
    )
    batch = made.batch  # of the last step
    equal = equal_groups(batch.rewards, batch.valid.new_ones(len(batch)), 4)
    assert world > 1 or equal.any()
    assert torch.equal(batch.valid.view(-1, 4).any(1), ~equal)
    buffer = made.replay.buffer
    assert all(np.ptp(group.rewards) > 0 for group in buffer.read(range(len(buffer))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"replay_ratio": 0.5, "num_iterations": 2}, {"reference": "initial"}]
)
def test_replayed_groups_take_the_places_of_equal_ones(changes, tmp_path):
    made = filled_from_replay(output_dir=str(tmp_path), **changes)
    check_filled(made)
    made.replay.buffer.close()


TORN = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 3}


def all_of_it(rank, world, folder):
    records, snapshots = Records(rank), Snapshots()
    made = resampling(records, snapshots, output_dir=f"{folder}/0", per_device_train_batch_size=4)
    check_filled(filled_from_replay(output_dir=f"{folder}/1"))
    # Groups of 4 cut by the ranks: each holds 6 rows.
    cut, parts = Records(rank), Snapshots()
    torn = prepared(cut, parts, output_dir=f"{folder}/2", easy_threshold=0.5, **TORN)
    torn.train()
    means = torn.dynamic.prompts.means
    of_torn = cut.generations, parts, torn.args, torn.state.log_history, means
    return (records.generations, snapshots, made.args, made.state.log_history), of_torn


@pytest.mark.slow
def test_two_processes_choose_and_resample_together(tmp_path):
    (first, torn), (second, other) = run_ranks(all_of_it, 2, tmp_path)
    generations, rounds, _ = resampled([first[0], second[0]], first[2])
    assert max(rounds) > 1
    for _, snapshots, args, history in (first, second):
        compare(args, Oracle(generations, args).run(), snapshots, history)
    for _, snapshots, args, history, means in (torn, other):
        compare(args, Oracle([torn[0], other[0]], args).run(), snapshots, history)
        assert np.array_equal(means, torn[4], equal_nan=True)
        assert (~np.isnan(means)).sum() == 9


# ----------------------------------------------------------------------------------------------- curricula


def prompts(count=10, **changes):
    return Prompts(count, config(**{"easy_threshold": 0.9, **changes}))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(4, 30),
    draws=st.lists(st.integers(1, 4), max_size=30),
    easy=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 3),
)
@pytest.mark.filterwarnings("ignore:Too few prompts")
def test_prompts_come_in_passes_and_pools_by_their_share(count, draws, easy, seed):
    rng = np.random.default_rng(seed)
    stream = prompts(count, easy_fraction=easy, hard_threshold=0.1, seed=seed)
    asked, again = [], prompts(count, easy_fraction=easy, hard_threshold=0.1, seed=seed)
    for number, size in enumerate(draws):
        before = stream.pools()
        pools = {name: set(pool.nonzero()[0].tolist()) for name, pool in before.items()}
        normal = set(range(count)) - pools["easy"] - pools["hard"]
        drawn = stream.draw(size)
        assert len(set(drawn)) == len(drawn) == size
        if len(normal) >= size:
            assert not pools["hard"] & {*drawn}
            due = int(easy * sum(draws[: number + 1])) - int(easy * sum(draws[:number]))
            assert len(pools["easy"] & {*drawn}) == min(due, len(pools["easy"]))
        asked += drawn
        stream.means[drawn] = rng.choice([0.0, 0.5, 0.5, 1.0], size)
        if number == len(draws) // 2:  # as a resumed run
            again.load_state_dict(json.loads(json.dumps(stream.state_dict(None))), None)
        elif number > len(draws) // 2:
            assert again.draw(size) == drawn
            again.means[drawn] = stream.means[drawn]


def test_no_prompt_comes_again_before_all_have_come():
    stream = prompts()
    orders = [[p for _ in range(5) for p in stream.draw(2)] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]
    assert stream.passes == 1
    assert prompts(shuffle_dataset=False).draw(4) == [0, 1, 2, 3]


def test_solved_prompts_are_not_asked_again_until_all_are_solved():
    stream = prompts(4)
    stream.means[:3] = 1.0
    assert [stream.draw(1) for _ in range(3)] == [[3]] * 3
    stream.means[3] = 1.0
    with pytest.warns(UserWarning, match="Too few prompts are neither easy nor hard"):
        assert sorted(stream.draw(4)) == [0, 1, 2, 3]


def test_prompts_of_another_data_set_start_anew():
    stream = prompts(10)
    with pytest.warns(UserWarning, match="another data set"):
        stream.load_state_dict(prompts(11).state_dict(None), None)
    assert stream.passes == 0


def test_a_run_drops_what_is_solved(tmp_path):
    """The columns of a prompt come along; those that are answered are not asked again."""
    data = dataset(16).add_column(
        "answer", [p[:1] if i % 2 else "" for i, p in enumerate(dataset(16)["prompt"])]
    )
    asked = []

    def reward(prompts, answer, **_):
        asked.append({*prompts})
        assert all(p.startswith(a) for p, a in zip(prompts, answer, strict=True))
        return [float(not a) for a in answer]  # every second prompt is answered at once

    made = trainer(
        rewards=reward, train_dataset=data, easy_threshold=1.0, max_steps=4, output_dir=str(tmp_path),
        per_device_train_batch_size=4,
    )  # fmt: skip
    made.train()
    solved = {row["prompt"] for row in data if not row["answer"]}
    assert set.union(*asked[:4]) == {*data["prompt"]}
    logged = [entry["prompts/easy"] for entry in made.state.log_history if "prompts/easy" in entry]
    for number, prompts_ in enumerate(asked):
        assert len(prompts_) == 4
        assert not prompts_ & solved & set().union(*asked[:number])
        assert logged[number] == len(solved & set().union(*asked[: number + 1]))


# ----------------------------------------------------------------------------------------------- bad input


BAD_SETTINGS = {
    "dynamic_sampling='dapo' is unknown: use 'none'": {"dynamic_sampling": "dapo"},
    "max_resamples=0 must be at least 1": {"max_resamples": 0},
    "easy_fraction=2 must be a share between 0 and 1": {"easy_fraction": 2, "easy_threshold": 1.0},
    "hard_fraction=0.1 needs hard_threshold": {"hard_fraction": 0.1},
    "easy_threshold=nan must be a mean reward": {"easy_threshold": float("nan")},
    "easy_threshold=0.2 must be above hard_threshold=0.3": {"easy_threshold": 0.2, "hard_threshold": 0.3},
    "together must be at most 1": {
        "easy_threshold": 1.0, "hard_threshold": 0.0, "easy_fraction": 0.6, "hard_fraction": 0.6,
    },
    "offline samples nothing": {"offline": "x.parquet", "easy_threshold": 1.0},
    "is not kept with replayed groups": {"dynamic_sampling": "replay", "trust": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("message", list(BAD_SETTINGS))
def test_bad_settings_are_refused(message):
    with pytest.raises(InputError, match=message):
        config(**BAD_SETTINGS[message])


def test_a_stream_of_prompts_is_refused():
    stream = IterableDataset.from_generator(lambda: iter(dataset().to_list()))
    with pytest.raises(InputError, match="give a data set with a length"):
        trainer(train_dataset=stream, dynamic_sampling="resample")


def test_a_round_that_fails_is_judged_with_the_whole_generation():
    """One prompt of a resampled round, whose reward fails, is judged as one of 36 rows and not of 4."""
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        if len(completions) < 32:
            raise ValueError("no")
        return [1.0] * 4 + [float(i % 2) for i in range(28)]

    made = trainer(
        rewards=reward, dynamic_sampling="resample", max_resamples=1, reward_error_tolerance=0.2, max_steps=1
    )
    made.train()
    assert made.state.log_history[0]["dynamic/unfilled"] == 1
    strict = trainer(rewards=reward, dynamic_sampling="resample", max_resamples=1, max_steps=1)
    with pytest.raises(InputError, match="1 of 36 completions"):
        strict.train()
