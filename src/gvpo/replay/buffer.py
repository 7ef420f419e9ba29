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
import sqlite3
import uuid
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gvpo.errors import InputError
from gvpo.replay.columns import FIELDS, encode
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex, Weights, choose
from gvpo.replay.store import (
    COLUMNS,
    FILE,
    FORMAT,
    RECORD,
    SCHEMA,
    STATE,
    GroupStore,
    _old_format,
    checksum,
    in_ranges,
    read_state,
    told,
)

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
        memory: bytes of groups held in memory. The index takes 52 bytes a group besides.
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
        self.capacity, self.max_age, self.durable = capacity, max_age, durable
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
                if not (folder / FILE).exists():
                    _create(folder, identity)
                self._open(folder, memory, write=True)
                self._begin(identity)
        except InputError:
            self.close()
            raise

    def _begin(self, identity: dict[str, Any]) -> None:
        _check_identity(self.folder, self.identity, identity)
        self.identity |= {key: value for key, value in identity.items() if value is not None}
        # A commit is in the operating system's hands; the disk has it at the next save, or (FULL) at once.
        self._synchronous = "FULL" if self.durable else "NORMAL"
        self._db.execute(f"PRAGMA synchronous = {self._synchronous}")
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'groups'").fetchone()
        self._next_id = row[0] + 1 if row else 0
        self._needed = [span for state in self._states() for span in state["ids"]]
        self._hold(self._select("live"))
        self._keep_newest()
        self.next_number = int(self.records["number"][-1]) + 1 if len(self) else 0

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
        batch = encode(groups)
        contents = [batch.slice(i, 1).serialize() for i in range(len(groups))]
        new = _records(groups, self._next_id + np.arange(len(groups)), numbers)
        new["crc32"] = [checksum(record, arrow) for record, arrow in zip(new, contents, strict=True)]
        surplus = self.records[: max(0, len(self) + len(new) - self.capacity)]
        with told(self.path), self._db:
            marks = ", ".join("?" * len(RECORD.names or ()))
            self._db.executemany(f"INSERT INTO groups ({COLUMNS}) VALUES ({marks})", new.tolist())
            self._db.executemany(
                "INSERT INTO contents VALUES (?, ?)", zip(new["id"].tolist(), contents, strict=True)
            )
            self._let_go(surplus["id"])
        self._start += len(surplus)
        self._cache.discard(surplus["id"].tolist())
        self._next_id += len(new)
        self._extend(new)
        for key, group in zip(new["id"].tolist(), groups, strict=True):
            self._cache.put(key, group)
        self._keep_newest()

    def _check(self, group: Group, place: int) -> None:
        group.check()
        size, vocabulary = self.identity["group_size"], self.identity["vocabulary_size"]
        if size is not None and len(group) != size:
            raise InputError(
                f"Group {place} has {len(group)} responses, but the buffer in {self.folder} holds groups of "
                f"{size}: use another folder for another k."
            )
        ids = np.concatenate([group.prompt_ids, group.token_ids])
        if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise InputError(
                f"Group {place} has the token id {wrong}, outside the vocabulary of {vocabulary}: was it "
                "made with another tokenizer?"
            )

    def _extend(self, new: np.ndarray) -> None:
        """Put records at the end, reusing the room of those that left."""
        if self._end + len(new) > len(self._rows):
            live = self.records
            room = np.zeros(max(1024, 2 * (len(live) + len(new))), dtype=RECORD)
            room[: len(live)] = live
            self._rows, self._start, self._end = room, 0, len(live)
        self._rows[self._end : self._end + len(new)] = new
        self._end += len(new)

    # ---------------------------------------------------------------------------------------------- evict

    def evict(self, step: int) -> int:
        """Drop the groups that are older than `max_age` at optimizer step `step`; returns how many."""
        if self.max_age is None:
            return 0
        before = len(self)
        self._keep(self.records["policy_step"] >= step - self.max_age)
        return before - len(self)

    def clear(self) -> None:
        """Drop every group."""
        if not len(self):
            return
        self._keep(np.zeros(len(self), dtype=bool))
        with told(self.path):
            if not self._db.execute("SELECT 1 FROM groups LIMIT 1").fetchone():
                self._db.execute("VACUUM")  # costs nothing now, and gives the room back

    def _keep_newest(self) -> None:
        self._keep(np.arange(len(self)) >= len(self) - self.capacity)

    def _keep(self, kept: np.ndarray) -> None:
        if kept.all():
            return
        gone = self.records["id"][~kept]
        with told(self.path), self._db:
            self._let_go(gone)
        self._hold(self.records[kept])
        self._cache.discard(gone.tolist())

    def _let_go(self, ids: np.ndarray) -> None:
        """Groups leave the buffer, and the file too unless a checkpoint may bring them back."""
        needed = in_ranges(ids, self._needed)
        for statement, which in (
            ("UPDATE groups SET live = 0 WHERE id = ?", ids[needed]),
            ("DELETE FROM groups WHERE id = ?", ids[~needed]),
        ):
            self._db.executemany(statement, [(key,) for key in which.tolist()])

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
        records = self.records
        allowed = np.ones(len(records), dtype=bool)
        if before_number is not None:
            allowed &= records["number"] < before_number
        if self.max_age is not None:
            allowed &= records["policy_step"] >= step - self.max_age
        if allowed.all():
            return self.read(choose(self.index(step), count, sampling, self.generator))
        index, positions = self.index(step), allowed.nonzero()[0]
        narrowed = ReplayIndex(**{name: values[allowed] for name, values in vars(index).items()})
        return self.read(positions[choose(narrowed, count, sampling, self.generator)])

    # --------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str | Path) -> None:
        """Put into a folder of a checkpoint which groups are in the buffer, and the state of its sampling.

        The groups themselves stay in the buffer's file, which keeps them while the checkpoint is there: in
        `folder`, or in a folder of the same depth under `checkpoints`. All of them are on the disk then.
        """
        folder, records = Path(folder), self.records
        self._free(folder)
        home = self.checkpoints or folder.parent
        state = {
            "format": FORMAT,
            "store": self.store,
            "path": str(self.folder.absolute()),
            "from_home": os.path.relpath(self.folder.absolute(), home.absolute()),
            "ids": _ranges(records["id"]),
            "checksum": zlib.crc32(records["crc32"].tobytes()),
            "next_number": self.next_number,
            "generator": self.generator.bit_generator.state,
        }
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{STATE}.partial"
        with aside.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, folder / STATE)
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
        first = True
        with told(self.path), self._db:
            for folder in map(Path, folders):
                self._remember(folder.parent)
        self._needed = [span for state in self._states() for span in state["ids"]]
        if not folders:
            self.clear()
        for folder in map(Path, folders):
            state = read_state(folder)
            if first and state["store"] == self.store:
                self._go_back(folder, state)
            else:
                self._copy(folder, empty=first)
            if first:
                self.next_number, first = state["next_number"], False
                self.generator.bit_generator.state = state["generator"]
        self._keep_newest()

    def _go_back(self, folder: Path, state: dict[str, Any]) -> None:
        with told(self.path), self._db:
            records = self._saved(folder, state)
            self._db.execute("UPDATE groups SET live = 0 WHERE live")
            self._db.executemany("UPDATE groups SET live = 1 WHERE id BETWEEN ? AND ?", state["ids"])
        self._cache.discard(self.records["id"].tolist())
        self._hold(records)

    def _copy(self, folder: Path, *, empty: bool) -> None:
        with GroupStore(folder, memory=0) as source:
            _check_identity(source.folder, source.identity, self.identity)
            if empty:
                self.clear()
            for start in range(0, len(source), 1000):
                part = range(start, min(start + 1000, len(source)))
                numbers = source.records["number"][part] if empty else self.next_number + np.arange(len(part))
                self._insert(source.read(part), numbers)
                self.next_number += len(part)

    def _free(self, folder: Path) -> None:
        """Delete what left the buffer and no checkpoint names any more, and bring the rest to the disk."""
        self._db.execute("PRAGMA synchronous = FULL")
        with told(self.path), self._db:
            self._remember(folder.parent)
            self._needed = [span for state in self._states(forget=True) for span in state["ids"]]
            gone = np.array(
                [row[0] for row in self._db.execute("SELECT id FROM groups WHERE NOT live")], "<i8"
            )
            self._let_go(gone[~in_ranges(gone, self._needed)])
            self._db.execute("UPDATE buffer SET saves = saves + 1")
        self._db.execute(f"PRAGMA synchronous = {self._synchronous}")

    def _remember(self, folder: Path) -> None:
        """Checkpoints are looked for in this folder too from now on."""
        path = os.path.relpath(folder.absolute(), self.folder.absolute())
        self._db.execute("INSERT OR IGNORE INTO checkpoint_folders VALUES (?)", (path,))

    def _states(self, *, forget: bool = False) -> list[dict[str, Any]]:
        """What the checkpoints of this buffer that are there name; `forget` the folders that are not."""
        known = [row[0] for row in self._db.execute("SELECT path FROM checkpoint_folders")]
        folders = {(self.folder / path).resolve() for path in known}
        if forget:
            gone = [(path,) for path in known if not (self.folder / path).is_dir()]
            self._db.executemany("DELETE FROM checkpoint_folders WHERE path = ?", gone)
        if self.checkpoints is not None:
            folders.add(self.checkpoints.resolve())
        states = []
        for path in {p for f in folders for pattern in ("*/", "*/*/") for p in f.glob(pattern + STATE)}:
            try:
                states.append(read_state(path.parent))
            except InputError:  # another program's, or an older version's
                continue
        return [state for state in states if state["store"] == self.store]

    def close(self) -> None:
        """Close the file and let another process write. Everything committed stays."""
        if hasattr(self, "_db"):
            super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _create(folder: Path, identity: dict[str, Any]) -> None:
    """An empty buffer: the file appears whole."""
    if old := _old_format(folder):
        raise InputError(f"{folder} cannot hold a replay buffer.{old} Use another folder.")
    aside = folder / f".{FILE}.partial"
    aside.unlink(missing_ok=True)
    db = sqlite3.connect(aside)
    db.execute("PRAGMA page_size = 8192")  # a group of a few kB on few pages
    db.executescript(SCHEMA)
    row = (uuid.uuid4().hex, *identity.values(), FIELDS.serialize().to_pybytes())
    with db:
        db.execute("INSERT INTO buffer VALUES (?, ?, ?, ?, ?, 0)", row)
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    os.replace(aside, folder / FILE)


