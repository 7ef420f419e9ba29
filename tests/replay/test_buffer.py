"""The replay buffer: what goes in comes out, bounded, after kills and rollbacks too."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo.errors import InputError
from gvpo.replay import Group, ReplayBuffer, ReplayView, Response
from gvpo.replay.view import rank_folder
from tests.replay.groups import VOCABULARY, append_until_killed, group, same


def contents(buffer):
    return buffer.read(range(len(buffer)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 10**6), st.booleans())
def test_what_goes_in_comes_out(tmp_path_factory, sizes, first, reopened):
    folder = tmp_path_factory.mktemp("replay")
    expected = [group(n, k=2 + n % 5) for n in range(first, first + sum(sizes))]
    ends = np.cumsum(sizes).tolist()
    batches = [expected[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    with ReplayBuffer(folder, memory=5000) as buffer:
        for batch in batches:
            buffer.append(batch)
        if not reopened:
            assert all(same(a, b) for a, b in zip(contents(buffer), expected, strict=True))
    with ReplayBuffer(folder, memory=0) as buffer:
        assert all(same(a, b) for a, b in zip(contents(buffer), expected, strict=True))
        index = buffer.index(step=10**6)
        assert index.reward_variances == pytest.approx([g.reward_variance for g in expected])
        assert index.ages.tolist() == [10**6 - g.policy_step for g in expected]
        assert index.sizes.tolist() == [len(g) for g in expected]


def test_sqlite_and_arrow_alone_read_a_buffer(tmp_path):
    with ReplayBuffer(tmp_path) as buffer:
        buffer.append([group(n) for n in range(5)])
    db = sqlite3.connect(tmp_path / "groups.sqlite")
    schema = db.execute("SELECT arrow_schema FROM buffer").fetchone()[0]
    rows = db.execute("SELECT number, size, arrow FROM groups JOIN contents USING (id)").fetchall()
    db.close()
    assert [row[:2] for row in rows] == [(n, 4) for n in range(5)]
    table = pa.ipc.open_stream(schema + rows[3][2]).read_all()
    assert table["completion_ids"].to_pylist() == [[c.tolist() for c in group(3).completions]]
    assert table["reference"].to_pylist() == ["step 0"]


def test_capacity_age_and_memory_bound_the_buffer(tmp_path):
    with ReplayBuffer(tmp_path, capacity=100, max_age=5, memory=20_000) as buffer:
        for start in range(0, 1000, 10):
            buffer.append([group(n) for n in range(start, start + 10)])
        assert buffer.index().numbers.tolist() == list(range(900, 1000))
        assert (tmp_path / "groups.sqlite").stat().st_size < 400_000  # what was evicted makes room
        assert buffer.evict(step=124) == 52  # what is of steps before 119
        assert buffer.index(124).ages.max() == 5
        assert all(same(g, group(952 + i)) for i, g in enumerate(contents(buffer)))
        buffer.clear()
        assert len(buffer) == 0
        buffer.append([group(7)])
        assert same(contents(buffer)[0], group(7))


def test_sampling(tmp_path):
    with ReplayBuffer(tmp_path, seed=3) as buffer:
        assert buffer.sample(4) == []
        buffer.append([group(n) for n in range(64)])
        chosen = buffer.sample(64)
        assert sorted(g.policy_step for g in chosen) == sorted(n // 8 for n in range(64))
        assert {g.policy_step for g in buffer.sample(100, before_number=16)} == {0, 1}
        ages = [8 - g.policy_step for _ in range(60) for g in buffer.sample(8, sampling="recent", step=8)]
        assert np.mean(ages) < 4.2  # 4.5 if uniform
        spread = [g.reward_variance for _ in range(60) for g in buffer.sample(8, sampling="reward_variance")]
        assert np.mean(spread) > 1.2 * np.mean([group(n).reward_variance for n in range(64)])
        only = buffer.sample(9, sampling=lambda index: index.numbers == 11)
        assert len(only) == 1
        assert same(only[0], group(11))
        with pytest.raises(InputError, match="no sampling 'newest': choose one of uniform, recent"):
            buffer.sample(1, sampling="newest")
        with pytest.raises(InputError, match=r"shape \(1,\) for 64 groups"):
            buffer.sample(1, sampling=lambda index: np.ones(1))


def test_a_rollback_restores_what_was_in_it_and_what_is_drawn_next(tmp_path):
    settings = {"capacity": 50, "max_age": 20}
    buffer = ReplayBuffer(tmp_path / "live", seed=1, **settings)
    for start in range(0, 120, 12):
        buffer.append([group(n) for n in range(start, start + 12)])
    buffer.sample(5)
    buffer.save(tmp_path / "checkpoint")

    def life():
        drawn = []
        for start in range(120, 240, 12):
            drawn += [buffer.sample(6, sampling="recent", step=30), buffer.sample(3)]
            buffer.append([group(n) for n in range(start, start + 12)])
        return [g.policy_step for groups in drawn for g in groups], buffer.index().numbers.tolist()

    first = life()
    buffer.restore(tmp_path / "checkpoint")
    assert buffer.index().numbers.tolist() == list(range(70, 120))
    assert all(same(g, group(70 + i)) for i, g in enumerate(contents(buffer)))
    assert life() == first
    buffer.close()
    # In another folder: groups and all that follows are the same, and theirs stay as they were.
    with ReplayBuffer(tmp_path / "other", seed=9, **settings) as buffer:
        buffer.append([group(1)])
        buffer.restore(tmp_path / "checkpoint")
        assert life() == first
        with pytest.raises(InputError, match="no saved replay buffer"):
            buffer.restore(tmp_path / "nothing")
        assert buffer.index().numbers.tolist() == first[1]
    with ReplayBuffer(tmp_path / "live", **settings) as buffer:
        assert buffer.index().numbers.tolist() == first[1]
    with ReplayView(tmp_path / "checkpoint") as view:
        assert view.index().numbers.tolist() == list(range(70, 120))


def saved_run(folder, steps=6, **settings):
    """A run of steps with a checkpoint each, written aside and renamed as the trainer does."""
    buffer = ReplayBuffer(folder / "replay" / "rank-00000", capacity=10, checkpoints=folder, **settings)
    for step in range(steps):
        buffer.append([group(n) for n in range(10 * step, 10 * step + 10)])
        buffer.save(folder / ".aside" / str(step) / "replay_0")
        os.replace(folder / ".aside" / str(step), folder / f"checkpoint-{step}")
    return buffer


def numbers_in(folder):
    db = sqlite3.connect(folder / "replay" / "rank-00000" / "groups.sqlite")
    found = [row[0] for row in db.execute("SELECT number FROM groups JOIN contents USING (id) ORDER BY id")]
    db.close()
    return found


def test_groups_stay_while_a_checkpoint_needs_them(tmp_path):
    """Evicted, cleared and rolled back, and through a new start; deleted checkpoints free theirs."""
    buffer = saved_run(tmp_path)
    assert numbers_in(tmp_path) == list(range(60))
    for step in (0, 2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    buffer.restore(tmp_path / "checkpoint-1" / "replay_0")
    assert [g.metadata for g in contents(buffer)] == [group(n).metadata for n in range(10, 20)]
    buffer.append([group(70)])
    buffer.close()
    buffer = ReplayBuffer(tmp_path / "replay" / "rank-00000", capacity=10, checkpoints=tmp_path)
    assert buffer.index().numbers.tolist() == list(range(11, 21))
    buffer.clear()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "mine")
    shutil.rmtree(tmp_path / "checkpoint-4")
    buffer.append([group(80)])
    buffer.save(tmp_path / "checkpoint-6" / "replay_0")
    assert numbers_in(tmp_path) == [*range(10, 20), *range(40, 60), 21]
    for name in ("mine", "checkpoint-5", "checkpoint-1"):
        step = {"mine": 4}.get(name, int(name[-1]) if name[-1].isdigit() else 0)
        buffer.restore(tmp_path / name / "replay_0")
        assert all(same(g, group(10 * step + i)) for i, g in enumerate(contents(buffer)))
    buffer.close()


def test_a_run_does_not_free_what_another_run_s_checkpoint_needs(tmp_path):
    for name in ("a", "b"):
        with ReplayBuffer(tmp_path / "shared", capacity=5, checkpoints=tmp_path / name) as buffer:
            for start in (0, 5):
                buffer.append([group(n + 100 * (name == "b")) for n in range(start, start + 5)])
                buffer.save(tmp_path / name / ".aside" / "x" / "replay_0")
                os.replace(tmp_path / name / ".aside" / "x", tmp_path / name / f"checkpoint-{start}")
    with ReplayBuffer(tmp_path / "shared", capacity=5, checkpoints=tmp_path / "a") as buffer:
        buffer.restore(tmp_path / "a" / "checkpoint-0" / "replay_0")
        assert all(same(g, group(n)) for n, g in enumerate(contents(buffer)))


def test_a_run_can_be_moved_and_a_checkpoint_without_its_groups_is_told(tmp_path):
    saved_run(tmp_path / "run").close()
    (tmp_path / "run").rename(tmp_path / "moved")
    for home in ("replay/rank-00000", "../new"):
        path = tmp_path / "moved" / home
        with ReplayBuffer(path, capacity=10, checkpoints=tmp_path / "moved") as buffer:
            buffer.restore(tmp_path / "moved" / "checkpoint-2" / "replay_0")
            assert all(same(g, group(20 + i)) for i, g in enumerate(contents(buffer)))
            assert buffer.next_number == 30
    # The same run went on in two places: numbers are the same, groups are not.
    shutil.copytree(tmp_path / "moved", tmp_path / "twin")
    for folder, first in (("moved", 100), ("twin", 200)):
        with ReplayBuffer(tmp_path / folder / "replay" / "rank-00000", capacity=10) as buffer:
            buffer.append([group(n) for n in range(first, first + 10)])
            buffer.save(tmp_path / folder / "late" / "replay_0")
            if folder == "twin":
                with pytest.raises(InputError, match=r"has not all groups of the checkpoint .*moved"):
                    buffer.restore(tmp_path / "moved" / "late" / "replay_0")
                assert all(same(g, group(200 + i)) for i, g in enumerate(contents(buffer)))
    shutil.rmtree(tmp_path / "moved" / "replay")
    with (
        ReplayBuffer(tmp_path / "other") as buffer,
        pytest.raises(InputError, match=r"needs the replay buffer that it was saved from, which is not in"),
    ):
        buffer.restore(tmp_path / "moved" / "checkpoint-2" / "replay_0")


def test_buffers_of_more_processes_come_together(tmp_path):
    folders = []
    for rank in range(3):
        with ReplayBuffer(rank_folder(tmp_path, rank), seed=rank) as buffer:
            buffer.append([group(n) for n in range(10 * rank, 10 * rank + 4)])
            folders.append(tmp_path / "checkpoint" / f"replay_{rank}")
            buffer.save(folders[-1])
            buffer.append([group(99)])
    with ReplayBuffer(rank_folder(tmp_path, 0)) as buffer:
        buffer.restore(folders[0], folders[2])
        assert all(
            same(g, group(n)) for g, n in zip(contents(buffer), [*range(4), *range(20, 24)], strict=True)
        )
        buffer.restore()
        assert len(buffer) == 0


def test_ranks_are_seen_together_while_they_write(tmp_path):
    buffers = [ReplayBuffer(rank_folder(tmp_path, rank)) for rank in range(2)]
    buffers[0].append([group(n) for n in range(3)])
    buffers[1].append([group(n) for n in range(10, 14)])
    view = ReplayView(tmp_path)
    assert len(view) == 7
    assert view.ranks.tolist() == [0, 0, 0, 1, 1, 1, 1]
    buffers[0].append([group(3)])
    view.refresh()
    assert all(same(a, group(n)) for a, n in zip(view.read([3, 0, 7]), (3, 0, 13), strict=True))
    assert view.index(5).ages.tolist() == [5, 5, 5, 5, 4, 4, 4, 4]
    with pytest.raises(InputError, match="in use by another process"):
        ReplayBuffer(rank_folder(tmp_path, 1))
    held = ReplayView(tmp_path, hold=True)
    buffers[1].clear()
    assert all(same(a, group(n)) for a, n in zip(held.read([4, 7]), (10, 13), strict=True))
    held.close()
    with pytest.raises(InputError, match=r"Group 0 has left .*: open it again"):
        view.read([4])
    view.close()
    for buffer in buffers:
        buffer.close()


def test_a_full_disk_is_told_and_nothing_lost(tmp_path):
    with ReplayBuffer(tmp_path, capacity=20, memory=0) as buffer:
        buffer.append([group(n) for n in range(10)])
        buffer._db.execute("PRAGMA max_page_count = 12")
        with pytest.raises(
            InputError, match=r"cannot be read or written \(database or disk is full\): make room"
        ):
            buffer.append([group(n) for n in range(10, 60)])
        assert all(same(g, group(n)) for n, g in enumerate(contents(buffer)))
        buffer._db.execute("PRAGMA max_page_count = 10000")
        buffer.append([group(10)])
        assert buffer.index().numbers.tolist() == list(range(11))


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    with ReplayBuffer(tmp_path) as buffer:
        buffer.append([group(5)])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with ReplayView(tmp_path) as view:
        assert same(view.read([0])[0], group(5))
    assert {path.name for path in tmp_path.iterdir()} == {"groups.sqlite", "lock"}


def test_torn_and_damaged_bytes_are_never_read(tmp_path):
    buffer = ReplayBuffer(tmp_path / "whole")
    for n in range(10):
        buffer.append([group(2 * n), group(2 * n + 1)])
    log = (tmp_path / "whole" / "groups.sqlite-wal").read_bytes()
    rng, seen = random.Random(0), set()
    for i in range(40):  # a log that ends anywhere, as at a loss of power: whole appends, in order
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"torn-{i}")
        (folder / "groups.sqlite-shm").unlink()
        (folder / "groups.sqlite-wal").write_bytes(
            log[: rng.randrange(len(log) + 1)] + b"\1" * rng.randrange(500)
        )
        with ReplayBuffer(folder) as torn:
            kept = len(torn)
            seen.add(kept)
            torn.append([group(99)])
            assert all(same(g, group(n)) for g, n in zip(contents(torn), [*range(kept), 99], strict=True))
    assert all(kept % 2 == 0 for kept in seen)
    assert len(seen) > 5
    buffer.close()
    path = tmp_path / "whole" / "groups.sqlite"
    whole = path.read_bytes()
    place = whole.index(group(4).token_ids.tobytes()) + 8
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with (
        ReplayBuffer(tmp_path / "whole") as buffer,
        pytest.raises(InputError, match=r"Group 4 .* is damaged"),
    ):
        buffer.read([4])
    for content in (b"", b"no database" * 100, whole[:9000]):
        path.write_bytes(content)
        for opened in (ReplayBuffer, ReplayView):
            with pytest.raises(InputError, match=r"is damaged|is no replay buffer of this version"):
                opened(tmp_path / "whole").read(range(20))


def torture(folder: Path, kills: int, **settings) -> int:
    """Kill a writing process again and again; returns how many groups were committed."""
    fork = multiprocessing.get_context("fork")
    rng = random.Random(0)
    committed = 0
    for kill in range(kills):
        reader, writer = os.pipe()
        process = fork.Process(
            target=append_until_killed, args=(str(folder), writer, committed), kwargs=settings
        )
        process.start()
        os.close(writer)
        # Some die while they start, on a busy machine at least; the others once they write.
        acknowledged = b"" if kill % 5 == 0 else os.read(reader, 8)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with os.fdopen(reader, "rb") as pipe:
            acknowledged += pipe.read()
        told = int.from_bytes(acknowledged[-8:], "little") if acknowledged else committed
        with ReplayBuffer(folder, **settings) as buffer:
            assert buffer.next_number >= told
            committed = buffer.next_number
            kept = min(committed, settings.get("capacity", committed))
            assert buffer.index().numbers.tolist() == list(range(committed - kept, committed))
            recent = range(max(0, len(buffer) - 300), len(buffer))
            for position, found in zip(recent, buffer.read(recent), strict=True):
                assert same(found, group(committed - kept + position))
    return committed


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"capacity": 200}], ids=["all", "bounded"])
def test_no_committed_group_is_lost_to_a_kill(tmp_path, settings):
    assert torture(tmp_path / "replay", 25, **settings) > 100


def test_a_group_cannot_mix_references(tmp_path):
    ours = Response([1, 2], 1.0, "initial", -3.0)
    theirs = Response([3], 0.0, "step 7", -1.0)
    unscored = Response([4], 0.0)
    for other in (theirs, unscored):
        with pytest.raises(InputError, match="cannot mix references"):
            Group.of_responses([5], [ours, other])
        with pytest.raises(InputError, match="cannot mix references"):
            Group.of_responses([5], [ours, ours]).joined(other)
    mixed = Group.of_responses([5], [unscored, unscored])
    assert mixed.joined(unscored).reference is None
    scored = mixed.rescored("initial", [-1.0, -2.0])
    grown = scored.joined(ours)
    assert (len(grown), grown.reference) == (3, "initial")
    assert grown.reference_logps.tolist() == [-1.0, -2.0, -3.0]
    with pytest.raises(InputError, match=r"reference_logps has shape \(1,\)"):
        scored.rescored("step 7", [-1.0])
    with pytest.raises(InputError, match="belong together"):
        Group.of([5], [[1], [2]], [0, 1], reference_logps=[-1.0, -1.0])
    assert scored.reference_logps.tolist() == [-1.0, -2.0]


BAD_GROUPS = {
    "two or more responses": {"completions": [[1]], "rewards": [1.0]},
    "prompt of a group has no tokens": {"prompt_ids": []},
    "Completion 1 of a group is empty": {"completions": [[1], []]},
    "rewards has shape": {"rewards": [1.0]},
    "reward of completion 1 is nan": {"rewards": [0.0, float("nan")]},
    "reference log-probability of completion 0 is -inf": {
        "reference": "initial",
        "reference_logps": [-np.inf, 0],
    },
    "component length has shape": {"components": {"length": [1.0]}},
    "marks 1 tokens of 2": {"counted": [[True], []]},
}


@pytest.mark.parametrize("message", list(BAD_GROUPS))
def test_unsound_groups_are_refused(message):
    good = {"prompt_ids": [1], "completions": [[1], [2]], "rewards": [0.0, 1.0]}
    with pytest.raises(InputError, match=message):
        Group.of(**{**good, **BAD_GROUPS[message]})


def test_what_does_not_belong_is_refused_and_nothing_lost(tmp_path):
    identity = {"tokenizer": "ours", "vocabulary_size": VOCABULARY, "group_size": 4}
    with ReplayBuffer(tmp_path, **identity) as buffer:
        buffer.append([group(0)])
        before = {path: path.read_bytes() for path in tmp_path.glob("*sqlite*")}
        for message, bad in {
            r"Group 1 has 5 responses, but the buffer .* holds groups of 4": group(1, k=5),
            "token id 1000, outside the vocabulary of 1000": Group.of(
                [1], [[1000], [1], [2], [3]], [0, 1, 0, 0]
            ),
            "token id -1, outside": Group.of([1], [[1], [1], [2], [-1]], [0, 1, 0, 0]),
        }.items():
            with pytest.raises(InputError, match=message):
                buffer.append([group(1), bad])
        with pytest.raises(InputError, match="metadata of a group is not JSON"):
            buffer.append([group(1, metadata={"x": object()})])
        assert {path: path.read_bytes() for path in tmp_path.glob("*sqlite*")} == before
        buffer.save(tmp_path / "checkpoint")
    for change, message in {
        ("tokenizer", "theirs"): "another tokenizer",
        ("vocabulary_size", 7): "vocabulary of 1000, not 7",
        ("group_size", 8): "groups of 4 responses, not of 8",
    }.items():
        with pytest.raises(InputError, match=message):
            ReplayBuffer(tmp_path, **{**identity, change[0]: change[1]})
        with (
            ReplayBuffer(tmp_path / "new", **{**identity, change[0]: change[1]}) as other,
            pytest.raises(InputError, match=message),
        ):
            other.restore(tmp_path / "checkpoint")
        for leftover in (tmp_path / "new").iterdir():
            leftover.unlink()
    with ReplayBuffer(tmp_path, **identity) as buffer:
        assert same(contents(buffer)[0], group(0))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "buffer.json").write_text("{}")
    with pytest.raises(
        InputError, match="written by an earlier version of gvpo, which this one does not read"
    ):
        ReplayBuffer(tmp_path / "old")
    with sqlite3.connect(tmp_path / "groups.sqlite") as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(InputError, match="no replay buffer of this version"):
        ReplayBuffer(tmp_path, **identity)


def test_what_was_saved_or_appended_durably_is_on_the_disk_first(tmp_path, monkeypatch):
    """SQLite waits for it at a commit if `synchronous` is FULL (2); a state is synced, and then named."""
    said, events = [], []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("synced"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append(Path(paths[1]).name), replace(*paths)))
    for durable in (False, True):
        with ReplayBuffer(tmp_path / str(durable), durable=durable) as buffer:
            assert buffer._db.execute("PRAGMA synchronous").fetchone()[0] == 1 + durable
            buffer.append([group(1)])
            buffer._db.set_trace_callback(said.append)
            events.clear()
            buffer.save(tmp_path / "checkpoint" / f"replay_{durable}")
            buffer._db.set_trace_callback(None)
            assert events == ["synced", "state.json"]
            full, commit = said.index("PRAGMA synchronous = FULL"), said.index("COMMIT")
            assert full < commit
            assert buffer._db.execute("PRAGMA synchronous").fetchone()[0] == 1 + durable
            said.clear()


def test_the_oldest_that_may_be_drawn_is_as_old_as_max_age(tmp_path):
    with ReplayBuffer(tmp_path, max_age=3) as buffer:
        buffer.append([group(8 * step) for step in range(6)])
        assert sorted(g.policy_step for g in buffer.sample(9, step=5)) == [2, 3, 4, 5]
        assert sorted(g.policy_step for g in buffer.sample(9, step=5, before_number=4)) == [2, 3]
        assert buffer.evict(step=5) == 2
        assert buffer.index(5).ages.tolist() == [3, 2, 1, 0]


def test_rewards_that_take_no_part_are_not_in_the_index(tmp_path):
    with ReplayBuffer(tmp_path) as buffer:
        buffer.append([Group.of([1], [[2], [3], [4]], [1.0, 0.0, 9.0], valid=[True, True, False])])
        assert buffer.index().reward_means.tolist() == [0.5]
        assert buffer.index().reward_variances.tolist() == [0.5]
