"""The replay buffers of all processes together, read-only, also while they are being written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gvpo.errors import refused
from gvpo.replay.columns import FIELDS, encode
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex
from gvpo.replay.store import FILE, STATE, GroupStore, index_of
from gvpo.run import replaced

_AT_ONCE = 256  # groups in memory, of an export


def rank_folder(folder: str | Path, rank: int) -> Path:
    """Where the process of this rank keeps its buffer."""
    return Path(folder) / f"rank-{rank:05d}"


class ReplayView:
    """All groups under `folder`: of every `rank-…` in it, or of the one buffer, or saved buffer, that it is.

    It shows what was committed when it was opened or last refreshed. What a writer evicts meanwhile cannot be
    read any more: refresh before reading, or `hold` it.

    Args:
        folder: as given to the trainer (`replay_directory`), or a folder of one process.
        memory: bytes of groups to keep in memory, over all processes.
        hold: keep all of it readable until this is closed; the writers' logs grow as long.

    Raises:
        InputError: there is no replay buffer.
    """

    def __init__(self, folder: str | Path, *, memory: int = 2**28, hold: bool = False) -> None:
        self.folder, self.memory, self.hold = Path(folder), memory, hold
        self.stores: list[GroupStore] = []
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is committed."""
        self.close()
        ranks = sorted(path.parent for path in self.folder.glob(f"rank-*/{FILE}"))
        alone = not ranks or (self.folder / FILE).exists() or (self.folder / STATE).exists()
        folders = [self.folder] if alone else ranks
        memory = self.memory // len(folders)
        self.stores = [GroupStore(folder, memory=memory, hold=self.hold) for folder in folders]

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    @property
    def ranks(self) -> np.ndarray:
        """Which store each entry of `index` is of."""
        return np.repeat(np.arange(len(self.stores)), [len(store) for store in self.stores])

    def index(self, step: int = 0) -> ReplayIndex:
        """All groups, store after store; `numbers` count within each store."""
        return index_of(np.concatenate([store.records for store in self.stores]), step)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Group]:
        """The groups at these positions of `index`."""
        first = np.cumsum([0, *(len(store) for store in self.stores)])
        which = np.searchsorted(first, positions, side="right") - 1
        return [
            self.stores[store].read([position - first[store]])[0]
            for store, position in zip(which.tolist(), positions, strict=True)
        ]

    def close(self) -> None:
        """Close the files."""
        for store in self.stores:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def export(folder: str | Path, output: str | Path) -> int:
    """Write all groups of a `ReplayView` as Parquet, in the columns of `FIELDS`; returns how many.

    Raises:
        InputError: there is no buffer, or a damaged one; or the file cannot be written, and nothing is left.
    """
    output = Path(output)
    writing = refused(f"{output} cannot be written", "choose another place", (OSError, pa.ArrowException))
    with ReplayView(folder, memory=0, hold=True) as view, writing:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced(output) as aside, pq.ParquetWriter(aside, FIELDS) as writer:
            for start in range(0, len(view), _AT_ONCE):
                part = range(start, min(start + _AT_ONCE, len(view)))
                writer.write_batch(encode(view.read(part)))
        return len(view)
