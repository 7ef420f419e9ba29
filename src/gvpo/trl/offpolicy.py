"""Responses that the current policy did not sample: demonstrations, replayed groups, logged completions.

Each part takes values and gives values; all maths stays in `gvpo.step`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.replay.batches import batch_of, groups_of, rows_of
from gvpo.replay.demonstrations import Demonstration, Demonstrations
from gvpo.replay.offline import load_offline
from gvpo.replay.reuse import Reuse
from gvpo.replay.tokens import Encoder
from gvpo.trl.config import GVPOConfig
from gvpo.trl.dynamic import equal_groups, without_groups
from gvpo.trl.metrics import Share

Given = Sequence[Demonstration | None]  # a row's demonstration, or None where it is sampled

_GROUP = "offline_group"  # column of the data set that stands for a logged group


def encoder_for(model: PreTrainedModel, processor: Any, template: str | None, options: Any) -> Encoder:
    """Makes tokens as this model's generation would have; `template` and `options` are of the chat."""
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return Encoder(
        tokenizer,
        [*ends, tokenizer.eos_token_id],
        vocabulary_size=model.config.get_text_config().vocab_size,
        chat_template=template,
        chat_template_kwargs=options or {},
    )


# ----------------------------------------------------------------------------------------- demonstrations


def demonstrations_of(args: GVPOConfig, encoder: Encoder, dataset: Any) -> Demonstrations:
    """The demonstrations of a data set, each of them checked.

    Raises:
        InputError: the first bad one, with its row.
    """
    assert args.num_generations is not None
    demonstrations = Demonstrations(
        encoder,
        args.demonstrations_per_group,
        args.num_generations,
        args.demonstration_slots,
        args.demonstration_column,
        args.max_completion_length,
        args.seed,
    )
    if not isinstance(dataset, IterableDataset):
        kept = [name for name in ("prompt", args.demonstration_column) if name in dataset.column_names]
        demonstrations.check(dataset.select_columns(kept))
    return demonstrations


def place(
    demonstrations: Demonstrations, inputs: Sequence[dict[str, Any]], first_row: int, first_group: int
) -> Given:
    """Which of this process's rows of a generation, from its `first_row` on, are demonstrations."""
    chosen: dict[int, dict[int, Demonstration]] = {}
    given = []
    for i, row in enumerate(inputs):
        group, slot = divmod(first_row + i, demonstrations.group_size)
        if group not in chosen:
            chosen[group] = demonstrations.chosen(row, first_group + group)
        given.append(chosen[group].get(slot))
    return given


def complete(
    sample: Callable[..., Any], given: Given, whole: bool, prompts: list[list[int]], *args: Any, **kwargs: Any
) -> Any:
    """Completions of all rows: those that are not demonstrations by `sample`; with `whole` it samples all."""
    if all(shown is None for shown in given):
        return sample(prompts, *args, **kwargs)
    # At least one row: other processes may wait to share parameters.
    rows = [i for i, shown in enumerate(given) if shown is None or whole] or [0]
    sampled, _ = sample([prompts[i] for i in rows], *args, **kwargs)
    completions = dict(zip(rows, sampled, strict=True))
    return [completions[i] if shown is None else list(shown.ids) for i, shown in enumerate(given)], None


