"""TRL's trainer, with checkpoints from which a run goes on as if it had never been stopped."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import GRPOTrainer

from gvpo.errors import InputError
from gvpo.trl import checkpoint
from gvpo.trl.rollouts import Slice, load_rollouts, save_rollouts


@contextmanager
def temporarily(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    vars(target).update(values)
    try:
        yield
    finally:
        vars(target).update(before)


class ResumableTrainer(GRPOTrainer):
    """A `GRPOTrainer` of which a killed run ends, resumed, as if it had not been killed.

    Attributes:
        checkpointed: what else has a state to keep, by name; the trainer's own counters and the slices in
            `_buffered_inputs` are kept anyhow.
    """

    _buffered_inputs: list[Slice] | None  # TRL's own, of no declared type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.checkpointed: dict[str, checkpoint.Stateful] = {}
        self._sampler: checkpoint.EpochSampler | None = None
        self._aside: Path | None = None
        super().__init__(*args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; True resumes from the newest whole checkpoint in `output_dir`.

        Raises:
            InputError: there is none, or the one that was named is torn.
        """
        # Nothing of an earlier call, which may have been interrupted, belongs to this run.
        self._step, self._buffered_inputs = 0, None
        self._metrics["train"].clear()
        self._last_loaded_step = -1  # vLLM has the weights of that call's last generation
        if not resume_from_checkpoint:
            for part in self.checkpointed.values():
                part.begin()
        if isinstance(resume_from_checkpoint, Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint.last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} has no whole checkpoint to go on from.")
        if isinstance(resume_from_checkpoint, str):
            if why := checkpoint.flaw(Path(resume_from_checkpoint)):
                raise InputError(f"The checkpoint {resume_from_checkpoint} is torn ({why}): take another.")
            if self._is_done(Path(resume_from_checkpoint)):
                return self._load_done(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _is_done(self, folder: Path) -> bool:
        """Whether the run has made all its steps: transformers would make another one."""
        saved = json.loads((folder / "trainer_state.json").read_text())
        if self.args.max_steps > 0:
            return bool(saved["global_step"] >= self.args.max_steps)
        ended = saved["global_step"] >= saved["max_steps"]
        return bool(ended and saved["num_train_epochs"] >= self.args.num_train_epochs)

    def _load_done(self, folder: str) -> TrainOutput:
        self._load_from_checkpoint(folder)
        self.state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
        self.create_optimizer_and_scheduler(self.state.max_steps)
        self._load_optimizer_and_scheduler(folder)
        if self.args.should_save:  # what a kill in the last moments of the last checkpoint left
            home = Path(self._get_output_dir(None))
            shutil.rmtree(home / checkpoint.ASIDE, ignore_errors=True)
            checkpoint.rotate(home, self.args.save_total_limit, self.state.best_model_checkpoint)
        return TrainOutput(self.state.global_step, 0.0, {})

    def _get_train_sampler(self, *args: Any) -> Any:
        self._sampler = checkpoint.EpochSampler(super()._get_train_sampler(*args), self.args.seed)
        return self._sampler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home, main = Path(self._get_output_dir(trial)), self.args.should_save
        final = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = home / checkpoint.ASIDE
        with (
            temporarily(self, _aside=aside),
            temporarily(self.args, push_to_hub=False, save_total_limit=None),
        ):
            try:
                self._together(home, lambda: checkpoint.clear(aside) if main else None)
                self._together(home, lambda: self._write(aside / final.name, model, trial))
                self._together(home, lambda: self._publish(aside / final.name, final) if main else None)
            finally:
                if main:
                    shutil.rmtree(aside, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if main:
            checkpoint.rotate(home, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _together(self, home: Path, work: Callable[[], None]) -> None:
        """Do `work`; if it fails on one process, all of them stop."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # whatever it is, the others must not wait for this process
            failure = error
        mine = 0 if failure is None else 1 if checkpoint.is_disk_failure(failure) else 2
        worst = int(self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device)).max())
        if worst == 0:
            return
        if failure is not None and mine == 2:
            raise failure
        advice = "make room or choose another output_dir" if worst == 1 else "look at the other's message"
        raise InputError(
            f"The checkpoint of step {self.state.global_step} cannot be written to {home} "
            f"({failure or 'another process failed'}): {advice}; the last whole checkpoint is "
            f"{checkpoint.last_checkpoint(home) or 'none'}."
        ) from failure

    def _write(self, folder: Path, model: nn.Module, trial: Any) -> None:
        state = {
            "layout": self._layout(),
            "parts": {name: part.state_dict(folder) for name, part in self.checkpointed.items()},
            "micro_step": self._step,
            "metrics": dict(self._metrics["train"]),
            "train_tokens": self._total_train_tokens,
        }
        save_rollouts(self._own(folder), self._buffered_inputs or [], state)
        super()._save_checkpoint(model, trial)

    def _publish(self, written: Path, final: Path) -> None:
        if self.state.best_global_step:
            best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best.exists() or best == final:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(written / "trainer_state.json"))
        checkpoint.publish(written, final)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if self.args.device.type == "cpu":
            # accelerate calls it cpu:0 for several processes, to which torch cannot load an optimizer.
            self.args._setup_devices = torch.device("cpu")
        super()._load_optimizer_and_scheduler(folder)
        if folder is None:
            return
        if self._sampler is not None and self.state.epoch is not None:
            # accelerate's loader that skips what was seen does not pass the epoch on between processes.
            self._sampler.set_epoch(int(self.state.epoch))
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        path = self._own(Path(folder))
        slices, state = load_rollouts(path, self.accelerator.device) if path.exists() else ([], {})
        for name, part in self.checkpointed.items():
            part.load_state_dict(state.get("parts", {}).get(name, {}), path.parent)
        lost = None
        if "steps" not in state:
            lost = f"{path} is {'of another version of gvpo' if state else 'not there'}"
        elif state["layout"] != self._layout():
            lost = f"the run was started with {state['layout']}, not {self._layout()}"
        if lost is not None:
            warnings.warn(
                f"The rollouts in flight were not restored ({lost}): new ones are made.", stacklevel=2
            )
            return
        self._buffered_inputs = slices or None
        self._step = state["micro_step"]
        self._total_train_tokens = state["train_tokens"]
        for name, values in state["metrics"].items():
            self._metrics["train"][name].extend(values)

    def _own(self, folder: Path) -> Path:
        return folder / f"gvpo_rollouts_{self.accelerator.process_index}.safetensors"

    def _layout(self) -> dict[str, int]:
        """What the buffered slices depend on."""
        names = ("per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations")
        return {"processes": self.accelerator.num_processes} | {n: getattr(self.args, n) for n in names}
