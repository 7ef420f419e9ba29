"""What a group is measured against: one version of the policy, however many sampled its responses."""

from __future__ import annotations

import math
from abc import abstractmethod

import ray
import torch
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from gvpo.verl.queued import is_padding, jagged, put
from gvpo.verl.rollouts import rows_short
from gvpo.verl.settings import Settings
from gvpo.verl.versions import KeepingWorker, Versions


class References(PPOTrainer):
    """The part of a GVPO trainer that knows versions.

    Attributes:
        fresh: keys of the batch's rows that the present policy has scored.
    """

    MODE: str
    settings: Settings
    row_multiple: int
    updates_per_step: int

    @abstractmethod
    def prompts(self, batch: KVBatchMeta) -> dict[str, list[int]]:
        """The rows of each prompt."""

    @abstractmethod
    def balance(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Rows in the order in which workers take them."""

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
