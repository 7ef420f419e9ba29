"""Which prompts are asked, and what becomes of groups that are all alike: dynamic sampling and curricula.

Groups of equal rewards say nothing of which response is better. Prompts are chosen and groups replaced before
a step sees them; its maths is the same. Every process chooses the same prompts, as it sees all rewards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import IterableDataset
from jaxtyping import Bool, Float
from torch import Tensor

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.replay.demonstrations import Demonstration
from gvpo.trl.metrics import Share
from gvpo.trl.rollouts import select


@dataclass
class DynamicConfig:
    """Dynamic sampling and curricula; see docs/guide/dynamic.md.

    Args:
        dynamic_sampling: what becomes of a group whose rewards are all equal. "none": it stays. "resample":
            other prompts are asked in its place, in up to `max_resamples` rounds. "replay": it leaves the
            optimizer step where a replayed group can take its place.
        max_resamples: how often a generation may be resampled. Where that was not enough, groups stay.
        easy_threshold: prompts whose last group had a mean reward of at least this are easy: they are no
            longer asked (with `easy_fraction=0`).
        hard_threshold: prompts whose last group had a mean reward of at most this are hard, likewise.
        easy_fraction: share of each generation's prompts that are drawn from the easy ones.
        hard_fraction: share of each generation's prompts that are drawn from the hard ones.
    """

    dynamic_sampling: Literal["none", "resample", "replay"] = "none"
    max_resamples: int = 3
    easy_threshold: float | None = None
    hard_threshold: float | None = None
    easy_fraction: float = 0.0
    hard_fraction: float = 0.0

    @property
    def chooses_prompts(self) -> bool:
        """Whether prompts are chosen here, not by TRL's sampler."""
        thresholds = (self.easy_threshold, self.hard_threshold)
        return self.dynamic_sampling == "resample" or any(t is not None for t in thresholds)


def check_dynamic(args: Any) -> None:
    """Raise an InputError for options that exclude each other."""
    for pool in ("easy", "hard"):
        share = getattr(args, f"{pool}_fraction")
        if share and getattr(args, f"{pool}_threshold") is None:
            raise InputError(f"{pool}_fraction={share} needs {pool}_threshold: which prompts are {pool}?")
    easy, hard = args.easy_threshold, args.hard_threshold
    if easy is not None and hard is not None and easy <= hard:
        raise InputError(f"easy_threshold={easy} must be above hard_threshold={hard}.")
    if args.easy_fraction + args.hard_fraction > 1:
        raise InputError("easy_fraction and hard_fraction together must be at most 1.")
    if args.offline is not None and (args.chooses_prompts or args.dynamic_sampling != "none"):
        raise InputError("offline samples nothing: leave out dynamic_sampling and thresholds.")
    rows = args.per_device_train_batch_size * args.steps_per_generation
    whole = "replay_ratio" if args.replay_ratio else "dynamic_sampling"
    needed = args.replay_ratio or args.dynamic_sampling != "none"
    if needed and args.world_size > 1 and rows % args.num_generations:
        raise InputError(
            f"{whole} keeps whole groups in each of {args.world_size} processes, but a process has {rows} "
            f"rows of a generation and groups have num_generations={args.num_generations}: make "
            "per_device_train_batch_size × steps_per_generation a multiple of it."
        )


@dataclass
class Generation:
    """This process's rows of a generation.

    Attributes:
        batch: the rows, groups next to each other.
        components: their rewards by reward function.
        given: which of them are demonstrations.
    """

    batch: GroupBatch
    components: Float[Tensor, "rows functions"]
    given: Sequence[Demonstration | None]

    def replaced(self, k: int, places: Sequence[int], other: Generation, found: Sequence[int]) -> Generation:
        """Groups `found` in `other`, of k rows each, stand in the `places` of groups of this one."""
        rows = torch.arange(len(self.batch), device=self.batch.rewards.device)
        for place, group in zip(places, found, strict=True):
            at = torch.arange(k, device=rows.device)
            rows[place * k + at] = len(self.batch) + group * k + at
        batch = select(GroupBatch.concatenate([self.batch, other.batch]), rows)
        given = [*self.given, *other.given]
        return Generation(
            replace(batch, group_ids=self.batch.group_ids),
            torch.cat([self.components, other.components])[rows],
            [given[row] for row in rows.tolist()] if given else given,
        )


