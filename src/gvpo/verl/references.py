"""What a group is measured against: one version of the policy, however many sampled its responses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import ray
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from gvpo.verl.queued import Queued, is_padding, jagged, put, session_of
from gvpo.verl.rollouts import rows_short
from gvpo.verl.settings import Settings
from gvpo.verl.versions import KeepingWorker, Versions


class References(PPOTrainer):
    """The part of a GVPO trainer that knows prompts and versions.

    Attributes:
        MODE: verl's name of the trainer, which its own code compares `trainer.v1.trainer_mode` with.
        fresh: keys of the batch's rows that the present policy has scored.
    """

    MODE: str
    settings: Settings
    row_multiple: int
    updates_per_step: int

    def __init__(self, config: DictConfig) -> None:
        self._arrival: dict[str, int] = {}  # of prompts whose rollouts are awaited or at hand
        self._arrivals = itertools.count()
        super().__init__(config)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        # Rollouts arrive in any order; mini-batches follow the order of the data.
        for prompt in batch["uid"]:
            self._arrival[str(prompt)] = next(self._arrivals)
        return super()._submit_batch_to_rollout(batch)

    def trained(self, rows: Queued) -> None:
        """After the updates of these rows."""
        for prompt in {*rows.rollouts.prompts}:
            self._arrival.pop(prompt, None)

    def prompts(self, batch: KVBatchMeta) -> dict[str, list[int]]:
        """The rows of each prompt, prompts in the order of the data; without padding rows."""
        rows: dict[str, list[int]] = {}
        for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if not is_padding(tag):
                rows.setdefault(session_of(key)[0], []).append(i)
        # Those that a checkpoint brought were there before all others.
        return dict(sorted(rows.items(), key=lambda item: (self._arrival.get(item[0], -1), item[0])))

    def balance(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Rows in an order that balances tokens over the ranks, as verl does it."""
        return super()._balance_batch(batch, {})

    def plan_versions(self) -> None:
        """Decide what is kept: nothing where all responses are the present policy's."""
        settings = self.settings
        older = settings.keep_versions if self.MODE != "sync" or settings.reference == "moving" else 0
        period = math.ceil((settings.reference_every or 1) / self.updates_per_step)
        needed = settings.reference == "moving" or older > 0 or self.parameter_sync_step > 1
        self.versions = Versions(older, period, needed and settings.reference != "initial")
        self.fresh: set[str] = set()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if self.versions.needed and role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(KeepingWorker)

    def on_init_end(self) -> None:
        super().on_init_end()
        self.versions.keep(self.global_steps)

    def on_step_end(self) -> None:
        super().on_step_end()
        self.versions.keep(self.global_steps)

    def spans(self, batch: KVBatchMeta) -> dict[str, list[tuple[int, int]]]:
        """Of each prompt the versions that began and ended its responses, but of those that bring S'."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for prompt, rows in self.prompts(batch).items():
            for tag in (batch.tags[i] for i in rows if "reference_logp" not in batch.tags[i]):
                spans.setdefault(prompt, []).append((tag["min_global_steps"], tag["max_global_steps"]))
        return spans

    def references(self, batch: KVBatchMeta) -> dict[str, int]:
        """The version that each prompt's responses are measured against, unless it is the initial one."""
        if self.settings.reference == "initial":
            return {}
        newest = self.global_steps - 1
        return {prompt: self.versions.of(min(span)[0], newest) for prompt, span in self.spans(batch).items()}

    def to_score(self, batch: KVBatchMeta) -> dict[int, list[int]]:
        """The rows that are to be scored under each version, for S'."""
        parts: dict[int, list[int]] = {}
        prompts = self.prompts(batch)
        for prompt, version in self.references(batch).items():
            rows = [i for i in prompts[prompt] if "reference_logp" not in batch.tags[i]]
            parts.setdefault(version, []).extend(rows)
        return parts

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Score each row under its group's reference; a reference that never moves needs nothing here."""
        self.fresh.clear()
        present = self.global_steps - 1 if self.local_trigger_step == 0 else None  # before the first update
        parts, padding = self.to_score(batch), [i for i, tag in enumerate(batch.tags) if is_padding(tag)]
        left = {*range(len(batch))}
        for version in self.versions.each(parts, present):
            rows = parts[version]
            filled = [*rows, *padding[: rows_short(len(rows), self.row_multiple)]]
            left -= {*filled}
            part = self.balance(batch.select_keys([batch.keys[i] for i in filled]))
            part.extra_info = {}
            found: dict[str, float] = {}
            PPOTrainer._compute_old_log_prob(self, part, found)
            entropy = found.pop("actor/entropy")
            if version == present:
                self.fresh |= {batch.keys[i] for i in rows}
                found["actor/entropy"] = entropy
            metrics |= found
        if left:  # verl's loss reads the field of every row, and its `gpg` does nothing with it
            rows = sorted(left)
            put(batch, rows, old_log_probs=jagged([torch.zeros(batch.tags[i]["response_len"]) for i in rows]))
        return batch


def staleness(
    spans: Mapping[str, Sequence[tuple[int, int]]],
    ages: Mapping[str, int],
    reference_ages: Mapping[str, int],
) -> dict[str, float]:
    """What is logged of spans and of ages, which are updates since a group's oldest response or reference.

    `mixed_groups` is the share of groups with responses of several versions, `spanning_rows` that of
    responses that no single version made.
    """
    if not spans:
        return {}
    rows = [span for group in spans.values() for span in group]
    mixed = [len({version for span in group for version in span}) > 1 for group in spans.values()]
    found = {
        "staleness/age_mean": fmean(ages[prompt] for prompt in spans),
        "staleness/age_max": float(max(ages[prompt] for prompt in spans)),
        "staleness/mixed_groups": fmean(mixed),
        "staleness/spanning_rows": fmean(oldest != newest for oldest, newest in rows),
    }
    if reference_ages:
        found["staleness/reference_age"] = fmean(reference_ages[prompt] for prompt in spans)
    return found
