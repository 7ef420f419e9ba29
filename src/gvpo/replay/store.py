"""Groups on disk: one SQLite file, read through an index that is held in memory.

`groups` has a row for each group that is in the buffer, or that a checkpoint may bring back; `contents` has
the group itself, an Arrow record batch. Rows are never changed but for `live`, and no `id` is used twice. A
transaction is there whole or not at all, whatever moment a process is killed at.
"""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from gvpo.errors import InputError
from gvpo.replay.columns import FIELDS, decode, encode
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex
from gvpo.run import replaced

FILE = "groups.sqlite"
STATE = "state.json"  # in a checkpoint: which groups were in the buffer
FORMAT = 2  # 1 were segments of our own, beside a buffer.json
SCHEMA = f"""
CREATE TABLE buffer (
    store TEXT NOT NULL,         -- a name that no other store has
    tokenizer TEXT, vocabulary_size INTEGER, group_size INTEGER,
    arrow_schema BLOB NOT NULL   -- followed by a group's `arrow`, this is an Arrow stream
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
"""
RECORD = np.dtype("i8,i8,i8,f8,f8,u4,u4,u4")
RECORD.names = "id", "number", "policy_step", "reward_mean", "reward_variance", "size", "tokens", "crc32"
COLUMNS = ", ".join(RECORD.names)
INSERT = f"INSERT INTO groups ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_STORAGE = tuple(f"SQLITE_{name}" for name in ("FULL", "IOERR", "READONLY", "CANTOPEN", "BUSY", "LOCKED"))


class GroupStore:
    """The committed groups of one folder, or of one checkpoint, as they were when it was opened; read-only.

    Args:
        folder: where `groups.sqlite` is, or what `ReplayBuffer.save` wrote.
        memory: bytes of the file to keep in memory. The index takes 52 bytes a group besides.
        hold: keep all of it readable, whatever a writer drops meanwhile. Its log grows until this is closed.

    Attributes:
        records: the index, a `RECORD` a group, oldest first.

    Raises:
        InputError: no buffer is there, or one of another version, or a damaged one; or it has not all groups
            of the checkpoint any more.
    """

    def __init__(self, folder: str | Path, *, memory: int = 2**28, hold: bool = False) -> None:
        folder = Path(folder)
        state = read_state(folder) if (folder / STATE).exists() else None
        self._open(folder if state is None else locate(folder, state), memory)
        with told(self.path):
            if hold:
                self._db.execute("BEGIN")
            self.records = self._select("live") if state is None else self._saved(folder, state)

    def _open(self, folder: Path, memory: int, identity: dict[str, Any] | None = None) -> None:
        """Open the file: with an `identity` to write to it, which makes it where there is none."""
        self.folder, self.path = folder, folder / FILE
        mode = "mode=ro" if identity is None else "mode=rw"
        with told(self.path):
            if not self.path.exists():
                if (folder / "buffer.json").exists():
                    raise InputError(
                        f"The replay buffer in {folder} was written by an earlier version of gvpo, which "
                        "this one does not read: use another folder."
                    )
                if identity is None:
                    raise InputError(f"There is no replay buffer in {folder}.")
                _create(self.path, identity)
            if not os.access(folder, os.W_OK) and not self.path.with_name(f"{FILE}-wal").exists():
                mode = "immutable=1"  # no place for SQLite's shared memory, and no need of it
            uri = f"{self.path.resolve().as_uri()}?{mode}"
            self._db = sqlite3.connect(uri, uri=True, timeout=60, check_same_thread=False)
            self._db.executescript(
                "PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON;"
                f"PRAGMA cache_size = {-(memory // 1024)}"
            )
            schema = None
            if self._db.execute("PRAGMA user_version").fetchone()[0] == FORMAT:
                names = ("store", "arrow_schema", "tokenizer", "vocabulary_size", "group_size")
                row = self._db.execute(f"SELECT {', '.join(names)} FROM buffer").fetchone() or [None] * 5
                self.identity = dict(zip(names, row, strict=True))
                self.store, schema = self.identity.pop("store"), self.identity.pop("arrow_schema")
            if schema != FIELDS.serialize().to_pybytes():
                raise InputError(f"{self.path} is no replay buffer of this version: use another folder.")

    def _select(self, condition: str) -> np.ndarray:
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

    def __len__(self) -> int:
        return len(self.records)

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
        row = self._db.execute("SELECT arrow FROM contents WHERE id = ?", (int(record["id"]),)).fetchone()
        if row is None:
            raise InputError(f"Group {record['number']} has left {self.path}: open it again.")
        if not isinstance(row[0], bytes) or checksum(record, row[0]) != record["crc32"]:
            raise InputError(
                f"Group {record['number']} in {self.path} is damaged (its checksum is wrong): the disk, or "
                "something that wrote to the file, changed it."
            )
        return decode(pa.ipc.read_record_batch(pa.ipc.read_message(row[0]), FIELDS))

    def close(self) -> None:
        """Close the file. Everything committed stays."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _create(path: Path, identity: dict[str, Any]) -> None:
    """An empty buffer: the file appears whole."""
    with replaced(path) as aside:
        aside.unlink(missing_ok=True)
        db = sqlite3.connect(aside)
        db.execute("PRAGMA page_size = 8192")  # a group of a few kB on few pages
        db.executescript(SCHEMA)
        row = (uuid.uuid4().hex, *identity.values(), FIELDS.serialize().to_pybytes())
        with db:
            db.execute("INSERT INTO buffer VALUES (?, ?, ?, ?, ?)", row)
        db.execute("PRAGMA journal_mode = WAL")
        db.close()


def records_of(
    groups: Sequence[Group], first_id: int, numbers: np.ndarray
) -> tuple[np.ndarray, list[pa.Buffer]]:
    """The index of groups, and their contents."""
    rewards = [group.rewards[group.takes_part] for group in groups]
    records = np.zeros(len(groups), dtype=RECORD)
    records["id"], records["number"] = first_id + np.arange(len(groups)), numbers
    records["policy_step"] = [group.policy_step for group in groups]
    with np.errstate(all="ignore"):  # SQLite knows no NaN (of enormous rewards), and no negative zero
        records["reward_mean"] = np.nan_to_num([r.sum() / max(1, len(r)) for r in rewards]) + 0.0
        records["reward_variance"] = np.nan_to_num([group.reward_variance for group in groups])
    records["size"] = [len(group) for group in groups]
    records["tokens"] = [len(group.prompt_ids) + len(group.token_ids) for group in groups]
    batch = encode(groups)
    contents = [batch.slice(i, 1).serialize() for i in range(len(groups))]
    records["crc32"] = [checksum(record, arrow) for record, arrow in zip(records, contents, strict=True)]
    return records, contents


def index_of(records: np.ndarray, step: int) -> ReplayIndex:
    ages = step - records["policy_step"]
    columns = ("reward_mean", "reward_variance", "size", "tokens")
    return ReplayIndex(records["number"], ages, *(records[name] for name in columns))


def checksum(record: np.void, arrow: bytes | pa.Buffer) -> int:
    """CRC-32 of a group's record, but for the last field, which this is, and of its contents."""
    return zlib.crc32(arrow, zlib.crc32(record.tobytes()[:-4]))


