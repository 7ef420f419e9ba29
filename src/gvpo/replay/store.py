"""Groups on disk: the segments of one process's replay buffer, read through an index held in memory."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo.errors import InputError
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex
from gvpo.replay.segment import RECORD, Segment

FORMAT = 1
MANIFEST = "buffer.json"

_SEGMENT = re.compile(r"[\w-]+")


class GroupCache:
    """The groups read last, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._groups: OrderedDict[int, Group] = OrderedDict()

    def get(self, number: int) -> Group | None:
        group = self._groups.get(number)
        if group is not None:
            self._groups.move_to_end(number)
        return group

    def put(self, number: int, group: Group) -> None:
        if group.nbytes > self.limit or number in self._groups:
            return
        self._groups[number] = group
        self.bytes += group.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._groups.popitem(last=False)[1].nbytes

    def discard(self, numbers: Iterable[int]) -> None:
        """Let go of groups that are in the buffer no more."""
        for number in numbers:
            if (group := self._groups.pop(number, None)) is not None:
                self.bytes -= group.nbytes

    def clear(self) -> None:
        self._groups.clear()
        self.bytes = 0


class GroupStore:
    """The committed groups of one folder, as they were when it was opened.

    Args:
        folder: where `buffer.json` is.
        memory: bytes of groups to keep in memory. The index takes 72 bytes a group besides.
        repair: cut away what was never committed (for the one process that appends).

    Raises:
        InputError: no buffer is there, or one of another format.
    """

    def __init__(self, folder: str | Path, *, memory: int = 2**28, repair: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._cache = GroupCache(memory)
        self._segments: list[Segment] = []
        self._records = np.zeros(0, dtype=RECORD)
        self._segment_of = np.zeros(0, dtype=np.int64)  # position in `_segments`, one a record
        self._load(repair)

    def _load(self, repair: bool) -> None:
        self._segments = [Segment(self.folder, name) for name in self.manifest["segments"]]
        parts = [segment.load(repair=repair) for segment in self._segments]
        self._records = np.concatenate([np.zeros(0, dtype=RECORD), *parts])
        self._segment_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def __len__(self) -> int:
        return len(self._live())

    def _live(self) -> np.ndarray:
        """The records of the groups that are in the buffer, oldest first."""
        return self._records

    def _live_segments(self) -> np.ndarray:
        return self._segment_of

    def index(self, step: int = 0) -> ReplayIndex:
        """What is known of the groups without reading them; ages are measured from `step`."""
        return index_of(self._live(), step)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Group]:
        """The groups at these positions of the index.

        Raises:
            InputError: a group's bytes are not those that were written.
        """
        live, segments = self._live(), self._live_segments()
        groups = []
        for position in positions:
            record = live[position]
            number = int(record["number"])
            group = self._cache.get(number)
            if group is None:
                group = self._segments[segments[position]].read(record)
                self._cache.put(number, group)
            groups.append(group)
        return groups

    def close(self) -> None:
        """Close the files. Everything committed stays."""
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Any:
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


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"There is no replay buffer in {folder} ({error.strerror}: {MANIFEST}).") from error
    except ValueError as error:
        raise InputError(f"{path} is not the JSON of a replay buffer ({error}).") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is of another format than {FORMAT}: it needs another version of gvpo.")
    if not _sound(manifest):
        raise InputError(f"{path} is damaged: restore it, or use another folder.")
    return manifest


def _sound(manifest: dict[str, Any]) -> bool:
    """Whether all is there and of its type; names of segments must not lead out of the folder."""
    kinds = {"tokenizer": str, "vocabulary_size": int, "group_size": int}
    if not all(key in manifest and isinstance(manifest[key], kind | None) for key, kind in kinds.items()):
        return False
    names = manifest.get("segments")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    return len(set(names)) == len(names) and all(_SEGMENT.fullmatch(name) for name in names)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk when this returns."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
