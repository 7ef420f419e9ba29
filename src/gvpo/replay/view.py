"""The replay buffers of all processes together, read-only, also while they are being written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo.errors import InputError
from gvpo.replay.group import Group
from gvpo.replay.sampling import ReplayIndex
from gvpo.replay.store import MANIFEST, GroupStore, index_of


def rank_folder(folder: str | Path, rank: int) -> Path:
    """Where the process of this rank keeps its buffer."""
    return Path(folder) / f"rank-{rank:05d}"


class ReplayView:
    """All groups under `folder`: of every `rank-…` in it, or of the one buffer that it is.

    It shows what was committed when it was opened or last refreshed. What a writer evicts is there only
    until it deletes the segment: refresh before reading.

    Args:
        folder: as given to the trainer (`replay_directory`), or a folder of one process.
        memory: bytes of groups to keep in memory, over all processes.

    Raises:
        InputError: there is no replay buffer.
    """

    def __init__(self, folder: str | Path, *, memory: int = 2**28) -> None:
        self.folder, self.memory = Path(folder), memory
        self.stores: list[GroupStore] = []
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is committed."""
        self.close()
        alone = (self.folder / MANIFEST).exists()
        folders = [self.folder] if alone else sorted(self.folder.glob(f"rank-*/{MANIFEST}"))
        if not folders:
            raise InputError(f"There is no replay buffer in {self.folder}.")
        paths = [path if alone else path.parent for path in folders]
        self.stores = [GroupStore(path, memory=self.memory // len(paths)) for path in paths]

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    @property
    def ranks(self) -> np.ndarray:
        """Which store each entry of `index` is of."""
        return np.repeat(np.arange(len(self.stores)), [len(store) for store in self.stores])

    def index(self, step: int = 0) -> ReplayIndex:
        """All groups, store after store; `numbers` count within each store."""
        return index_of(np.concatenate([store._live() for store in self.stores]), step)

    def read(self, positions: Sequence[int] | np.ndarray) -> list[Group]:
        """The groups at these positions of `index`."""
        first = np.cumsum([0, *(len(store) for store in self.stores)])
        groups = []
        for position in positions:
            which = int(np.searchsorted(first, position, side="right")) - 1
            groups += self.stores[which].read([position - int(first[which])])
        return groups

    def close(self) -> None:
        """Close the files."""
        for store in self.stores:
            store.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