def _records(groups: Sequence[Group], ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    records = np.zeros(len(groups), dtype=RECORD)
    records["id"], records["number"] = ids, numbers
    records["policy_step"] = [g.policy_step for g in groups]
    with np.errstate(all="ignore"):  # of enormous rewards, or none that takes part
        means = [
            g.rewards.mean() if g.valid is None else g.rewards[g.valid].sum() / max(1, g.valid.sum())
            for g in groups
        ]
        variances = [g.reward_variance for g in groups]
    # SQLite knows no NaN, and no negative zero.
    records["reward_mean"], records["reward_variance"] = (
        np.nan_to_num(means) + 0.0,
        np.nan_to_num(variances) + 0.0,
    )
    records["tokens"] = [len(g.prompt_ids) + len(g.token_ids) for g in groups]
    records["size"] = [len(g) for g in groups]
    return records


def _check_identity(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    reasons = {
        "tokenizer": "was filled with another tokenizer: its token ids mean something else here",
        "vocabulary_size": "has a vocabulary of {0}, not {1}",
        "group_size": "holds groups of {0} responses, not of {1}",
    }
    for key, reason in reasons.items():
        have, want = stored[key], wanted[key]
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
    if len(ids) == 0:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    return [[int(ids[a]), int(ids[b - 1])] for a, b in pairwise(cuts)]
