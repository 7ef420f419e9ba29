"""Generation that runs ahead of the update: another process samples while this one learns.

Rollout n is sampled by the policy as it was when rollout n − `generate_ahead` was taken. How stale it is, is
a setting and no accident of the machine's speed: a run is the same however fast its processes are, and one
that was killed goes on as if it had not been. The other process (`gvpo.trl.producer`) appends whole groups to
a store of its own; prompts come from here, and rewards are given here.

    ahead/weights/step-12.safetensors    what is trained, as it was after 12 updates
    ahead/groups/                        the store: groups whose rewards are not given yet
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl.trainer.utils import RepeatSampler

from gvpo.errors import InputError, first_line, refused
from gvpo.replay.group import Group
from gvpo.replay.store import GroupStore
from gvpo.run import replaced
from gvpo.trl.checkpoint import EpochSampler, last_checkpoint

RECIPE = "producer.pt"
_KEPT = ("model", "processing_class", "quantization_config", "peft_config")
# It has neither references nor rewards, and writes nothing of a trainer.
_OWN: dict[str, Any] = {
    "generate_ahead": 0, "reference": "rollout", "reference_every": None, "gradient_checkpointing": False,
    "demonstrations_per_group": 0, "replay_ratio": 0.0, "dynamic_sampling": "none", "report_to": [],
    "eval_strategy": "no", "push_to_hub": False, "hub_token": None, "log_completions": False,
    "reward_weights": None,
}  # fmt: skip
_SAVED = "gvpo_ahead"  # in a checkpoint: weights by which rollouts in flight are sampled
_OF_RANKS = (  # what their variables begin with
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_",
    "ACCELERATE_", "FSDP_", "TORCHELASTIC_",
)  # fmt: skip


@dataclass
class AheadConfig:
    """Generation that runs ahead; see docs/engines/trl.md#generation-that-runs-ahead.

    Args:
        generate_ahead: rollouts that another process samples ahead of the update: rollout n by the policy as
            it was when rollout n − generate_ahead was taken. 0: the trainer samples for itself.
        generate_ahead_devices: CUDA_VISIBLE_DEVICES of that process. Default: as here.
    """

    generate_ahead: int = 0
    generate_ahead_devices: str | None = None


def check_ahead(args: Any) -> None:
    """Raise an InputError for options that exclude each other."""
    if not args.generate_ahead:
        if args.generate_ahead_devices is not None:
            raise InputError("generate_ahead_devices are for generate_ahead: set that, too.")
        return
    reasons = {
        "offline": args.offline is not None and "nothing is sampled",
        "trust": args.trust is not None and "how likely each token was when it was sampled is not kept",
        "dynamic_sampling='resample' or thresholds": args.chooses_prompts
        and "they choose prompts by rewards that are not there yet",
        "demonstrations_per_group": args.demonstrations_per_group > 0
        and args.reference == "rollout"
        and "demonstrations would need the reference of a policy that is gone: use 'initial' or 'moving'",
    }
    for name, reason in reasons.items():
        if reason:
            raise InputError(f"generate_ahead does not go with {name}: {reason}.")


def check_trainer(trainer: Any) -> None:
    """Raise an InputError for what a trainer was given that the other process cannot do."""
    for name in ("tools", "environments", "rollout_func"):
        if getattr(trainer, name, None):
            raise InputError(f"generate_ahead does not go with {name}: it runs in the trainer's process.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError("generate_ahead needs the trained parameters whole: use DDP, not shards.")
    if isinstance(trainer.train_dataset, IterableDataset):
        raise InputError(
            "generate_ahead asks prompts before their turn: give a data set with a length, no stream."
        )


def write_recipe(args: Any, given: Mapping[str, Any]) -> None:
    """Keep what a trainer was given by name, for the other process to make its own of: before TRL has it.

    Raises:
        InputError: something that cannot be given to another process.
    """
    own = copy.copy(args)
    vars(own).pop("_setup_devices", None)  # of this process
    vars(own).update(_OWN, output_dir=str(folder_of(args)), distributed_state=None)
    kept = {name: given[name] for name in _KEPT if given.get(name) is not None}
    capacity = (args.generate_ahead + 2) * args.prompts_per_generation
    path = folder_of(args) / RECIPE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an earlier run's
    what = "generate_ahead gives model and tokenizer to another process, which cannot be done here"
    advice = "give the model's name, or a class that a module has"
    with refused(what, advice, (pickle.PicklingError, AttributeError, TypeError)), replaced(path) as aside:
        torch.save({"args": own, "given": kept, "capacity": capacity}, aside)


def publish(model: nn.Module, path: Path) -> None:
    """Write what is trained; the file appears whole."""
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with replaced(path) as aside:
        save_file(trained, aside)


@torch.no_grad()
def receive(model: nn.Module, path: Path) -> None:
    """Take over what `publish` wrote, of a model that was made in the same way."""
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = load_file(path)
    if {name: p.shape for name, p in held.items()} != {name: v.shape for name, v in values.items()}:
        raise InputError("The model of the process that generates ahead is not the trainer's.")
    for name, value in values.items():
        held[name].copy_(value)


class Ahead:
    """The trainer's side: asks for rollouts, and has their groups.

    Args:
        model: the policy, not wrapped.
        total: gives the number of rollouts of the whole run.
        rank: of this process; the first one asks for all.

    Attributes:
        ahead: rollouts that are made ahead.
        version: updates that the policy had made which sampled the rollout at hand.
    """

    def __init__(
        self, args: Any, dataset: Any, model: nn.Module, total: Callable[[], int], rank: int
    ) -> None:
        self.args, self.dataset, self.model, self.total, self.rank = args, dataset, model, total, rank
        self.ahead, self.k = args.generate_ahead, args.num_generations
        self.count = args.prompts_per_generation
        self.folder = folder_of(args)
        self.version = 0
        self._child: Any = None  # the other process, while it runs
        self._order: tuple[int, list[int]] = (-1, [])  # of an epoch
        self._groups: list[Group] = []  # of the rollout at hand
        self.begin()

    def begin(self) -> None:
        """A new run."""
        self._requests: dict[int, int] = {}  # rollouts that are not taken yet, and their versions
        if self.rank == 0:
            shutil.rmtree(self.folder / "weights", ignore_errors=True)

    # ------------------------------------------------------------------------------------------- rollouts

    def take(self, number: int, step: int) -> None:
        """Have the groups of a rollout, and others made meanwhile by the policy of now, of `step` updates.

        Raises:
            InputError: the other process has ended, or found that it cannot do its work; or the disk is full.
        """
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [self._wait(number, step)]
            except InputError as error:
                outcome = [str(error)]
            except (OSError, SafetensorError) as error:
                outcome = [
                    f"Weights cannot be written to {self.folder} ({first_line(error)}): make room there."
                ]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], str):
            raise InputError(outcome[0])
        first, self.version = outcome[0]
        with GroupStore(self.folder / "groups", memory=0) as store:
            numbers = store.records["number"]
            self._groups = store.read(np.flatnonzero((numbers >= first) & (numbers < first + self.count)))

    def sample(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        """The completions of this process's rows of the rollout at hand, as TRL's methods give them."""
        first, found = self.rank * len(prompt_ids), []
        for row, ids in enumerate(prompt_ids, first):
            group = self._groups[row // self.k]
            if group.prompt_ids.tolist() != list(ids):
                raise InputError(
                    f"Row {row} of a rollout answers another prompt than the data set has there: its order, "
                    "or the chat template, is not what generate_ahead was told."
                )
            found.append(group.completions[row % self.k].tolist())
        return found, None

    def reference_logps(self, rows: int) -> Float[Tensor, "rows"]:
        """S' of this process's rows under the policy that sampled them."""
        logps = [g.reference_logps for g in self._groups if g.reference_logps is not None]
        return torch.from_numpy(np.concatenate(logps)[self.rank * rows : (self.rank + 1) * rows])

    def _wait(self, number: int, step: int) -> tuple[int, int]:
        """A rollout's first group in the store, and its version."""
        if self._child is None:
            self._start()
        for n in range(number, max(number + 1, min(number + self.ahead + 1, self.total()))):
            if n not in self._requests:
                if not self._weights(step).exists():
                    self._weights(step).parent.mkdir(parents=True, exist_ok=True)
                    publish(self.model, self._weights(step))
                self._requests[n] = step
                self._ask(n)
        while number not in self._made:
            line = self._child.stdout.readline()
            if not line:
                raise InputError(self._why_ended())
            message = json.loads(line)
            if "error" in message:
                raise InputError(message["error"])
            self._made[message["number"]] = message["first"]
        version = self._requests.pop(number)
        needed = {self._weights(v) for v in self._requests.values()}
        for path in set(self.folder.glob("weights/*")) - needed:
            path.unlink()
        return self._made.pop(number), version

    def _prompts(self, number: int) -> list[Any]:
        """What a rollout asks, in the order of TRL's sampler."""
        epoch, place = divmod(number, len(self.dataset) // self.count)
        if epoch != self._order[0]:
            shuffle, seed = self.args.shuffle_dataset is not False, self.args.seed
            order = RepeatSampler(self.dataset, 1, self.count, shuffle=shuffle, seed=seed)
            sampler = EpochSampler(order, seed)
            sampler.set_epoch(epoch)
            self._order = epoch, list(sampler)
        asked = self._order[1][place * self.count : (place + 1) * self.count]
        return [self.dataset[index]["prompt"] for index in asked]

    # -------------------------------------------------------------------------------------- other process

    def _start(self) -> None:
        """Start the process that samples, and ask it for what is in flight."""
        environment = {k: value for k, value in os.environ.items() if not k.startswith(_OF_RANKS)}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        if self.args.generate_ahead_devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.args.generate_ahead_devices
        command = [sys.executable, "-m", "gvpo.trl.producer", str(self.folder), str(os.getpid())]
        with (self.folder / "producer.log").open("w") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C is for the trainer, which ends this process
            )
        self._made: dict[int, int] = {}  # rollouts, and the numbers of their first groups in the store
        self._tell({"keep": list(self._requests.items()), "threads": torch.get_num_threads()})
        for number in self._requests:
            self._ask(number)

    def _ask(self, number: int) -> None:
        request = {"number": number, "version": self._requests[number], "prompts": self._prompts(number)}
        self._tell(request | {"weights": str(self._weights(self._requests[number]))})

    def _tell(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # it has ended: why, is told where it is waited for
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

    def _why_ended(self) -> str:
        code = self._child.wait()
        why = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        checkpoint = last_checkpoint(self.args.output_dir)
        where = f"go on from {checkpoint}" if checkpoint else "begin again: there is no checkpoint yet"
        return f"The process that generates ahead ended {why} (see {self.folder / 'producer.log'}): {where}."

    def stop(self) -> None:
        """End the other process."""
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
        with suppress(OSError), child:  # closes its pipes, though what was left to say is not heard any more
            pass

    # --------------------------------------------------------------------------------------- checkpoints

    def _weights(self, version: int) -> Path:
        return self.folder / "weights" / f"step-{version}.safetensors"

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Rollouts in flight. Those that are made stay in the store; the others need weights."""
        saved = folder / _SAVED
        for path in {self._weights(version) for version in self._requests.values()}:
            saved.mkdir(parents=True, exist_ok=True)
            _link(path, saved / path.name)
        requests = {str(number): version for number, version in self._requests.items()}
        return {"requests": requests, "layout": self._layout()}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        self.begin()
        if self.rank != 0 or state.get("layout") != self._layout():
            return
        self._requests = {int(number): version for number, version in state["requests"].items()}
        for version in set(self._requests.values()):
            path = self._weights(version)
            path.parent.mkdir(parents=True, exist_ok=True)
            _link(folder / _SAVED / path.name, path)

    def _layout(self) -> list[int]:
        """What the number of a rollout depends on."""
        names = ("generation_batch_size", "num_generations", "steps_per_generation", "num_iterations")
        return [len(self.dataset), *(getattr(self.args, name) for name in names)]


def folder_of(args: Any) -> Path:
    """Where the two processes meet."""
    return Path(args.output_dir).absolute() / "ahead"


def _link(source: Path, target: Path) -> None:
    """The same file a second time, without its bytes where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
