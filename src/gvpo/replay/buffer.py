"""Experience replay: whole groups, appended to disk, each kept with the reference it was scored under.

    buffer = ReplayBuffer("replay/rank-00000", tokenizer=fingerprint(tokenizer), capacity=100_000)
    buffer.append(groups)                                   # committed when this returns
    buffer.sample(16, sampling="reward_variance", step=120)

One process writes a folder; `ReplayView` looks at the folders of all processes together. Which groups are in
the buffer, and the state of its random numbers, go into a checkpoint (`save`) and come back (`restore`).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gvpo.errors import InputError
from gvpo.replay.group import Group
from gvpo.replay.sampling import Weights, choose
from gvpo.replay.store import (
    FILE,
    FORMAT,
    INSERT,
    STATE,
    GroupStore,
    in_ranges,
    index_of,
    read_state,
    records_of,
    told,
)
from gvpo.run import replaced

if os.name == "posix":
    import fcntl


class ReplayBuffer(GroupStore):
    """A bounded, durable buffer of whole groups; the one writer of its folder.

    After a kill at any moment every group whose `append` had returned is there, and nothing torn is read.

    Args:
        folder: of this process alone; made if missing, otherwise opened with what is in it.
        tokenizer: fingerprint of the tokenizer (`gvpo.replay.tokens.fingerprint`); None does not check.
        vocabulary_size: token ids must be below it; None does not check.
        group_size: k that every group must have; None allows any.
        capacity: groups kept; the oldest leave first.
        max_age: groups older than this many optimizer steps leave (see `evict`); None keeps them.
        memory: bytes of the file to keep in memory. The index takes 52 bytes a group besides.
        seed: of the sampling.
        durable: wait for the disk on each append, so that committed groups survive a loss of power too, not
            only those before the last `save`.
        checkpoints: the folder of the run's checkpoints. Groups that one of them (in `*/*/state.json`) names
            stay in the file after they left the buffer, until it is deleted.

    Raises:
        InputError: the folder holds a buffer of another tokenizer, vocabulary or group size, or is in use.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: str | None = None,
        vocabulary_size: int | None = None,
        group_size: int | None = None,
        capacity: int = 100_000,
        max_age: int | None = None,
        memory: int = 2**28,
        seed: int = 0,
        durable: bool = False,
        checkpoints: str | Path | None = None,
    ) -> None:
        if capacity < 1:
            raise InputError(f"capacity={capacity}: a replay buffer holds at least one group.")
        self.capacity, self.max_age = capacity, max_age
        self._synchronous = "FULL" if durable else "NORMAL"  # FULL waits for the disk at each commit
        self.checkpoints = None if checkpoints is None else Path(checkpoints)
        self.generator = np.random.Generator(np.random.PCG64(seed))
        identity = {"tokenizer": tokenizer, "vocabulary_size": vocabulary_size, "group_size": group_size}
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise InputError(f"The replay buffer cannot use {folder} ({error.strerror}).") from error
        try:
            with told(folder / FILE):
                self._open(folder, memory, identity)
                check_identity(folder, self.identity, identity)
                self.identity |= {key: value for key, value in identity.items() if value is not None}
                self._db.execute(f"PRAGMA synchronous = {self._synchronous}")
                row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'groups'").fetchone()
                self._next_id = row[0] + 1 if row else 0
                with self._db:
                    self._look_for_checkpoints()
                self.records = self._select("live")
                self.next_number = int(self.records["number"][-1]) + 1 if len(self) else 0
                self._keep_newest()
        except InputError:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ in

    def append(self, groups: Sequence[Group]) -> None:
        """Commit groups. All of them are checked first: if one is refused, nothing is written.

        Raises:
            InputError: a group that is not sound (`Group.check`), has another k than the buffer's, or token
                ids outside the vocabulary; or the disk is full. What was in the buffer stays.
        """
        for i, group in enumerate(groups):
            self._check(group, i)
        self._insert(groups, self.next_number + np.arange(len(groups)))
        self.next_number += len(groups)

    def _insert(self, groups: Sequence[Group], numbers: np.ndarray) -> None:
        if not groups:
            return
        new, contents = records_of(groups, self._next_id, numbers)
        everything = np.concatenate([self.records, new])
        with told(self.path), self._db:
            self._db.executemany(INSERT, new.tolist())
            rows = zip(new["id"].tolist(), contents, strict=True)
            self._db.executemany("INSERT INTO contents VALUES (?, ?)", rows)
            self._let_go(everything["id"][: -self.capacity])
        self.records = everything[-self.capacity :]
        self._next_id += len(new)

    def _check(self, group: Group, place: int) -> None:
        group.check()
        size, vocabulary = self.identity["group_size"], self.identity["vocabulary_size"]
        if size is not None and len(group) != size:
            raise InputError(
                f"Group {place} has {len(group)} responses, but the buffer in {self.folder} holds groups of "
                f"{size}: use another folder for another k."
            )
        ids = np.concatenate([group.prompt_ids, group.token_ids])
        wrong = ids[(ids < 0) | (ids >= vocabulary)] if vocabulary is not None else []
        if len(wrong):
            raise InputError(
                f"Group {place} has the token id {wrong[0]}, outside the vocabulary of {vocabulary}: was it "
                "made with another tokenizer?"
            )

    # ---------------------------------------------------------------------------------------------- evict

    def evict(self, step: int) -> int:
        """Drop the groups that are older than `max_age` at optimizer step `step`; returns how many."""
        if self.max_age is None:
            return 0
        return self._keep(self.records["policy_step"] >= step - self.max_age)

    def clear(self) -> None:
        """Drop every group."""
        self._keep(np.zeros(len(self), dtype=bool))
        with told(self.path):
            if not self._db.execute("SELECT 1 FROM groups LIMIT 1").fetchone():
                self._db.execute("VACUUM")  # costs nothing now, and gives the room back

    def _keep_newest(self) -> None:
        self._keep(np.arange(len(self)) >= len(self) - self.capacity)

    def _keep(self, kept: np.ndarray) -> int:
        gone = self.records["id"][~kept]
        if len(gone):
            with told(self.path), self._db:
                self._let_go(gone)
            self.records = self.records[kept]
        return len(gone)

    def _let_go(self, ids: np.ndarray) -> None:
        """Groups leave the buffer, and the file too unless a checkpoint may bring them back."""
        needed = in_ranges(ids, self._needed)
        self._db.executemany("UPDATE groups SET live = 0 WHERE id = ?", ids[needed, None].tolist())
        self._db.executemany("DELETE FROM groups WHERE id = ?", ids[~needed, None].tolist())

    # ------------------------------------------------------------------------------------------------ out

    def sample(
        self,
        count: int,
        *,
        sampling: str | Weights = "uniform",
        step: int = 0,
        before_number: int | None = None,
    ) -> list[Group]:
        """`count` different groups, or fewer if there are not so many to choose from.

        Args:
            count: how many.
            sampling: "uniform", "recent" (half the chance for every 8 steps of age), "reward_variance", or a
                function from `ReplayIndex` to weights.
            step: the current optimizer step, from which ages are measured; none older than `max_age`.
            before_number: only groups that were appended when `next_number` was below this.

        Raises:
            InputError: an unknown sampling, or a function that does not return weights.
        """
        allowed = np.ones(len(self), dtype=bool)
        if before_number is not None:
            allowed &= self.records["number"] < before_number
        if self.max_age is not None:
            allowed &= self.records["policy_step"] >= step - self.max_age
        index = index_of(self.records[allowed], step)
        return self.read(allowed.nonzero()[0][choose(index, count, sampling, self.generator)])

    # --------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str | Path) -> None:
        """Put into a folder of a checkpoint which groups are in the buffer, and the state of its sampling.

        The groups themselves stay in the buffer's file, which keeps them while the checkpoint is there: in
        `folder`, or in a folder of the same depth under `checkpoints`. All of them are on the disk then.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._db.execute("PRAGMA synchronous = FULL")
        with told(self.path), self._db:
            self._look_for_checkpoints(folder.parent)
            left = self._select("NOT live")["id"]
            self._let_go(left[~in_ranges(left, self._needed)])
        self._db.execute(f"PRAGMA synchronous = {self._synchronous}")
        home = self.checkpoints or folder.parent
        state = {
            "format": FORMAT,
            "store": self.store,
            "path": str(self.folder.absolute()),
            "from_home": os.path.relpath(self.folder.absolute(), home.absolute()),
            "ids": _ranges(self.records["id"]),
            "checksum": zlib.crc32(self.records["crc32"].tobytes()),
            "next_number": self.next_number,
            "generator": self.generator.bit_generator.state,
        }
        with replaced(folder / STATE) as aside, aside.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        self._needed += state["ids"]

    def restore(self, *folders: str | Path) -> None:
        """Make the buffer exactly what it was at `save`: its groups, and its sampling from there on.

        Groups appended since then are gone, groups evicted since then are back. Groups of another buffer are
        copied from there. Of several folders (of a run of more processes) the later ones' groups are added to
        the first's; without any the buffer is empty.

        Raises:
            InputError: no buffer was saved there, or one of another tokenizer, vocabulary or k, or its groups
                are not where they were.
        """
        states = [(Path(folder), read_state(Path(folder))) for folder in folders]
        with told(self.path), self._db:
            self._look_for_checkpoints(*(folder.parent for folder, _ in states))
        if not states:
            self.clear()
        for i, (folder, state) in enumerate(states):
            if i == 0 and state["store"] == self.store:
                with told(self.path), self._db:
                    records = self._saved(folder, state)
                    self._db.execute("UPDATE groups SET live = 0 WHERE live")
                    self._db.executemany("UPDATE groups SET live = 1 WHERE id BETWEEN ? AND ?", state["ids"])
                self.records = records
            else:
                self._copy(folder, replace=i == 0)
            if i == 0:
                self.next_number = state["next_number"]
                self.generator.bit_generator.state = state["generator"]
        self._keep_newest()

    def _copy(self, folder: Path, *, replace: bool) -> None:
        """Take over the groups of another buffer's checkpoint."""
        with GroupStore(folder, memory=0) as source:
            check_identity(source.folder, source.identity, self.identity)
            if replace:
                self.clear()
            numbers = source.records["number"] if replace else self.next_number + np.arange(len(source))
            for start in range(0, len(source), 1000):
                part = np.arange(start, min(start + 1000, len(source)))
                self._insert(source.read(part), numbers[part])
            self.next_number += len(source)

    def _look_for_checkpoints(self, *others: Path) -> None:
        """Learn which groups checkpoints need: those under `checkpoints` and `others`, of now and before."""
        known = self._db.execute("SELECT path FROM checkpoint_folders").fetchall()
        folders = [*(self.folder / path for (path,) in known), *others]
        folders += [] if self.checkpoints is None else [self.checkpoints]
        there = {path.resolve() for path in folders if path.is_dir()}  # one that is gone has none any more
        self._db.execute("DELETE FROM checkpoint_folders")
        rows = [(os.path.relpath(path, self.folder.resolve()),) for path in there]
        self._db.executemany("INSERT INTO checkpoint_folders VALUES (?)", rows)
        found = {file.parent for path in there for file in path.glob(f"*/{STATE}")}
        found |= {file.parent for path in there for file in path.glob(f"*/*/{STATE}")}
        self._needed: list[list[int]] = []
        for path in found:
            with suppress(InputError):  # another program's, or an older version's
                state = read_state(path)
                self._needed += state["ids"] if state["store"] == self.store else []

    def close(self) -> None:
        """Close the file and let another process write. Everything committed stays."""
        if hasattr(self, "_db"):
            super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def check_identity(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise an InputError if the buffer in `folder` is of something else than is `wanted`."""
    reasons = {
        "tokenizer": "was filled with another tokenizer: its token ids mean something else here",
        "vocabulary_size": "has a vocabulary of {0}, not {1}",
        "group_size": "holds groups of {0} responses, not of {1}",
    }
    for key, reason in reasons.items():
        have, want = stored[key], wanted.get(key)
        if have is not None and want is not None and have != want:
            raise InputError(
                f"The replay buffer in {folder} {reason.format(have, want)}. Use another folder; nothing was "
                "changed."
            )


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    if os.name == "posix":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise InputError(
                f"The replay buffer in {folder} is in use by another process, or was not closed in this one."
            ) from error
    return descriptor


def _ranges(ids: np.ndarray) -> list[list[int]]:
    """Ascending ids as [first, last] pairs."""
    cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    return [[int(ids[a]), int(ids[b - 1])] for a, b in pairwise(cuts) if a < b]
