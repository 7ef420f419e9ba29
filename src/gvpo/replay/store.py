"""Groups on disk: one SQLite file, read through an index that is held in memory.

`groups` has a row for each group that is in the buffer, or that a checkpoint may bring back; `contents` has
the group itself, an Arrow record batch. Rows are never changed but for `live`, and no `id` is used twice. A
transaction is there whole or not at all, whatever moment a process is killed at.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from gvpo.errors import InputError
from gvpo.replay.columns import FIELDS, decode
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex

FILE = "groups.sqlite"
STATE = "state.json"  # in a checkpoint: which groups were in the buffer
FORMAT = 2  # 1 were segments of our own, beside a buffer.json
SCHEMA = f"""
BEGIN;
CREATE TABLE buffer (
    store TEXT NOT NULL,         -- a name that no other store has
    tokenizer TEXT, vocabulary_size INTEGER, group_size INTEGER,
    arrow_schema BLOB NOT NULL,  -- followed by a group's `arrow`, this is an Arrow stream
    saves INTEGER NOT NULL
);
CREATE TABLE checkpoint_folders (path TEXT PRIMARY KEY);
CREATE TABLE groups (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    number INTEGER NOT NULL,     -- counting from 0, and from the checkpoint's again after going back to one
    policy_step INTEGER NOT NULL,
    reward_mean REAL NOT NULL,
    reward_variance REAL NOT NULL,
    size INTEGER NOT NULL,       -- k
    tokens INTEGER NOT NULL,     -- of prompts and completions
    crc32 INTEGER NOT NULL,      -- of this row and of `arrow`
    live INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE contents (id INTEGER PRIMARY KEY REFERENCES groups ON DELETE CASCADE, arrow BLOB NOT NULL);
PRAGMA user_version = {FORMAT};
COMMIT;
"""
RECORD = np.dtype(
    [
        ("id", "<i8"),
        ("number", "<i8"),
        ("policy_step", "<i8"),
        ("reward_mean", "<f8"),
        ("reward_variance", "<f8"),
        ("size", "<u4"),
        ("tokens", "<u4"),
        ("crc32", "<u4"),
    ]
)
COLUMNS = ", ".join(RECORD.names or ())
_STORAGE = tuple(f"SQLITE_{name}" for name in ("FULL", "IOERR", "READONLY", "CANTOPEN", "BUSY", "LOCKED"))


class GroupCache:
    """The groups read last, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._groups: OrderedDict[int, Group] = OrderedDict()

    def get(self, key: int) -> Group | None:
        group = self._groups.get(key)
        if group is not None:
            self._groups.move_to_end(key)
        return group

    def put(self, key: int, group: Group) -> None:
        if group.nbytes > self.limit or key in self._groups:
            return
        self._groups[key] = group
        self.bytes += group.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._groups.popitem(last=False)[1].nbytes

    def discard(self, keys: Iterable[int]) -> None:
        """Let go of groups that are in the buffer no more."""
        for key in keys:
            if (group := self._groups.pop(key, None)) is not None:
                self.bytes -= group.nbytes


class GroupStore:
    """The committed groups of one folder, or of one checkpoint, as they were when it was opened; read-only.

    Args:
        folder: where `groups.sqlite` is, or what `ReplayBuffer.save` wrote.
        memory: bytes of groups to keep in memory. The index takes 52 bytes a group besides.

    Raises:
        InputError: no buffer is there, or one of another version, or a damaged one; or it has not all groups
            of the checkpoint any more.
    """

    def __init__(self, folder: str | Path, *, memory: int = 2**28) -> None:
        folder = Path(folder)
        state = read_state(folder) if (folder / STATE).exists() else None
        self._open(folder if state is None else locate(folder, state), memory)
        with told(self.path):
            self._hold(self._select("live") if state is None else self._saved(folder, state))

    def _open(self, folder: Path, memory: int, *, write: bool = False) -> None:
        self.folder, self.path = folder, folder / FILE
        if not self.path.exists():
            raise InputError(f"There is no replay buffer in {folder}." + _old_format(folder))
        # Without a place for SQLite's shared memory, a file that nobody writes can be read all the same.
        alone = not os.access(folder, os.W_OK) and not self.path.with_name(f"{FILE}-wal").exists()
        mode = "mode=rw" if write else "immutable=1" if alone else "mode=ro"
        with told(self.path):
            uri = f"{self.path.resolve().as_uri()}?{mode}"
            self._db = sqlite3.connect(uri, uri=True, timeout=60, check_same_thread=False)
            try:
                self._read_identity()
            except BaseException:
                self._db.close()
                raise
        self._cache = GroupCache(memory)

    def _read_identity(self) -> None:
        self._db.executescript(
            "PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON"
        )
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        schema = None
        if version == FORMAT:
            names = ("tokenizer", "vocabulary_size", "group_size")
            row = self._db.execute(f"SELECT store, arrow_schema, {', '.join(names)} FROM buffer").fetchone()
            self.store, schema, *identity = row or [None] * 5
            self.identity: dict[str, Any] = dict(zip(names, identity, strict=True))
        if schema != FIELDS.serialize().to_pybytes():
            raise InputError(f"{self.path} is no replay buffer of this version of gvpo: use another folder.")

    def _select(self, condition: str) -> np.ndarray:
        """The records of groups, oldest first."""
        rows = self._db.execute(f"SELECT {COLUMNS} FROM groups WHERE {condition} ORDER BY id")
        return np.fromiter(rows, dtype=RECORD)

    def _saved(self, checkpoint: Path, state: dict[str, Any]) -> np.ndarray:
        """The records of the groups that a checkpoint names."""
        records = self._select("1")
        records = records[in_ranges(records["id"], state["ids"])]
        if state["store"] != self.store or state["checksum"] != zlib.crc32(records["crc32"].tobytes()):
            raise InputError(
                f"The replay buffer in {self.folder} has not all groups of the checkpoint {checkpoint}: it "
                f"was saved from {state['path']}, which must come along with it, as it was left."
            )
        return records

    def _hold(self, records: np.ndarray) -> None:
        """Make these the groups of the buffer, oldest first."""
        self._rows, self._start, self._end = records, 0, len(records)

    @property
    def records(self) -> np.ndarray:
        """The index (`RECORD`), oldest first."""
        return self._rows[self._start : self._end]

    def __len__(self) -> int:
        return self._end - self._start

    def index(self, step: int = 0) -> ReplayIndex:
        """What is known of the groups without reading them; ages are measured from `step`."""
        return index_of(self.records, step)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Group]:
        """The groups at these positions of the index.

        Raises:
            InputError: a group's bytes are not those that were written, or it has left the file meanwhile.
        """
        with told(self.path):
            return [self._read(self.records[position]) for position in positions]

    def _read(self, record: np.void) -> Group:
        key = int(record["id"])
        group = self._cache.get(key)
        if group is None:
            row = self._db.execute("SELECT arrow FROM contents WHERE id = ?", (key,)).fetchone()
            if row is None:
                raise InputError(f"Group {record['number']} has left {self.path}: open it again.")
            if not isinstance(row[0], bytes) or checksum(record, row[0]) != record["crc32"]:
                raise InputError(
                    f"Group {record['number']} in {self.path} is damaged (its checksum is wrong): the disk, "
                    "or something that wrote to the file, changed it."
                )
            group = decode(pa.ipc.read_record_batch(pa.ipc.read_message(row[0]), FIELDS))
            self._cache.put(key, group)
        return group

    def close(self) -> None:
        """Close the file. Everything committed stays."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def index_of(records: np.ndarray, step: int) -> ReplayIndex:
    return ReplayIndex(
        numbers=records["number"],
        ages=step - records["policy_step"],
        reward_means=records["reward_mean"],
        reward_variances=records["reward_variance"],
        sizes=records["size"],
        tokens=records["tokens"],
    )


def checksum(record: np.void, arrow: bytes | pa.Buffer) -> int:
    """CRC-32 of a group's record, but for the field that this is, and of its contents."""
    return zlib.crc32(arrow, zlib.crc32(record.tobytes()[: RECORD.fields["crc32"][1]]))  # type: ignore[index]


