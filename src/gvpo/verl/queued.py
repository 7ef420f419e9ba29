"""A rollout in TransferQueue, and the calls by which verl 0.9's workers score and train it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.workers.utils.padding import response_from_nested

from gvpo.verl.rollouts import Rollouts, choose_rows, row_sums, rows_short


class Queued:
    """A rollout in TransferQueue, as `gvpo.verl.updates.Workers`.

    A row whose tag has `reference_logp` brings its S' in nats, and is scored under no reference; it may have
    its group's `age`, too.

    Args:
        trainer: the `GVPOUpdates` whose workers these are.
        batch: the rows and padding rows, once all is known of them that comes before the update.
        references: the version of the policy that each prompt's S' is of.
        ages: of each prompt's group, in updates.
        fresh: keys of the rows whose `old_log_probs` are those of the present policy.

    Attributes:
        entropies: of each row that was scored, in nats, unless `fresh` rows have told it before.
    """

    def __init__(
        self,
        trainer: Any,
        batch: KVBatchMeta,
        references: Mapping[str, int],
        ages: Mapping[str, int],
        fresh: Collection[str],
    ) -> None:
        self.trainer, self.batch, self.references = trainer, batch, references
        self.padding = [i for i, tag in enumerate(batch.tags) if is_padding(tag)]
        self.tells_entropy = not fresh
        self.entropies: list[float] = []
        reference = "ref_log_prob" if trainer.settings.reference == "initial" else "old_log_probs"
        data = self._get(range(len(batch)), "response_mask", "rm_scores", reference)
        mask = data["response_mask"]
        self.masks = list(mask.unbind())
        every_token = torch.nested.nested_tensor_from_jagged(torch.ones_like(mask.values()), mask.offsets())
        sessions, tags = [session_of(key) for key in batch.keys], batch.tags
        given = [tag.get("age", ages.get(prompt, 0)) for tag, (prompt, _) in zip(tags, sessions, strict=True)]
        scored = row_sums(data[reference], mask)
        brought = torch.tensor([tag.get("reference_logp", math.nan) for tag in tags], dtype=scored.dtype)
        rows = zip(tags, self.masks, strict=True)
        self.rollouts = Rollouts(
            sessions=sessions,
            reference=torch.where(brought.isnan(), scored, brought),
            start=torch.where(torch.tensor([key in fresh for key in batch.keys]), scored, math.nan),
            rewards=row_sums(data["rm_scores"], every_token),
            valid=torch.tensor([not is_padding(tag) and bool(kept.any()) for tag, kept in rows]),
            ages=torch.tensor(given),
        )

    def score(self, rows: Sequence[int]) -> Tensor:
        taken = {*rows}
        others = dict.fromkeys([*self.padding, *range(len(self.batch))])  # any of which may fill up
        short = rows_short(len(rows), self.trainer.row_multiple)
        filled = [*rows, *[i for i in others if i not in taken][:short]]
        with marked_timer("gvpo_score", self.trainer.timing_raw, color="blue"):
            part = self._part(filled, calculate_entropy=self.tells_entropy, compute_loss=False)
            self.trainer.actor_rollout_wg.compute_log_prob(part)
        mask = jagged([self.masks[i] for i in rows])

        def sums(field: str) -> Tensor:
            return row_sums(response_from_nested(self._get(rows, field)[field], mask), mask)

        if self.tells_entropy:
            self.entropies += sums("entropy").tolist()
        return sums("log_probs")

    def update(self, rows: Sequence[int], weights: Tensor) -> dict[str, float]:
        candidates = [*rows, *self.padding]
        every = torch.cat([weights, weights.new_zeros(len(self.padding))])
        multiple = self.trainer.row_multiple
        if self.trainer.settings.leave_out_zero_weights:
            lengths = [self.batch.tags[i]["seq_len"] for i in candidates]
            taken = choose_rows(every, lengths, multiple, padding=len(self.padding))
        else:
            taken = list(range(len(rows) + rows_short(len(rows), multiple)))
        chosen = [candidates[i] for i in taken]
        pairs = zip(chosen, every[taken].float(), strict=True)
        advantages = jagged([weight * self.masks[i].float() for i, weight in pairs])
        put(self.batch, chosen, advantages=advantages)
        part = self._part(
            chosen,
            calculate_entropy=bool(self.trainer.config.actor_rollout_ref.actor.calculate_entropy),
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=1,  # the sum over rows: 1/G is part of the weights
            mini_batch_size=len(chosen),
            epochs=1,
            seed=self.trainer.settings.seed,
            dataloader_kwargs={"shuffle": False},
        )
        found = reduce_metrics(self.trainer.actor_rollout_wg.update_actor(part)["metrics"])
        metrics = {f"actor/{name.removeprefix('actor/')}": float(value) for name, value in found.items()}
        metrics["perf/mfu/actor"] = metrics.pop("actor/mfu")
        metrics["gvpo/rows_left_out"] = 1 - len({*chosen} - {*self.padding}) / len(rows)
        return metrics

    def record(self, rows: Sequence[int]) -> dict[str, list[Tensor]]:
        names = ("input_ids", "responses", "response_mask")
        data = self._get(rows, *names)
        tags, prompts = self.batch.tags, self.rollouts.prompts
        versions = {
            "oldest_version": [tags[i]["min_global_steps"] for i in rows],
            "newest_version": [tags[i]["max_global_steps"] for i in rows],
            "reference_version": [self.references.get(prompts[i], -1) for i in rows],
        }
        columns = {name: list(torch.tensor(values)) for name, values in versions.items()}
        return {name: list(data[name].unbind()) for name in names} | columns

    def _get(self, rows: Sequence[int], *fields: str) -> TensorDict:
        keys = [self.batch.keys[i] for i in rows]
        return tq.kv_batch_get(
            keys=keys, partition_id=self.batch.partition_id, select_fields=list(dict.fromkeys(fields))
        )

    def _part(self, rows: Sequence[int], **instructions: Any) -> KVBatchMeta:
        """Some rows, tokens balanced over the ranks, with instructions for the workers."""
        part = self.trainer.balance(self.batch.select_keys([self.batch.keys[i] for i in rows]))
        temperature = self.trainer.config.actor_rollout_ref.rollout.temperature
        part.extra_info = {"temperature": temperature, **instructions}
        return part


def put(batch: KVBatchMeta, rows: Sequence[int], **fields: Tensor) -> None:
    """Write jagged fields of these rows."""
    keys = [batch.keys[i] for i in rows]
    data = TensorDict(fields, batch_size=len(keys))
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=data)


def is_padding(tag: dict[str, Any]) -> bool:
    return bool(tag.get("is_padding", False))


def session_of(key: str) -> tuple[str, str]:
    """Prompt and session of a row's key, `{uid}_{session}_{index}`."""
    prompt, session, _ = key.rsplit("_", 2)
    return prompt, session


def jagged(rows: list[Tensor]) -> Tensor:
    """Rows of several lengths as one nested tensor."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
