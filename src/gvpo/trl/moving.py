"""A reference that follows the policy every N updates.

It is a copy of what is trained, which takes the parameters' place while it scores: all of the model or an
adapter of any kind, DDP or FSDP2. TRL's `sync_ref_model` keeps a second model, refuses adapters, and forgets
the reference when a run is resumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from gvpo.errors import InputError


class MovingReference(TrainerCallback):
    """The policy as it was after the last update whose number `every` divides.

    Args:
        every: updates.
        model: gives the policy, wrapped as it is trained.
        rank: of this process.

    Attributes:
        step: number of updates that the policy had made then; None before training.
    """

    def __init__(self, every: int, model: Callable[[], nn.Module], rank: int) -> None:
        self.every, self.model, self.rank = every, model, rank
        self.begin()

    def begin(self) -> None:
        """A new run."""
        self.step: int | None = None
        self._copy: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is None:
            self.follow(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.follow(state.global_step)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Be the policy as it is, which has made `step` updates."""
        self._copy, self.step = [own.clone() for own in self._parameters()], step

    @contextmanager
    def in_place(self, step: int) -> Iterator[None]:
        """The model is the reference within this context, and again the policy (of `step`) after it."""
        if self.step in (None, step):
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for own, held in zip(self._parameters(), self._copy, strict=True):
            before = own.clone()
            own.copy_(held)
            held.copy_(before)

    def _parameters(self) -> list[Tensor]:
        """The trained parameters, of shards this process's own."""
        model = self.model()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or the next forward would go on with what the last one gathered
        trained = [p for p in model.parameters() if p.requires_grad]
        return [p.to_local() if isinstance(p, DTensor) else p.data for p in trained]

    # --------------------------------------------------------------------------------------- checkpoints

    def _file(self, folder: Path) -> Path:
        sharded = any(isinstance(p, DTensor) for p in self.model().parameters())
        return folder / f"gvpo_reference_{self.rank if sharded else 0}.safetensors"

    def state_dict(self, folder: Path) -> dict[str, Any]:
        file = self._file(folder)
        if file.stem.endswith(f"_{self.rank}"):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({str(i): held.contiguous() for i, held in enumerate(self._copy)}, file)
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        self.begin()
        if "step" not in state:
            warnings.warn(f"{folder} has no moving reference: it is the policy as it is there.", stacklevel=2)
            return
        file, own = self._file(folder), self._parameters()
        saved = load_file(file) if file.exists() else {}
        if [value.shape for value in own] != [saved[str(i)].shape for i in range(len(saved))]:
            raise InputError(
                f"The reference in {folder} is not of this model, or of another number of shards: resume "
                "with as many processes as before."
            )
        self._copy = [saved[str(i)].to(value) for i, value in enumerate(own)]
        self.step = state["step"]