def reward_demonstrations(
    rewards: Float[Tensor, "rows"],
    valid: Bool[Tensor, "rows"],
    failed: Bool[Tensor, "rows"],
    given: Given,
    reward: float | None,
) -> dict[str, Share]:
    """Give demonstrations their reward, in place; the metrics tell what sampled rows got without them.

    With a reward of its own, or `reward`, a demonstration takes part where a reward function `failed`, too.

    Raises:
        InputError: there is no reward for one, and the reward functions, without failing, gave none.
    """
    shown = torch.tensor([one is not None for one in given], device=rewards.device)
    for row, one in enumerate(given):
        own = None if one is None else reward if one.reward is None else one.reward
        if own is not None:
            rewards[row], valid[row], failed[row] = own, True, False
    if (shown & ~valid & ~failed).any():
        raise InputError(
            "The reward functions gave a demonstration no reward (None or NaN): set "
            "demonstration_reward, or leave it out."
        )
    valid &= ~failed
    sampled, shown = ~shown & valid, shown & valid
    count = float(shown.sum())
    return {
        "demonstrations/sampled_reward": Share(float(rewards[sampled].sum()), float(sampled.sum())),
        "demonstrations/reward": Share(float(rewards[shown].sum()), count),
        "demonstrations/rows": Share(count),
    }


# ------------------------------------------------------------------------------------------------ offline


class Offline:
    """Logged groups, in place of generation and reward functions.

    Attributes:
        groups: with two or more responses each.
        scored: whether they are measured against the reference log-probs that they were logged with.

    Raises:
        InputError: a file that cannot be read, too few groups or too large ones, or no reference.
    """

    def __init__(self, source: str, args: GVPOConfig, encoder: Encoder) -> None:
        logged = load_offline(source, encoder, longest=args.max_completion_length)
        assert args.num_generations is not None
        self.groups, self.k = logged.groups, args.num_generations
        self.scored = logged.scored and args.replay_reference == "stored"
        if logged.group_size > self.k:
            raise InputError(
                f"{source} has groups of up to {logged.group_size} responses, but "
                f"num_generations={self.k}: set it to {logged.group_size}."
            )
        if not self.scored and args.reference == "rollout":
            raise InputError(
                f"Offline training on {source} needs reference='initial' or 'moving': there is no rollout "
                "policy for it, and the file has no reference_logps (or replay_reference is 'current')."
            )
        if len(self.groups) < args.prompts_per_generation:
            raise InputError(
                f"{source} has {len(self.groups)} groups, fewer than the {args.prompts_per_generation} that "
                "a batch takes: lower per_device_train_batch_size or steps_per_generation."
            )
        if logged.alone:
            warnings.warn(
                f"{source}: left out {logged.alone} prompts with a single completion.", stacklevel=3
            )

    @staticmethod
    def dataset(count: int) -> Dataset:
        """What TRL's sampler draws from: one row a group."""
        return Dataset.from_dict({"prompt": [""] * count, _GROUP: list(range(count))})

    def batch(
        self, inputs: Sequence[dict[str, Any]], first_row: int, first_group: int, device: torch.device
    ) -> tuple[GroupBatch, dict[str, Share]]:
        """The rows that the sampler chose for this process, whose first in the generation is `first_row`."""
        n = len(inputs)
        slots = [(first_row + i) % self.k for i in range(n)]
        batch = rows_of([self.groups[row[_GROUP]] for row in inputs], slots, device, stored=self.scored)
        batch.group_ids = first_group + (first_row + torch.arange(n, device=device)) // self.k
        assert batch.valid is not None
        count = float(batch.valid.sum())
        tokens = batch.completion_mask.sum(1)[batch.valid].sum()
        return batch, {
            "reward": Share(float(batch.rewards[batch.valid].sum()), count),
            "completions/mean_length": Share(float(tokens), count),
        }


def unrewarded(**_: Any) -> list[float]:
    """Stands for the reward functions that offline training does not need."""
    raise InputError("evaluation samples completions, and no reward function was given to rate them")


# ------------------------------------------------------------------------------------------------- replay


