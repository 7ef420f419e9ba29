"""The process that generates ahead (`gvpo.trl.ahead`): a `GVPOTrainer` that samples and never trains.

    python -m gvpo.trl.producer FOLDER PID    # started by the trainer, whose process PID is

It reads requests, a line of JSON each, and answers each with a line once the groups are in the store. It ends
with the trainer, however that ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from gvpo.errors import InputError, first_line
from gvpo.replay.buffer import ReplayBuffer
from gvpo.replay.group import Group
from gvpo.replay.tokens import fingerprint
from gvpo.trl.ahead import RECIPE, receive
from gvpo.trl.offpolicy import Offline, unrewarded
from gvpo.trl.trainer import GVPOTrainer


class Producer:
    """Samples rollouts as they are asked for, in the folder where the trainer and this process meet."""

    def __init__(self, folder: Path) -> None:
        recipe = torch.load(folder / RECIPE, map_location="cpu", weights_only=False)
        args = recipe["args"]
        args.device  # noqa: B018  (sets up what transformers shares in a process)
        self.k, self.count = args.num_generations, args.prompts_per_generation
        self.trainer = trainer = GVPOTrainer(
            reward_funcs=[unrewarded],
            args=args,
            train_dataset=Offline.dataset(self.count),
            **recipe["given"],
        )
        # As in training: on its device, and cast as it is there.
        trainer.model = trainer.model_wrapped = trainer.accelerator.prepare_model(
            trainer.model, evaluation_mode=True
        )
        trainer.model.train()
        processor: Any = trainer.processing_class
        self.buffer = ReplayBuffer(
            folder / "groups",
            tokenizer=fingerprint(getattr(processor, "tokenizer", processor)),
            group_size=self.k,
            capacity=recipe["capacity"],
        )
        self.version: int | None = None
        self.made: dict[int, int] = {}

    def keep(self, wanted: list[list[int]]) -> None:
        """Of what is in the store keep these rollouts, given by number and version."""
        groups = self.buffer.read(range(len(self.buffer)))
        self.buffer.clear()
        for number, version in wanted:
            its = [g for g in groups if (g.metadata["rollout"], g.policy_step) == (number, version)]
            if len(its) == self.count:
                self._store(number, its)

    def make(self, request: dict[str, Any]) -> int:
        """The rollout of a request; its first group's number in the store."""
        number, version, trainer = request["number"], request["version"], self.trainer
        if number not in self.made:
            if version != self.version:
                receive(trainer.accelerator.unwrap_model(trainer.model), Path(request["weights"]))
                self.version = trainer.state.global_step = version  # by which TRL knows what vLLM has
            set_seed(seed_of(trainer.args.seed, number))
            prompts, completions, logps = trainer.sampled(request["prompts"])
            rows = [slice(first, first + self.k) for first in range(0, len(prompts), self.k)]
            groups = [
                Group.of(
                    prompts[its.start],
                    completions[its],
                    [0.0] * self.k,  # given by the trainer
                    reference=f"step {version}",
                    reference_logps=logps[its].tolist(),
                    valid=[bool(ids) for ids in completions[its]],
                    policy_step=version,
                    metadata={"rollout": number},
                )
                for its in rows
            ]
            self._store(number, groups)
        return self.made.pop(number)

    def _store(self, number: int, groups: list[Group]) -> None:
        self.made[number] = self.buffer.next_number
        self.buffer.append(groups)


def seed_of(seed: int, number: int) -> int:
    """By which a rollout is sampled, whatever came before it."""
    return (seed * 1_000_003 + number) % 2**32


def main(folder: Path, trainer: int) -> None:
    """Serve the trainer of this process number until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    for watch in (lambda: _read(requests), lambda: _end_with(trainer)):
        threading.Thread(target=watch, daemon=True).start()
    try:
        first = requests.get()
        torch.set_num_threads(first["threads"])
        producer = Producer(folder)
        producer.keep(first["keep"])
        while True:
            request = requests.get()
            answers.write(json.dumps({"number": request["number"], "first": producer.make(request)}) + "\n")
    except Exception as error:
        what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
        what = f"The process that generates ahead failed ({what}): see {folder / 'producer.log'}."
        answers.write(json.dumps({"error": what}) + "\n")
        raise


def _read(requests: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


def _end_with(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(0.5)
    os._exit(0)  # killed: its end of the pipe may be held by other processes of its


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
