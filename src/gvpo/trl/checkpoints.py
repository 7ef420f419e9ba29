"""Checkpoints that are whole or not there, and that hold the rollouts in flight.

transformers writes a checkpoint file by file into its final folder, so that a run killed meanwhile leaves a
torn one that looks like the last. Here it is written aside, listed, synced to the disk and renamed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from trl import GRPOTrainer

from gvpo.errors import InputError
from gvpo.trl.rollouts import Slice, load_rollouts, save_rollouts
from gvpo.trl.sampler import EpochSampler

if TYPE_CHECKING:
    from gvpo.trl.health import Health
    from gvpo.trl.memory import Portions
    from gvpo.trl.offpolicy import OffPolicy

_LIST = "gvpo_checkpoint.json"
_ASIDE = ".checkpoint-in-progress"


def seal(folder: Path) -> None:
    """List a finished checkpoint's files with their sizes, and bring all of it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _LIST)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / _LIST).write_text(json.dumps({"files": sizes}, indent=1))
    for path in (*files, folder / _LIST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)


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


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a run's directory, with a warning for each torn one that is newer."""
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and folder.is_dir():
            found.append((int(step), folder))
    for _, folder in sorted(found, reverse=True):
        why = flaw(folder)
        if why is None:
            return str(folder)
        warnings.warn(f"{folder} is torn ({why}): the checkpoint before it is used.", stacklevel=2)
    return None


class Checkpoints(GRPOTrainer):
    """The part of `GVPOTrainer` that saves and loads."""

    _buffered_inputs: list[Slice] | None
    _aside: Path | None = None
    _sampler: EpochSampler | None = None
    _token_cap: float
    _portions: Portions
    off_policy: OffPolicy
    health: Health

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; True resumes from the newest whole checkpoint in `output_dir`.

        Raises:
            InputError: there is none, or the one that was named is torn.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} has no whole checkpoint to go on from.")
        elif isinstance(resume_from_checkpoint, str) and (why := flaw(Path(resume_from_checkpoint))):
            raise InputError(f"The checkpoint {resume_from_checkpoint} is torn ({why}): take another.")
        if isinstance(resume_from_checkpoint, str) and self._is_done(Path(resume_from_checkpoint)):
            return self._load_done(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_done(self, checkpoint: Path) -> bool:
        """Whether the run has made all its steps: transformers would make another one."""
        saved = json.loads((checkpoint / "trainer_state.json").read_text())
        if self.args.max_steps > 0:
            return bool(saved["global_step"] >= self.args.max_steps)
        ended = saved["global_step"] >= saved["max_steps"]
        return bool(ended and saved["num_train_epochs"] >= self.args.num_train_epochs)

    def _load_done(self, checkpoint: str) -> TrainOutput:
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        self.create_optimizer_and_scheduler(self.state.max_steps)
        self._load_optimizer_and_scheduler(checkpoint)
        return TrainOutput(self.state.global_step, 0.0, {})

    def _get_train_sampler(self, *args: Any) -> Any:
        self._sampler = EpochSampler(super()._get_train_sampler(*args), self.args.seed)
        return self._sampler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home = Path(super()._get_output_dir(trial))
        final = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with self._writing_aside(home) as aside:
                self._write(aside / final.name, model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(aside / final.name, final)
        except (OSError, SafetensorError, RuntimeError) as error:
            last = last_checkpoint(home)
            raise InputError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {home} ({error}): "
                f"make room or choose another output_dir; the last whole checkpoint is {last or 'none'}."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                str(home), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )

    @contextmanager
    def _writing_aside(self, home: Path) -> Iterator[Path]:
        aside = home / _ASIDE
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while it wrote
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        before = self.args.push_to_hub, self.args.save_total_limit
        self._aside, self.args.push_to_hub, self.args.save_total_limit = aside, False, None
        try:
            yield aside
        finally:
            self._aside = None
            self.args.push_to_hub, self.args.save_total_limit = before
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    def _write(self, folder: Path, model: nn.Module, trial: Any) -> None:
        state = {
            "micro_step": self._step,
            "metrics": dict(self._metrics["train"]),
            "train_tokens": self._total_train_tokens,
            "layout": self._layout(),
            "token_cap": None if math.isinf(self._token_cap) else self._token_cap,
            "portions": None if math.isinf(self._portions.most) else self._portions.most,
            "bad_steps": self.health.bad_steps,
            "off_policy": self.off_policy.state(),
        }
        self.off_policy.save(folder)
        save_rollouts(self._rollout_file(folder), self._buffered_inputs or [], state)
        super()._save_checkpoint(model, trial)

    def _publish(self, written: Path, final: Path) -> None:
        if self.state.best_global_step:
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best.exists() or best == final:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(written / "trainer_state.json"))
        seal(written)
        if final.exists():  # the same step again, of a run that was resumed from an earlier one
            os.replace(final, written.with_name("replaced"))
        os.replace(written, final)
        _sync(final.parent)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":
            # accelerate calls it cpu:0 for several processes, to which torch cannot load an optimizer.
            self.args._setup_devices = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            self.off_policy.begin(None)
            return
        if self._sampler is not None and self.state.epoch is not None:
            # accelerate's loader that skips what was seen does not pass the epoch on between processes.
            self._sampler.set_epoch(int(self.state.epoch))
        path = self._rollout_file(Path(checkpoint))
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if not path.exists():
            self.off_policy.begin(Path(checkpoint))
            self._warn_of_lost_rollouts(f"{path.name} is not in {checkpoint}")
            return
        slices, state = load_rollouts(path, self.accelerator.device)
        self.off_policy.begin(Path(checkpoint), state.get("off_policy"))
        if state["layout"] != self._layout():
            self._warn_of_lost_rollouts(f"the run was started with {state['layout']}, not {self._layout()}")
            return
        self._step = state["micro_step"]
        self._total_train_tokens = state["train_tokens"]
        self._token_cap = math.inf if state["token_cap"] is None else state["token_cap"]
        self._portions.most = math.inf if state.get("portions") is None else state["portions"]
        self.health.bad_steps = state["bad_steps"]
        self._buffered_inputs = slices or None
        for name, values in state["metrics"].items():
            self._metrics["train"][name].extend(values)

    def _warn_of_lost_rollouts(self, why: str) -> None:
        warnings.warn(f"The rollouts in flight were not restored ({why}): new ones are made.", stacklevel=2)

    def _rollout_file(self, folder: Path) -> Path:
        return folder / f"gvpo_rollouts_{self.accelerator.process_index}.safetensors"

    def _layout(self) -> dict[str, int]:
        """What the buffered slices depend on."""
        return {
            "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
            "num_generations": self.num_generations,
        }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
