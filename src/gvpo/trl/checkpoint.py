"""Checkpoints that are whole or not there, and what they hold besides transformers' files.

transformers writes a checkpoint file by file into its final folder, so that a run killed meanwhile leaves a
torn one that looks like the last. Here it is written aside, listed, synced to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

ASIDE = ".checkpoint-in-progress"
_LIST = "gvpo_checkpoint.json"


class Stateful(Protocol):
    """A part of a trainer with something to remember."""

    def begin(self) -> None:
        """A new run: what belongs to the last one is forgotten (by default, nothing does)."""
        return

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """JSON values; what is large goes into the checkpoint's `folder`."""

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Go on from there; `state` is empty if the checkpoint does not know this part."""


def clear(aside: Path) -> None:
    """An empty folder to write a checkpoint in: what a run left there that was killed goes."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def publish(written: Path, final: Path) -> None:
    """List a finished checkpoint's files with their sizes, bring all of it to the disk, and rename it."""
    files = sorted(path for path in written.rglob("*") if path.is_file() and path.name != _LIST)
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in files}
    (written / _LIST).write_text(json.dumps({"written": time.time(), "files": sizes}, indent=1))
    for path in (*files, written / _LIST, *(p for p in written.rglob("*") if p.is_dir()), written):
        _sync(path)
    if final.exists():  # the same step again, of a run that was resumed from an earlier one
        os.replace(final, written.with_name("replaced"))
    os.replace(written, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_failure(error: Exception) -> bool:
    """Whether it is the disk that failed: safetensors and torch have errors of their own for that."""
    from_torch = isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    )
    return isinstance(error, OSError | SafetensorError) or from_torch


def flaw(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None. Without a list it is TRL's; the trainer state comes last."""
    listing = folder / _LIST
    try:
        if not listing.exists():
            json.loads((folder / "trainer_state.json").read_text())
            return None
        for name, size in json.loads(listing.read_text())["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is not the {size} bytes that were written"
    except (OSError, ValueError, KeyError) as error:
        return f"its list of files cannot be read ({error})"
    return None


def _oldest_first(output_dir: str | Path) -> list[Path]:
    """A run's checkpoints as they were written: one that was resumed from an earlier one leaves later steps.

    Those of which that is not known (of TRL, say) come before, by their steps.
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and folder.is_dir():
            written = 0.0
            with suppress(OSError, ValueError, KeyError):
                written = float(json.loads((folder / _LIST).read_text())["written"])
            found.append((written, int(step), folder))
    return [folder for _, _, folder in sorted(found)]


def rotate(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but neither the newest nor the `best`."""
    folders = _oldest_first(output_dir)
    if not limit or limit < 0 or not folders:
        return
    deletable = [folder for folder in folders[:-1] if best is None or folder != Path(best)]
    least = len(folders) - len(deletable)
    for folder in deletable[: len(folders) - max(limit, least)]:
        shutil.rmtree(folder, ignore_errors=True)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The whole checkpoint written last in a run's directory; a warning for each torn one that is newer."""
    for folder in reversed(_oldest_first(output_dir)):
        why = flaw(folder)
        if why is None:
            return str(folder)
        warnings.warn(f"{folder} is torn ({why}): the checkpoint before it is used.", stacklevel=2)
    return None


class EpochSampler(Sampler[int]):
    """TRL's sampler, whose order is drawn anew for each epoch from seed + epoch.

    TRL draws each epoch's order from where the last epoch left its generator, so that a run resumed in a
    later epoch would see the first epoch's order again.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders before each epoch."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