def equal_groups(
    rewards: Float[Tensor, "rows"], valid: Bool[Tensor, "rows"] | None, k: int
) -> Bool[Tensor, "groups"]:
    """Which groups, of k rows next to each other, have equal rewards, or fewer than two to compare."""
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    most = rewards.masked_fill(~valid, -math.inf).view(-1, k).amax(1)
    least = rewards.masked_fill(~valid, math.inf).view(-1, k).amin(1)
    return (most == least) | (valid.view(-1, k).sum(1) < 2)


def without_groups(batch: GroupBatch, groups: Tensor, k: int) -> GroupBatch:
    """The batch, of groups of k rows next to each other, in which the rows of `groups` take no part."""
    assert batch.valid is not None
    valid = batch.valid.view(-1, k).clone()
    valid[groups] = False
    return replace(batch, valid=valid.view(-1))


class Prompts:
    """The order in which prompts are asked: pass after pass over the data set, easy and hard ones apart.

    Attributes:
        means: the mean reward of each prompt's last group; NaN where it was not asked yet.
        passes: how often all prompts have come.
    """

    def __init__(self, count: int, args: Any) -> None:
        self.count, self.args = count, args
        self.begin()

    def begin(self) -> None:
        """A new run."""
        self.means = np.full(self.count, np.nan)
        self.passes = self._draws = self._place = 0
        self._owed = {"easy": 0.0, "hard": 0.0}  # as a fraction need not come out even
        self._order = self._new_order()

    def _new_order(self) -> np.ndarray:
        if self.args.shuffle_dataset is False:
            return np.arange(self.count)
        return np.random.default_rng((self.args.seed, self.passes)).permutation(self.count)

    def pools(self) -> dict[str, Bool[np.ndarray, "prompts"]]:
        """Which prompts are easy and which are hard."""
        easy, hard = self.args.easy_threshold, self.args.hard_threshold
        return {
            "easy": self.means >= (np.inf if easy is None else easy),
            "hard": self.means <= (-np.inf if hard is None else hard),
        }

    def draw(self, count: int) -> list[int]:
        """So many different prompts."""
        pools = self.pools()
        chosen: list[int] = []
        rng = np.random.default_rng((self.args.seed, self._draws, 1))
        self._draws += 1

        def pick(pool: str, most: int) -> None:
            candidates = np.setdiff1d(pools[pool].nonzero()[0], chosen)
            chosen.extend(rng.choice(candidates, min(most, len(candidates)), replace=False).tolist())

        for pool in pools:
            self._owed[pool] += count * getattr(self.args, f"{pool}_fraction")
            due = int(self._owed[pool])
            self._owed[pool] -= due
            pick(pool, due)
        chosen += self._next(~(pools["easy"] | pools["hard"]), count - len(chosen))
        if len(chosen) < count:
            warnings.warn(
                "Too few prompts are neither easy nor hard: hard and then easy ones fill up.", stacklevel=2
            )
            pick("hard", count - len(chosen))
            pick("easy", count - len(chosen))
        return chosen

    def _next(self, wanted: Bool[np.ndarray, "prompts"], count: int) -> list[int]:
        """The next prompts that are `wanted`, in order."""
        found: list[int] = []
        for _ in range(2 * len(self._order)):  # the rest of this pass, and a whole one
            if len(found) == count:
                break
            if self._place == len(self._order):
                self.passes, self._place = self.passes + 1, 0
                self._order = self._new_order()
            prompt = int(self._order[self._place])
            self._place += 1
            if wanted[prompt] and prompt not in found:
                found.append(prompt)
        return found

    def shares(self) -> dict[str, Share]:
        """For the log; the same on all processes."""
        sizes = {name: Share(float(pool.sum()), 1) for name, pool in self.pools().items()}
        return {f"prompts/{name}": n for name, n in {**sizes, "passes": Share(self.passes, 1)}.items()}

    def state_dict(self, folder: Path) -> dict[str, Any]:
        means = {str(i): self.means[i] for i in (~np.isnan(self.means)).nonzero()[0]}
        where = {"passes": self.passes, "place": self._place, "draws": self._draws, "owed": {**self._owed}}
        return {"count": self.count, "means": means, **where}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        if state.get("count") != self.count:
            warnings.warn(f"{folder} is of another data set: prompts start anew.", stacklevel=2)
            return
        for prompt, mean in state["means"].items():
            self.means[int(prompt)] = mean
        self.passes, self._place = state["passes"], state["place"]
        self._draws, self._owed = state["draws"], state["owed"]
        self._order = self._new_order()


