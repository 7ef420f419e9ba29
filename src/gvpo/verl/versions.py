"""Earlier versions of the policy, kept in host memory: what stale groups are measured against.

Version v is the policy after step v, which the rollout servers have from then on; version 0 is the initial
one. All responses of a group are measured against one version (docs/theory.md, fact 6), and against any
single one the update is exact: keeping several is a matter of the target, not of correctness.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register

_NOW = "now"  # beside the versions' numbers; verl's own keys are whole numbers


class Versions:
    """Which versions the workers keep.

    Args:
        older: how many to keep besides the newest.
        period: the reference is every so many-th version.
        needed: False where the present policy is always the one to measure against.

    Attributes:
        workers: the group of `KeepingWorker`s, once there is one.
        kept: numbers of the versions, ascending.
    """

    def __init__(self, older: int, period: int, needed: bool) -> None:
        self.older, self.period, self.needed = older, period, needed
        self.workers: Any = None
        self.kept: list[int] = []

    def keep(self, version: int) -> None:
        """Keep the policy as it is now, if it is to be a reference (or there is no other)."""
        if not self.needed or (self.kept and version % self.period):
            return
        self.workers.save_model_to_cpu(str(version))
        self.kept.append(version)
        while len(self.kept) > self.older + 1:
            self.workers.clear_cpu_model(str(self.kept.pop(0)))

    def of(self, version: int, present: int) -> int:
        """The version that a group is measured against, of which `version` sampled the oldest response.

        It is the reference of that time, or the oldest that is kept; the `present` one where none is.
        """
        choices = self.kept or [present]
        # A checkpoint's are of another period, if the user has changed it.
        return min((v for v in choices if v >= version - version % self.period), default=choices[-1])

    def each(self, versions: Collection[int], present: int | None) -> Iterator[int]:
        """Each of these versions, ascending, while the workers have its weights; then they have theirs again.

        Their own are those of the version `present`, or of none.
        """
        if old := sorted(version for version in versions if version != present):
            self.workers.save_model_to_cpu(_NOW)
            for version in old:
                self.workers.restore_model_from_cpu(str(version))
                yield version
            self.workers.restore_model_from_cpu(_NOW)
            self.workers.clear_cpu_model(_NOW)
        if present is not None and present in versions:
            yield present

    def write(self, folder: Path) -> None:
        """Make the kept versions part of a checkpoint."""
        if self.kept:
            self.workers.write_versions(str(folder))

    def read(self, folder: Path) -> None:
        """Keep what a checkpoint has, if it was written by as many workers."""
        if self.needed and folder.is_dir():
            self.kept = self.workers.read_versions(str(folder))[0]


class KeepingWorker(DetachActorWorker):
    """verl's worker that keeps copies of its shard, also of one that is in host memory already."""

    def _get_strategy_handlers(self) -> tuple[Any, Any]:
        save, restore = super()._get_strategy_handlers()

        def copy(module: Any) -> Any:
            # `.cpu()` there is the tensor that the next update changes (docs/upstream/verl-async.md).
            if any(parameter.device.type != "cpu" for parameter in module.parameters()):
                return save(module)
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, save(module))

        return copy, restore

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_versions(self, folder: str) -> None:
        kept = {
            int(name): [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
            for name, state in self.cpu_saved_models.items()
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(kept, self._file(folder))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def read_versions(self, folder: str) -> list[int]:
        if not self._file(folder).exists():
            return []
        self.cpu_saved_models = {}
        for version, tensors in torch.load(self._file(folder), weights_only=True).items():
            leaves, form = tree_flatten(self.copy_handler(self.actor.engine.module))
            shards = iter(tensors)
            state = [next(shards) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self.cpu_saved_models[str(version)] = tree_unflatten(state, form)
        return sorted(map(int, self.cpu_saved_models))

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"rank_{self.rank}_of_{self.world_size}.pt"
