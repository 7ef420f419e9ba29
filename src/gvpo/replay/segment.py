"""One segment of a replay buffer: an Arrow stream of groups and an index of where they are.

`NAME.arrow` is an Arrow IPC stream, one record batch a group: any Arrow library reads it. `NAME.index` has
a record of 64 bytes for each group (`RECORD`, little-endian), with checksums of itself and of the group.
A group is committed once its index record is written, which is after its data: whatever moment a process is
killed at, an index record without a right checksum, and data that no record points at, were never committed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gvpo.errors import InputError
from gvpo.replay.columns import FIELDS, decode, encode
from gvpo.replay.group import Group

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the record batch in the stream, bytes
        ("bytes", "<u4"),
        ("crc32", "<u4"),  # of the record batch
        ("number", "<i8"),  # of the group in its buffer, counting from 0
        ("policy_step", "<i8"),
        ("reward_mean", "<f8"),
        ("reward_variance", "<f8"),  # unbiased
        ("tokens", "<u4"),  # of prompt and completions
        ("size", "<u4"),  # k
        ("check", "<u8"),  # of the record, see _checksum
    ]
)
_CHUNK = 64  # groups encoded together; slices of longer ones would drag parts of their neighbours along
_ODD = np.array([2 * i + 1 for i in range(7)], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_HEADER = FIELDS.serialize().to_pybytes()
_SALT = np.uint64(0x6776706F_72657031)  # so that zeros, as a torn file may have, are no record


def _checksum(records: np.ndarray) -> np.ndarray:
    words = records.view(np.uint64).reshape(-1, 8)[:, :7]
    mixed = (words ^ (words >> np.uint64(29))) * _ODD
    return (mixed ^ (mixed >> np.uint64(32))).sum(1, dtype=np.uint64) + _SALT


def _records(groups: Sequence[Group], messages: Sequence[pa.Buffer], offset: int, number: int) -> np.ndarray:
    records = np.zeros(len(groups), dtype=RECORD)
    sizes = np.array([message.size for message in messages])
    records["offset"] = offset + np.cumsum(sizes) - sizes
    records["bytes"] = sizes
    records["crc32"] = [zlib.crc32(message) for message in messages]
    records["number"] = number + np.arange(len(groups))
    records["policy_step"] = [g.policy_step for g in groups]
    records["reward_mean"], records["reward_variance"] = _reward_moments(groups)
    records["tokens"] = [len(g.prompt_ids) + len(g.token_ids) for g in groups]
    records["size"] = [len(g) for g in groups]
    records["check"] = _checksum(records)
    return records


def _reward_moments(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of each group's rewards, over the responses that take part."""
    sizes = np.array([len(g) for g in groups])
    starts = np.cumsum(sizes) - sizes
    valid = np.concatenate([np.ones(len(g), bool) if g.valid is None else g.valid for g in groups])
    rewards = np.where(valid, np.concatenate([g.rewards for g in groups]), 0.0)
    n = np.add.reduceat(valid, starts, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(rewards, starts) / n
    deviations = np.where(valid, rewards - np.repeat(mean, sizes), 0.0)
    return mean, np.add.reduceat(deviations**2, starts) / np.maximum(n - 1, 1)


class Segment:
    """A segment on disk. Reading needs no lock; one process at a time may append.

    Args:
        folder, name: where its two files are.

    Attributes:
        count: committed groups.
        end: bytes of committed data.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.data_path, self.index_path = folder / f"{name}.arrow", folder / f"{name}.index"
        self.count, self.end = 0, 0
        self._reader: int | None = None
        self._writers: tuple[int, int] | None = None

    @classmethod
    def create(cls, folder: Path, name: str) -> Segment:
        """An empty segment: its files appear, with the schema at the head of the stream."""
        segment = cls(folder, name)
        segment.data_path.write_bytes(_HEADER)
        segment.index_path.write_bytes(b"")
        segment.end = len(_HEADER)
        return segment

    @property
    def files(self) -> tuple[Path, Path]:
        return self.data_path, self.index_path

    def load(self, *, repair: bool = False) -> np.ndarray:
        """The records of the committed groups. `repair` cuts away what was never committed.

        Raises:
            InputError: the files are missing, or of another format.
        """
        try:
            stored = self.index_path.read_bytes()
            size = self.data_path.stat().st_size
            with self.data_path.open("rb") as file:
                header = file.read(len(_HEADER))
        except OSError as error:
            raise InputError(
                f"{error.filename}, a part of a replay buffer, cannot be read ({error.strerror})."
            ) from error
        if header != _HEADER:
            raise InputError(
                f"{self.data_path} is no replay segment of this version: its Arrow schema differs."
            )
        whole = len(stored) // RECORD.itemsize * RECORD.itemsize
        records = np.frombuffer(stored[:whole], dtype=RECORD)
        right = (_checksum(records) == records["check"]) & (records["offset"] + records["bytes"] <= size)
        records = records[: len(records) if right.all() else int(right.argmin())]
        self.count = len(records)
        self.end = int(records["offset"][-1] + records["bytes"][-1]) if self.count else len(_HEADER)
        if repair:
            self._repair()
        return records

    def _repair(self) -> None:
        os.truncate(self.index_path, self.count * RECORD.itemsize)
        os.truncate(self.data_path, self.end)

    def append(self, groups: Sequence[Group], number: int, *, durable: bool = False) -> np.ndarray:
        """Commit groups, numbered from `number` on, and return their records.

        `durable` waits until they would survive a loss of power too, not only the end of this process.
        """
        messages: list[pa.Buffer] = []
        for start in range(0, len(groups), _CHUNK):
            batch = encode(groups[start : start + _CHUNK])
            messages += [batch.slice(i, 1).serialize() for i in range(batch.num_rows)]
        records = _records(groups, messages, self.end, number)
        if self._writers is None:
            self._writers = os.open(self.data_path, os.O_WRONLY), os.open(self.index_path, os.O_WRONLY)
        data, index = self._writers
        try:
            # At fixed places: what a failed attempt (a full disk, say) left behind is written over.
            _write(data, b"".join(messages), self.end)
            if durable:
                os.fsync(data)
            _write(index, records.tobytes(), self.count * RECORD.itemsize)
            if durable:
                os.fsync(index)
        except OSError as error:
            self._repair()
            raise InputError(
                f"The replay buffer cannot write to {self.data_path.parent} ({error.strerror}): make room. "
                "What was in it is kept."
            ) from error
        self.end = int(records["offset"][-1] + records["bytes"][-1])
        self.count += len(records)
        return records

    def read(self, record: np.void) -> Group:
        """The group of a record.

        Raises:
            InputError: its bytes are not those that were written.
        """
        if self._reader is None:
            self._reader = os.open(self.data_path, os.O_RDONLY)
        stored = os.pread(self._reader, int(record["bytes"]), int(record["offset"]))
        if zlib.crc32(stored) != record["crc32"]:
            raise InputError(
                f"Group {int(record['number'])} in {self.data_path} is damaged (its checksum is wrong): the "
                "disk, or something that wrote to the file, changed it."
            )
        return decode(pa.ipc.read_record_batch(pa.ipc.read_message(stored), FIELDS))[0]

    def flush(self) -> None:
        """Wait until the disk has everything."""
        for descriptor in self._writers or ():
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in (self._reader, *(self._writers or ())):
            if descriptor is not None:
                os.close(descriptor)
        self._reader, self._writers = None, None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