class DynamicSampling:
    """Generations whose prompts are chosen here, and resampled where all responses did equally well.

    Attributes:
        prompts: which are asked next.

    Raises:
        InputError: a data set without an order that could be chosen.
    """

    def __init__(
        self, args: Any, dataset: Any, *, rank: int, world: int, gather: Callable[[Tensor], Tensor]
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise InputError(
                "dynamic_sampling='resample' and thresholds choose prompts, which a stream does not let "
                "them: give a data set with a length."
            )
        self.args, self.dataset, self.k = args, dataset, args.num_generations
        self.rank, self.world, self.gather = rank, world, gather
        self.prompts = Prompts(len(dataset), args)

    def __call__(
        self, like: Sequence[Mapping[str, Any]], sample: Callable[[list[dict[str, Any]]], Generation]
    ) -> tuple[Generation, dict[str, Share]]:
        """As many rows, with such columns, as TRL's sampler gave (`like`), by `sample`; and what to log."""
        asked = self.prompts.draw(len(like) * self.world // self.k)
        whole = sample(self._rows(asked, like[0]))
        equal, seen = self._rate(asked, whole), _sums(whole)
        rounds, sampled, alike = 1, len(asked), int(equal.sum())
        resamples = self.args.max_resamples if self.args.dynamic_sampling == "resample" else 0
        while equal.any() and rounds <= resamples:
            rounds += 1
            # Whole groups on each process, and as many: all take part in what is done together.
            places = equal.view(self.world, -1)
            asked = self.prompts.draw(int(places.sum(1).max()) * self.world)
            more = sample(self._rows(asked, like[0]))
            again = self._rate(asked, more)
            seen, sampled, alike = seen + _sums(more), sampled + len(asked), alike + int(again.sum())
            for rank, useful in enumerate((~again).view(self.world, -1)):
                found = useful.nonzero()[:, 0].tolist()
                filled = places[rank].nonzero()[: len(found), 0].tolist()
                places[rank, filled] = False
                if rank == self.rank:
                    whole = whole.replaced(self.k, filled, more, found[: len(filled)])
        shares = self.prompts.shares()
        if not resamples:
            return whole, shares
        rewards, responses, tokens = (seen - _sums(whole)).tolist()
        return whole, shares | {
            "dynamic/rounds": Share(rounds, 1),
            "dynamic/equal_groups": Share(alike / sampled, 1),
            "dynamic/unfilled": Share(float(equal.sum()), 1),
            "dynamic/discarded_responses": Share(responses),
            "dynamic/discarded_tokens": Share(tokens),
            "dynamic/discarded_reward": Share(rewards, responses),
        }

    def _rows(self, asked: Sequence[int], like: Mapping[str, Any]) -> list[dict[str, Any]]:
        """This process's rows of the prompts that all are asked; each a copy, as TRL writes into them."""
        n = len(asked) * self.k // self.world
        rows = [self.dataset[asked[row // self.k]] for row in range(self.rank * n, (self.rank + 1) * n)]
        return [{name: row[name] for name in like} for row in rows]

    def _rate(self, asked: Sequence[int], got: Generation) -> Bool[Tensor, "asked"]:
        """Which groups have equal rewards; remembers how well the policy did on each prompt."""
        rewards, valid = got.batch.rewards, got.batch.valid
        assert valid is not None
        sampled = valid.clone()
        sampled[[i for i, ids in enumerate(got.given) if ids is not None]] = False
        columns = [rewards.masked_fill(~valid, 0), valid.to(rewards), sampled.to(rewards)]
        rewards, takes_part, own = self.gather(torch.stack(columns, 1)).unbind(1)
        means = (rewards * own).view(-1, self.k).sum(1) / own.view(-1, self.k).sum(1)
        for prompt, mean in zip(asked, means.tolist(), strict=True):
            if not math.isnan(mean):  # of no response that could be rated
                self.prompts.means[prompt] = mean
        return equal_groups(rewards, takes_part.bool(), self.k)


def _sums(generation: Generation) -> Float[Tensor, "3"]:
    """Rewards, responses and tokens of the responses that take part."""
    batch = generation.batch
    assert batch.valid is not None
    rows = [batch.rewards, torch.ones_like(batch.rewards), batch.completion_mask.sum(1)]
    return torch.stack([row[batch.valid].double().sum().cpu() for row in rows])