class Replay(Reuse):
    """Keeps this process's groups and brings them back, some of them in each optimizer step."""

    def __init__(self, args: GVPOConfig, encoder: Encoder, *, rank: int, world: int) -> None:
        assert args.num_generations is not None
        self.args, self.k, self.rank, self.world = args, args.num_generations, rank, world
        self._first_numbers: dict[int, int] = {}  # policy step → number of its first group in the buffer
        super().__init__(
            args,
            args.output_dir,
            encoder,
            group_size=self.k,
            seed=args.seed,
            reference=args.reference,
            rank=rank,
            world=world,
        )

    def begin(self) -> None:
        super().begin()
        self._first_numbers = {}

    def store(
        self,
        batch: GroupBatch,
        step: int,
        reference_step: int,
        components: dict[str, Float[Tensor, "rows"]],
        given: Given,
    ) -> None:
        """Keep the groups of a generation, once they have their reference log-probs.

        Args:
            batch: whole groups, one after the other.
            step: the optimizer step whose policy sampled them.
            reference_step: the one whose policy they are measured against, if that is not the initial one.
            components: rewards by reward function.
            given: which rows are demonstrations.
        """
        self._first_numbers.setdefault(step, self.buffer.next_number)
        name = "initial" if self.args.reference == "initial" else f"step {reference_step}"
        if self.args.dynamic_sampling == "replay":  # those that are replaced are no replacement
            batch = without_groups(batch, equal_groups(batch.rewards, batch.valid, self.k), self.k)
        groups = groups_of(
            batch,
            self.k,
            reference=f"{name} of run {self.run}",
            policy_step=self.earlier + step,
            components={name: values.tolist() for name, values in components.items()},
            demonstrations=[i for i, shown in enumerate(given) if shown is not None],
        )
        self.keep(groups, step)

    def draw(
        self, fresh: GroupBatch, step: int, oldest: int
    ) -> tuple[GroupBatch, GroupBatch, dict[str, Share]]:
        """The `fresh` groups of a step, the oldest sampled at step `oldest`, and replayed ones beside them.

        These have the reference log-probs that they were stored with, or none if these are not wanted. With
        dynamic_sampling="replay" fresh groups leave whose place they take.

        Raises:
            InputError: a group that was stored without.
        """
        count = self.owed(len(fresh) / self.k)
        fills = self.args.dynamic_sampling == "replay"
        alike = (equal_groups(fresh.rewards, fresh.valid, self.k) & fills).nonzero()[:, 0]
        # Groups that are among the fresh ones are not replayed beside them.
        self._first_numbers = {s: n for s, n in self._first_numbers.items() if s >= oldest}
        mark = min(self._first_numbers.values(), default=self.buffer.next_number)
        groups = self.take(count + len(alike), step, mark)
        filled = alike[: len(groups)]
        ids = [-1 - self.rank - self.world * i for i in range(len(groups))]  # fresh groups count from 0
        stored = self.args.replay_reference == "stored"
        batch = batch_of(groups, ids, fresh.input_ids.device, stored=stored)
        shares = {
            name: Share(total, count, largest=name.endswith("_max"))
            for name, (total, count) in self.facts(groups, step).items()
        }
        if fills:
            fresh = without_groups(fresh, filled, self.k)
            shares["dynamic/replaced"] = Share(len(filled))
            shares["dynamic/unfilled"] = Share(len(alike) - len(filled))
        return fresh, batch, shares

    # --------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Put this process's buffer into a checkpoint; and what it keeps besides."""
        state = self.save(folder / f"gvpo_replay_{self.rank}")
        first = {str(step): number for step, number in self._first_numbers.items()}
        return state | {"first_numbers": first}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Go on with what was in the buffer then."""
        self._first_numbers = {int(step): number for step, number in state.get("first_numbers", {}).items()}
        saved = sorted(folder.glob("gvpo_replay_*"), key=lambda path: int(path.name.split("_")[-1]))
        self.restore(state, *saved[self.rank :: self.world])
        if len(saved) == self.world:
            return
        self._first_numbers = {}  # groups of other processes than before have other numbers
        warnings.warn(
            f"{folder} has the replay buffers of {len(saved)} process(es), not of {self.world}: "
            + ("their groups were shared out." if saved else "replay starts empty."),
            stacklevel=2,
        )