@contextmanager
def told(path: Path) -> Iterator[None]:
    """SQLite's errors as one sentence."""
    try:
        yield
    except InputError:
        raise
    except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
        if getattr(error, "sqlite_errorname", "").startswith(_STORAGE):
            raise InputError(
                f"The replay buffer {path} cannot be read or written ({error}): make room, or choose another "
                "folder. What was committed to it is kept."
            ) from error
        raise InputError(
            f"{path} is damaged, or no replay buffer ({error}): restore it, or use another folder."
        ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """What `ReplayBuffer.save` wrote into a checkpoint."""
    kinds = {"format": int, "store": str, "path": str, "from_home": str, "checksum": int, "ids": list}
    kinds |= {"next_number": int, "generator": dict}
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        sound = all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} is no saved replay buffer: {STATE} cannot be read ({error}).") from error
    if not sound or state["format"] != FORMAT:
        raise InputError(f"{folder} is no saved replay buffer of this version of gvpo.")
    return state


def locate(folder: Path, state: dict[str, Any]) -> Path:
    """The folder of the buffer that a checkpoint was saved from: where it was, seen from there, or at all."""
    homes = (folder.absolute().parent.parent, folder.absolute().parent)
    for place in (*(home / state["from_home"] for home in homes), Path(state["path"])):
        if (place / FILE).exists():
            return place
    raise InputError(
        f"The checkpoint {folder} needs the replay buffer that it was saved from, which is not in "
        f"{state['path']} any more: put it there."
    )


def in_ranges(ids: np.ndarray, ranges: Iterable[Sequence[int]]) -> np.ndarray:
    """Which of the ids are in one of these [first, last] ranges."""
    found = np.zeros(len(ids), dtype=bool)
    for first, last in ranges:
        found |= (ids >= first) & (ids <= last)
    return found


def _old_format(folder: Path) -> str:
    if (folder / "buffer.json").exists():
        return " What is there was written by an earlier version of gvpo, which this one does not read."
    return ""
