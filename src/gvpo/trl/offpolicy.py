"""What `GVPOTrainer` does with responses that the current policy did not sample.

`OffPolicy` puts demonstrations into groups as they are generated, keeps groups and brings them back, and
makes batches of logged completions. The trainer calls it; all maths stays in `gvpo.step`.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainerCallback

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.replay.batches import batch_of, groups_of, rows_of
from gvpo.replay.buffer import ReplayBuffer
from gvpo.replay.demonstrations import Demonstrations
from gvpo.replay.group import Group
from gvpo.replay.offline import Logged, load_offline
from gvpo.replay.sampling import Weights
from gvpo.replay.tokens import Encoder, fingerprint
from gvpo.replay.view import rank_folder
from gvpo.trl.rollouts import Slice

if TYPE_CHECKING:
    from gvpo.trl.trainer import GVPOTrainer

_GROUP = "offline_group"  # column of the data set that stands for a logged group


def placeholder(args: Any, *others: Any, train_dataset: Any = None, **_: Any) -> Dataset:
    """Something for TRL's `__init__`, until the tokenizer is there to read logged completions with."""
    if others or train_dataset is not None:
        raise InputError(f"offline={args.offline} is the training data: give no train_dataset besides.")
    count = args.generation_batch_size // args.num_generations
    return Dataset.from_dict({"prompt": [""] * count, _GROUP: [0] * count})


def unrewarded(**_: Any) -> list[float]:
    """Stands for the reward functions that offline training does not need."""
    raise InputError("evaluation samples completions, and no reward function was given to rate them")


