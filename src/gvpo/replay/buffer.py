"""Experience replay: whole groups, appended to disk, each kept with the reference it was scored under.

    buffer = ReplayBuffer("replay/rank-00000", tokenizer=fingerprint(tokenizer), capacity=100_000)
    buffer.append(groups)                                   # committed when this returns
    buffer.sample(16, sampling="reward_variance", step=120)

One process writes a folder; `ReplayView` looks at the folders of all processes together. What is in the
buffer, and the state of its random numbers, go into a checkpoint with `save` and come back with `restore`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gvpo.errors import InputError
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex, Weights, choose
from gvpo.replay.segment import RECORD, Segment
from gvpo.replay.store import FORMAT, MANIFEST, GroupStore, read_manifest, write_json

if os.name == "posix":
    import fcntl

STATE = "state.json"


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
        memory: bytes of groups held in memory. The index takes 72 bytes a group besides.
        seed: of the sampling.
        durable: wait for the disk on each append, so that committed groups survive a loss of power too.
        segment_bytes: a segment of at least this size is closed and another begun.

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
        segment_bytes: int = 2**26,
    ) -> None:
        if capacity < 1:
            raise InputError(f"capacity={capacity}: a replay buffer holds at least one group.")
        self.capacity, self.max_age = capacity, max_age
        self.durable, self.segment_bytes = durable, segment_bytes
        self.generator = np.random.Generator(np.random.PCG64(seed))
        identity = {
            "tokenizer": tokenizer,
            "vocabulary_size": vocabulary_size,
            "group_size": group_size,
        }
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
            if not (folder / MANIFEST).exists():
                write_json(folder / MANIFEST, {"format": FORMAT, **identity, "segments": []})
        except OSError as error:
            raise InputError(f"The replay buffer cannot use {folder} ({error.strerror}).") from error
        self._start = self._end = 0
        try:
            super().__init__(folder, memory=memory, repair=True)
            _check_identity(folder, self.manifest, identity)
        except InputError:
            os.close(self._lock)
            raise
        self.manifest |= {key: value for key, value in identity.items() if value is not None}

    def _load(self, repair: bool) -> None:
        super()._load(repair)
        self._open: Segment | None = None
        self._start, self._end = 0, len(self._records)
        self.next_number = int(self._records["number"].max()) + 1 if len(self._records) else 0
        self._remove_strangers()
        self._keep_newest()

    def _live(self) -> np.ndarray:
        return self._records[self._start : self._end]

    def _live_segments(self) -> np.ndarray:
        return self._segment_of[self._start : self._end]

    # ------------------------------------------------------------------------------------------------ in

    def append(self, groups: Sequence[Group]) -> None:
        """Commit groups. All of them are checked first: if one is refused, nothing is written.

        Raises:
            InputError: a group that is not sound (`Group.check`), has another k than the buffer's, or token
                ids outside the vocabulary; or the disk is full. What was in the buffer stays.
        """
        if not groups:
            return
        for i, group in enumerate(groups):
            self._check(group, i)
        if self._open is None or self._open.end >= self.segment_bytes:
            self._begin_segment()
        assert self._open is not None
        records = self._open.append(groups, self.next_number, durable=self.durable)
        self.next_number += len(records)
        self._reserve(len(records))
        place = slice(self._end, self._end + len(records))
        self._records[place], self._segment_of[place] = records, len(self._segments) - 1
        self._end += len(records)
        for number, group in zip(records["number"].tolist(), groups, strict=True):
            self._cache.put(number, group)
        self._keep_newest()

    def _check(self, group: Group, place: int) -> None:
        group.check()
        size, vocabulary = self.manifest["group_size"], self.manifest["vocabulary_size"]
        if size is not None and len(group) != size:
            raise InputError(
                f"Group {place} has {len(group)} responses, but the buffer in {self.folder} holds groups of "
                f"{size}: use another folder for another k."
            )
        for ids in (group.prompt_ids, group.token_ids):
            if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
                wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
                raise InputError(
                    f"Group {place} has the token id {wrong}, outside the vocabulary of {vocabulary}: was it "
                    "made with another tokenizer?"
                )

    def _begin_segment(self) -> None:
        self._seal()
        # A name of its own on every timeline: after a rollback, other groups have the same numbers.
        name = f"{self.next_number:010d}-{uuid.uuid4().hex[:8]}"
        self._open = Segment.create(self.folder, name)
        self._segments.append(self._open)
        self._write_manifest()

    def _seal(self) -> None:
        if self._open is not None:
            self._open.flush()
            self._open.close()
        self._open = None

    def _reserve(self, count: int) -> None:
        """Room for `count` more entries of the index, reusing that of evicted ones."""
        if self._end + count <= len(self._records):
            return
        live = self._end - self._start
        room = max(1024, 2 * (live + count))
        records = np.zeros(room, dtype=RECORD)
        segment_of = np.zeros(room, dtype=np.int64)
        records[:live], segment_of[:live] = self._live(), self._live_segments()
        self._records, self._segment_of, self._start, self._end = records, segment_of, 0, live

    # ---------------------------------------------------------------------------------------------- evict

    def evict(self, step: int) -> int:
        """Drop the groups that are older than `max_age` at optimizer step `step`; returns how many."""
        if self.max_age is None:
            return 0
        before = len(self)
        self._keep(self._live()["policy_step"] >= step - self.max_age)
        return before - len(self)

    def clear(self) -> None:
        """Drop every group."""
        self._keep(np.zeros(len(self), dtype=bool))

    def _keep(self, kept: np.ndarray) -> None:
        if kept.all():
            return
        self._cache.discard(self._live()["number"][~kept].tolist())
        records, segment_of = self._live()[kept], self._live_segments()[kept]
        self._start, self._end = 0, len(records)
        self._records, self._segment_of = records.copy(), segment_of.copy()
        self._drop_segments()

    def _keep_newest(self) -> None:
        surplus = max(0, len(self) - self.capacity)
        self._cache.discard(self._live()["number"][:surplus].tolist())
        self._start += surplus
        self._drop_segments()

    def _drop_segments(self) -> None:
        """Delete the oldest segments, once none of their groups is in the buffer."""
        first = int(self._live_segments()[0]) if len(self) else len(self._segments) - (self._open is not None)
        if first <= 0:
            return
        dropped, self._segments = self._segments[:first], self._segments[first:]
        self._segment_of[self._start : self._end] -= first
        self._write_manifest()
        for segment in dropped:
            segment.close()
            for path in segment.files:
                path.unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        self.manifest["segments"] = [segment.name for segment in self._segments]
        write_json(self.folder / MANIFEST, self.manifest)

    def _remove_strangers(self) -> None:
        """Files that no manifest names: segments being begun or dropped when a process was killed."""
        names = {path.name for segment in self._segments for path in segment.files}
        for path in [*self.folder.glob("*.arrow"), *self.folder.glob("*.index")]:
            if path.name not in names:
                path.unlink(missing_ok=True)

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
        live = self._live()
        allowed = np.ones(len(live), dtype=bool)
        if before_number is not None:
            allowed &= live["number"] < before_number
        if self.max_age is not None:
            allowed &= live["policy_step"] >= step - self.max_age
        if allowed.all():
            return self.read(choose(self.index(step), count, sampling, self.generator))
        index, positions = self.index(step), allowed.nonzero()[0]
        narrowed = ReplayIndex(**{name: values[allowed] for name, values in vars(index).items()})
        return self.read(positions[choose(narrowed, count, sampling, self.generator)])

    # --------------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str | Path) -> None:
        """Put what is in the buffer now, and the state of its sampling, into a folder of a checkpoint.

        The segments are linked, not copied, where the file system can: they never change any more.
        """
        folder = Path(folder)
        self._seal()
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for segment in self._segments:
            for path in segment.files:
                _link(path, aside / path.name)
        numbers = self._live()["number"]
        write_json(aside / MANIFEST, self.manifest | {"segments": [s.name for s in self._segments]})
        write_json(
            aside / STATE,
            {
                "next_number": self.next_number,
                "numbers": _ranges(numbers),
                "generator": self.generator.bit_generator.state,
            },
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)

    def restore(self, folder: str | Path) -> None:
        """Make the buffer exactly what it was at `save`: its groups, and its sampling from there on.

        Groups appended since then are gone, groups evicted since then are back.

        Raises:
            InputError: no buffer was saved there, or one of another tokenizer, vocabulary or k.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        _check_identity(folder, manifest, self.manifest)
        state = read_state(folder)
        self._seal()
        for segment in self._segments:
            segment.close()
        for name in manifest["segments"]:
            for path in Segment(folder, name).files:
                if not (self.folder / path.name).exists():
                    _link(path, self.folder / path.name)
        self.manifest = manifest
        write_json(self.folder / MANIFEST, manifest)
        self._cache.clear()
        capacity, self.capacity = self.capacity, 2**62  # what was in it, whatever the capacity is now
        self._load(repair=False)
        self.capacity = capacity
        self._keep(_in_ranges(self._live()["number"], state["numbers"]))
        self._keep_newest()
        self.next_number = state["next_number"]
        self.generator.bit_generator.state = state["generator"]

    def close(self) -> None:
        """Close the files and let another process write. Everything committed stays."""
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no saved replay buffer: {STATE} cannot be read ({error}).") from error


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


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _ranges(numbers: np.ndarray) -> list[list[int]]:
    """Ascending numbers as [first, last] pairs."""
    if len(numbers) == 0:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    return [[int(numbers[a]), int(numbers[b - 1])] for a, b in pairwise(cuts)]


def _in_ranges(numbers: np.ndarray, ranges: list[list[int]]) -> np.ndarray:
    kept = np.zeros(len(numbers), dtype=bool)
    for first, last in ranges:
        kept |= (numbers >= first) & (numbers <= last)
    return kept