@contextmanager
def told(path: Path) -> Iterator[None]:
    """SQLite's errors as one sentence."""
    try:
        yield
    except InputError:
        raise
    except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
        what, advice = "is damaged, or is none", "restore it, or use another folder"
        if getattr(error, "sqlite_errorname", "").startswith(_STORAGE):
            what = "cannot be read or written"
            advice = "make room, or choose another folder; what was committed is kept"
        raise InputError(f"The replay buffer {path} {what} ({error}): {advice}.") from error


def read_state(folder: Path) -> dict[str, Any]:
    """What `ReplayBuffer.save` wrote into a checkpoint."""
    kinds = {"store": str, "path": str, "from_home": str, "checksum": int, "ids": list}
    kinds |= {"next_number": int, "generator": dict}
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        sound = all(isinstance(state.get(key), kind) for key, kind in kinds.items())
        if not sound or state.get("format") != FORMAT:
            raise ValueError("it is of another version")
        in_ranges(np.zeros(1), state["ids"])
        np.random.PCG64().state = state["generator"]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"{folder} is no saved replay buffer: {STATE} cannot be read ({error}).") from error
    return state


def locate(folder: Path, state: dict[str, Any]) -> Path:
    """The folder of the buffer that a checkpoint was saved from: where it was, seen from there, or at all."""
    homes = (folder.absolute().parent.parent, folder.absolute().parent)
    for place in (*(home / state["from_home"] for home in homes), Path(state["path"])):
        if os.path.exists(place / FILE):  # Path.exists raises for names that cannot be
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