class OffPolicy(TrainerCallback):
    """The off-policy part of a trainer.

    Attributes:
        sampling: which groups are replayed: a name, or a function from `ReplayIndex` to weights.
        buffer: this process's replay buffer, if there is one.
        logged: the logged groups, if training is offline.
    """

    def __init__(self, trainer: GVPOTrainer) -> None:
        self.trainer, self.args = trainer, trainer.args
        args = self.args
        self.encoder = self._make_encoder()
        self.sampling: str | Weights = args.replay_sampling
        self.logged: Logged | None = None
        self.buffer: ReplayBuffer | None = None
        self.demonstrations: Demonstrations | None = None
        self._run = uuid.uuid4().hex[:8]  # steps of two runs are not the same policy
        self._due = 0.0  # replayed groups owed, as a ratio need not come out even
        self._first_numbers: dict[int, int] = {}  # policy step → number of its first group in the buffer
        self._placed: list[list[int] | None] = []  # demonstrations in the rows being generated
        if args.offline is not None:
            self.logged = self._load_logged(args.offline)
            trainer.train_dataset = self._logged_dataset()
        if args.demonstrations_per_group:
            self.demonstrations = self._make_demonstrations()
        if args.replay_ratio:
            self.buffer = self._open_buffer()
        trainer.add_callback(self)

    # -------------------------------------------------------------------------------------------- set-up

    def _make_encoder(self) -> Encoder:
        trainer, processor = self.trainer, self.trainer.processing_class
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        model = trainer.accelerator.unwrap_model(trainer.model)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        config = model.config.get_text_config()
        return Encoder(
            tokenizer,
            [*ends, tokenizer.eos_token_id],
            vocabulary_size=config.vocab_size,
            chat_template=getattr(trainer, "chat_template", None),
            chat_template_kwargs=self.args.chat_template_kwargs or {},
        )

    def _load_logged(self, source: str) -> Logged:
        args = self.args
        logged = load_offline(source, self.encoder, longest=args.max_completion_length)
        if logged.group_size > args.num_generations:
            raise InputError(
                f"{source} has groups of up to {logged.group_size} responses, but "
                f"num_generations={args.num_generations}: set it to {logged.group_size}."
            )
        self.stored_reference = logged.scored and args.replay_reference == "stored"
        if not self.stored_reference and args.reference != "initial":
            raise InputError(
                f"Offline training on {source} needs reference='initial': there is no rollout policy to be "
                "the reference, and the file has no reference_logps (or replay_reference is 'current')."
            )
        per_step = args.generation_batch_size // args.num_generations
        if len(logged.groups) < per_step:
            raise InputError(
                f"{source} has {len(logged.groups)} groups, fewer than the {per_step} that a batch takes: "
                "lower per_device_train_batch_size or steps_per_generation."
            )
        if logged.alone:
            warnings.warn(
                f"{source}: left out {logged.alone} prompts with a single completion.", stacklevel=4
            )
        return logged

    def _logged_dataset(self) -> Dataset:
        assert self.logged is not None
        n = len(self.logged.groups)
        return Dataset.from_dict({"prompt": [""] * n, _GROUP: list(range(n))})

    def _make_demonstrations(self) -> Demonstrations:
        args, trainer = self.args, self.trainer
        for name in ("rollout_func", "tools", "environments"):
            if getattr(trainer, name, None):
                raise InputError(
                    f"demonstrations_per_group does not go with {name}: completions are single turns."
                )
        demonstrations = Demonstrations(
            self.encoder,
            args.demonstrations_per_group,
            args.num_generations,
            args.demonstration_slots,
            args.demonstration_column,
            args.max_completion_length,
            args.seed,
        )
        dataset = trainer.train_dataset
        if not isinstance(dataset, IterableDataset):
            kept = [name for name in ("prompt", args.demonstration_column) if name in dataset.column_names]
            demonstrations.check(dataset.select_columns(kept))
        return demonstrations

    def _open_buffer(self) -> ReplayBuffer:
        args, accelerator = self.args, self.trainer.accelerator
        if args.replay_reference == "current" and args.reference == "rollout":
            warnings.warn(
                "replay_reference='current' with reference='rollout' re-anchors: each replayed group pulls "
                "away from the policy as it is, without end. With 15 replayed groups for each fresh "
                "one, accuracy ended between 65 % and 75 % where 'stored' reached 93 % to 97 %.",
                stacklevel=5,
            )
        return ReplayBuffer(
            rank_folder(self._folder(), accelerator.process_index),
            tokenizer=fingerprint(self.encoder.tokenizer),
            vocabulary_size=self.encoder.vocabulary_size,
            group_size=args.num_generations,
            capacity=-(-args.replay_capacity // accelerator.num_processes),
            max_age=args.replay_max_age,
            memory=args.replay_memory * 2**20,
            seed=args.seed + accelerator.process_index,
            checkpoints=args.output_dir,
        )

    def _folder(self) -> Path:
        given = self.args.replay_directory
        return Path(self.args.output_dir) / "replay" if given is None else Path(given)

    # ------------------------------------------------------------------------------------ demonstrations

    def place_demonstrations(self, inputs: Sequence[dict[str, Any]], first_group: int) -> None:
        """Decide which rows of this process's part of a generation are demonstrations."""
        self._placed = [None] * len(inputs)
        if self.demonstrations is None or not self.trainer.model.training:
            return
        k = self.args.num_generations
        first_row = self.trainer.accelerator.process_index * len(inputs)
        chosen: dict[int, dict[int, list[int]]] = {}
        for i, row in enumerate(inputs):
            group, slot = divmod(first_row + i, k)
            if group not in chosen:
                chosen[group] = self.demonstrations.chosen(row, first_group + group)
            self._placed[i] = chosen[group].get(slot)

    def generate(
        self, sample: Callable[..., Any], prompt_ids: list[list[int]], *others: Any, **kwargs: Any
    ) -> Any:
        """Completions of all rows: those that are not demonstrations by `sample`."""
        given = self._placed
        if not any(given):
            return sample(prompt_ids, *others, **kwargs)
        # vLLM wants every group whole. And at least one row: other processes may wait to share parameters.
        rows = [i for i, ids in enumerate(given) if ids is None] or [0]
        if self.args.use_vllm:
            rows = list(range(len(prompt_ids)))
        sampled, _ = sample([prompt_ids[i] for i in rows], *others, **kwargs)
        completions = dict(zip(rows, sampled, strict=True))
        completions |= {i: list(ids) for i, ids in enumerate(given) if ids is not None}
        return [completions[i] for i in range(len(given))], None

    def reward_demonstrations(self, rewards: Tensor, valid: Tensor) -> None:
        """Give demonstrations their reward, in place, and log what the sampled rows got without them."""
        if self.demonstrations is None or not self.trainer.model.training:
            return
        given = torch.tensor([ids is not None for ids in self._placed], device=rewards.device)
        if self.args.demonstration_reward is not None:
            rewards[given] = self.args.demonstration_reward
            valid[given] = True
        elif (given & ~valid).any():
            raise InputError(
                "The reward functions gave a demonstration no reward (None or NaN): set "
                "demonstration_reward, or leave it out."
            )
        sampled, shown = ~given & valid, given & valid
        sums = torch.stack([rewards[sampled].sum(), sampled.sum(), rewards[shown].sum(), shown.sum()]).float()
        r_sampled, n_sampled, r_shown, n_shown = self._sum(sums)
        if n_sampled:
            self._log("demonstrations/sampled_reward", r_sampled / n_sampled)
        if n_shown:
            self._log("demonstrations/reward", r_shown / n_shown)
        self._log("demonstrations/rows", n_shown)

    # -------------------------------------------------------------------------------------------- replay

    def store(self, slices: Sequence[Slice], components: Tensor | None) -> None:
        """Keep the groups of a generation, once they have their reference log-probs."""
        if self.buffer is None:
            return
        batch = GroupBatch.concatenate([item.batch for item in slices])
        step, n = slices[0].policy_step, len(batch)
        first_row = self.trainer.accelerator.process_index * n
        names = self.trainer.reward_func_names
        parts = (
            {}
            if components is None
            else dict(zip(names, components[first_row : first_row + n].T, strict=True))
        )
        name = "initial" if self.args.reference == "initial" else f"step {step}"
        self._first_numbers.setdefault(step, self.buffer.next_number)
        self.buffer.append(
            groups_of(
                batch,
                self.args.num_generations,
                reference=f"{name} of run {self._run}",
                policy_step=step,
                components={key: value.tolist() for key, value in parts.items()},
                demonstrations=[i for i, ids in enumerate(self._placed) if ids is not None],
            )
        )
        self.buffer.evict(step)

    def with_replay(self, batch: GroupBatch, slices: Sequence[Slice]) -> GroupBatch:
        """The batch of an optimizer step and its share of replayed groups."""
        if self.buffer is None:
            return batch
        step, k = self.trainer.state.global_step, self.args.num_generations
        self._due += self.args.replay_ratio * len(batch) / k
        count = int(self._due)
        self._due -= count
        oldest = min(item.policy_step for item in slices)
        self._first_numbers = {s: n for s, n in self._first_numbers.items() if s >= oldest}
        mark = min(self._first_numbers.values(), default=self.buffer.next_number)
        groups = self.buffer.sample(count, sampling=self.sampling, step=step, before_number=mark)
        self._log_replay(groups, step)
        world, rank = self.trainer.accelerator.num_processes, self.trainer.accelerator.process_index
        ids = [-1 - rank - world * i for i in range(len(groups))]  # fresh groups count from 0
        replayed = batch_of(groups, ids, batch.input_ids.device)
        if self.args.replay_reference == "stored":
            if replayed.reference_logps is None and len(groups):
                raise InputError(
                    f"A group in {self._folder()} was stored without reference log-probabilities: use "
                    "replay_reference='current'."
                )
        elif self.args.reference == "rollout":
            replayed = replayed.freed()
        else:
            replayed.reference_logps = self.trainer._score_reference(replayed)
        # Also without any groups: all processes must take the same way.
        if replayed.reference_logps is None:
            replayed = replayed.freed()
        fresh = batch if batch.reference_logps is not None else batch.freed()
        return GroupBatch.concatenate([fresh, replayed])

    def _log_replay(self, groups: Sequence[Group], step: int) -> None:
        assert self.buffer is not None
        stored = self.buffer.index(step).ages.clip(min=0)
        ages = [max(0, step - group.policy_step) for group in groups]
        sums = torch.tensor(
            [len(stored), float(stored.sum()), len(groups), float(sum(ages))],
            device=self.trainer.accelerator.device,
        )
        size, stored_age, drawn, age = self._sum(sums)
        oldest = torch.tensor([float(max(ages, default=0))], device=self.trainer.accelerator.device)
        self._log("replay/size", size)
        self._log("replay/groups", drawn)
        if size:
            self._log("replay/size_age_mean", stored_age / size)
        if drawn:
            self._log("replay/age_mean", age / drawn)
            self._log("replay/age_max", self.trainer.accelerator.gather(oldest).max().item())

    # ------------------------------------------------------------------------------------------- offline

    def logged_batch(self, inputs: Sequence[dict[str, Any]], first_group: int) -> GroupBatch:
        """The rows of logged groups that TRL's sampler chose for this process."""
        assert self.logged is not None
        trainer, k, n = self.trainer, self.args.num_generations, len(inputs)
        first_row = trainer.accelerator.process_index * n
        groups = [self.logged.groups[row[_GROUP]] for row in inputs]
        slots = [(first_row + i) % k for i in range(n)]
        device = trainer.accelerator.device
        batch = rows_of(groups, slots, device, stored=self.stored_reference)
        batch.group_ids = first_group + (first_row + torch.arange(n, device=device)) // k
        self._log_logged(batch)
        return batch

    def _log_logged(self, batch: GroupBatch) -> None:
        assert batch.valid is not None
        lengths = batch.completion_mask.sum(1)[batch.valid]
        sums = torch.stack([batch.rewards[batch.valid].sum(), lengths.sum(), batch.valid.sum()]).float()
        reward, tokens, rows = self._sum(sums)
        if rows:
            self._log("reward", reward / rows)
            self._log("completions/mean_length", tokens / rows)

    # --------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the buffer."""
        first = {str(step): number for step, number in self._first_numbers.items()}
        return {"run": self._run, "due": self._due, "first_numbers": first}

    def save(self, folder: Path) -> None:
        """Put this process's buffer into a checkpoint."""
        if self.buffer is not None:
            self.buffer.save(self._saved(folder))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """transformers tells that training starts; groups of an earlier run leave a new one's own folder."""
        if state.global_step == 0:
            self._due, self._first_numbers = 0.0, {}
            if self.buffer is not None and self.args.replay_directory is None:
                self.buffer.clear()

    def begin(self, checkpoint: Path | None, state: dict[str, Any] | None = None) -> None:
        """Go on from a checkpoint, with what was in the buffer then."""
        self._due, self._first_numbers = 0.0, {}
        if state is not None:
            self._run, self._due = state["run"], state["due"]
            self._first_numbers = {int(step): number for step, number in state["first_numbers"].items()}
        if self.buffer is None or checkpoint is None:
            return
        world, rank = self.trainer.accelerator.num_processes, self.trainer.accelerator.process_index
        saved = sorted(checkpoint.glob("gvpo_replay_*"), key=lambda path: int(path.name.split("_")[-1]))
        self.buffer.restore(*saved[rank::world])
        if len(saved) == world:
            return
        self._first_numbers = {}  # groups of other processes than before have other numbers
        warnings.warn(
            f"{checkpoint} has the replay buffers of {len(saved)} process(es), not of {world}: "
            + ("their groups were shared out." if saved else "replay starts empty."),
            stacklevel=2,
        )

    def _saved(self, folder: Path) -> Path:
        return folder / f"gvpo_replay_{self.trainer.accelerator.process_index}"

    # ------------------------------------------------------------------------------------------- helpers

    def _sum(self, values: Tensor) -> list[float]:
        return self.trainer.accelerator.reduce(values, reduction="sum").tolist()

    def _log(self, name: str, value: float) -> None:
        self.trainer._metrics["train"][name].append(value)
