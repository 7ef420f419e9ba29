"""GVPO on verl 0.9: the driver computes weights, verl's own workers do the rest.

What differs from verl's synchronous PPO trainer: a mini-batch is a number of whole prompts; before each but
the first, the workers score its rows under the current policy (their own `compute_log_prob`); the driver
turns sequence log-probabilities and rewards into weights and hands them to the workers' own `update_actor` as
advantages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.workers.utils.padding import response_from_nested

from gvpo.verl.minibatches import choose_rows, rows_short, split_prompts
from gvpo.verl.rollouts import Rollouts, row_sums, weigh
from gvpo.verl.settings import read_settings
from gvpo.verl.watch import Watch

_TOUCHED = (
    "_balance_batch",
    "_get_required_batch_multiple",
    "_init_dataloader",
    "_submit_batch_to_rollout",
    "_update_actor",
    "fit",
)
_missing = [name for name in _TOUCHED if not hasattr(PPOTrainerSync, name)]
_missing += [name for name in ("_TQ_CONTROLLER", "_TQ_STORAGE") if not hasattr(tq.interface, name)]
if _missing:
    raise ImportError(
        f"gvpo.verl works with verl 0.9.1 and TransferQueue 0.1.11: these have no {', '.join(_missing)}. "
        "Install those versions, or tell the GVPO developers of the new ones."
    )
# Values of the workers' surrogate −Σ w S and of the KL term with coefficient 0: they mean nothing here.
_SURROGATES = ("loss", "pg_loss", "kl_loss", "kl_coef")


@register_trainer("gvpo")
class GVPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with GVPO's update.

    Args:
        config: a configuration that `gvpo.verl.settings.prepare` has been through.
    """

    def __init__(self, config: DictConfig) -> None:
        self.settings = read_settings(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # what verl's own code compares with
        super().__init__(config)
        if self.settings.poll_seconds is not None:
            self.replay_buffer.poll_interval = self.settings.poll_seconds
        self._arrival: dict[str, int] = {}
        self._arrivals = itertools.count()
        self._row_multiple = self.settings.row_multiple
        self._dumped = 0

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        # The workers' scheduler steps at each `update_actor`, which is here a mini-batch and not a rollout.
        updates = self.settings.updates_per_step(self.config.data.train_batch_size)
        optim = self.config.actor_rollout_ref.actor.optim
        with open_dict(self.config):
            optim.total_training_steps = self.total_training_steps * updates
            if (optim.get("lr_warmup_steps", None) or -1) > 0:
                optim.lr_warmup_steps *= updates

    def fit(self, agent_loop_manager: Any) -> None:
        servers, storage = self.llm_server_manager, tq.interface._TQ_STORAGE or {}
        watch = Watch(self.settings.watch_seconds)
        watch.add("a training worker", self.actor_rollout_wg.workers)
        watch.add("a rollout server", [s for replica in servers.get_replicas() for s in replica.servers])
        watch.add("the rollouts' load balancer", [servers.global_load_balancer])
        watch.add("an agent loop worker", agent_loop_manager.agent_loop_workers)
        watch.add("a reward worker", self.get_reward_handles() or [])
        watch.add("a store of TransferQueue", list(storage.get("SimpleStorage", {}).values()))
        watch.add("TransferQueue's controller", [tq.interface._TQ_CONTROLLER])
        with watch.watching():
            super().fit(agent_loop_manager)

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        # Rollouts arrive in any order; mini-batches follow the order of the data.
        for prompt in batch["uid"]:
            self._arrival[str(prompt)] = next(self._arrivals)
        return super()._submit_batch_to_rollout(batch)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        # verl's own answer also fits mini-batches of equal row counts, which ours need not have.
        self._row_multiple = dp_size * self.settings.row_multiple
        return self._row_multiple

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Balance tokens over the ranks, with padding rows enough to fill up each mini-batch on its own."""
        if not len(batch):
            raise RuntimeError(
                "No response arrived: every session of the rollout failed, as the log says above."
            )
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        if "gvpo_mini_batch" in batch.extra_info:
            return batch
        spare = sum(1 for tag in batch.tags if _is_padding(tag))
        short = max(rows_short(len(rows), self._row_multiple) for rows in self._mini_batches(batch))
        if short <= spare:
            return batch
        more = math.ceil((short - spare) / self._row_multiple) * self._row_multiple
        batch = upsample_batch_to_divisible_size(batch, len(batch) + more, self.tokenizer.eos_token_id)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _mini_batches(self, batch: KVBatchMeta) -> Iterator[list[int]]:
        """The rows of each mini-batch of the step, epoch after epoch, without padding."""
        rows: dict[str, list[int]] = {}
        for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if not _is_padding(tag):
                rows.setdefault(_parse(key)[0], []).append(i)
        order = sorted(rows, key=lambda prompt: (self._arrival.get(prompt, math.inf), prompt))
        seed = self.settings.seed + self.global_steps if self.settings.shuffle else None
        for prompts in split_prompts(order, self.settings.mini_batch, self.settings.epochs, seed):
            yield [i for prompt in prompts for i in rows[prompt]]

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """All updates of the step: score, weigh, update, for each mini-batch."""
        rollouts, masks = self._fetch(batch)
        spare = [i for i, tag in enumerate(batch.tags) if _is_padding(tag)]
        returns = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["returns"])
        updates: list[dict[str, float]] = []
        for rows in self._mini_batches(batch):
            # Before the step's first update the policy is the one that scored the rollout.
            policy = self._score(batch, rows + spare, masks) if updates else rollouts.start
            mini = rollouts.take(rows)
            weights, result = weigh(mini, policy[rows], self.settings.beta)
            candidates = rows + spare
            every = torch.cat([weights, weights.new_zeros(len(spare))]) * self.settings.scale
            taken = self._choose(every, [rollouts.lengths[i] for i in candidates], len(rows))
            chosen = [candidates[i] for i in taken]
            update = self._train(batch, chosen, every[taken], masks)
            update |= {f"gvpo/{name}": value.item() for name, value in result.metrics.items()}
            update["gvpo/rows_left_out"] = 1 - len({*chosen} - {*spare}) / len(rows)
            update["actor/loss"] = update["gvpo/loss"]
            if self.settings.dump_dir:
                self._dump(batch, rows, rollouts, policy, weights, update)
            updates.append(update)
        # What verl logs as advantages are again its own.
        tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"advantages": returns["returns"]}, batch_size=len(batch)),
        )
        metrics.update(_summarise(updates))
        metrics["gvpo/updates"] = len(updates)
        metrics["gvpo/scoring_passes"] = len(updates) - 1
        self._arrival.clear()
        return batch

    def _choose(self, weights: Tensor, lengths: list[int], real: int) -> list[int]:
        spare = range(real, len(weights))
        if self.settings.leave_out_zero_weights:
            return choose_rows(weights, lengths, self._row_multiple, spare=spare)
        return list(range(real + rows_short(real, self._row_multiple)))

    def _fetch(self, batch: KVBatchMeta) -> tuple[Rollouts, list[Tensor]]:
        """A few numbers for each row, and the rows' response masks."""
        reference = "ref_log_prob" if self.settings.reference == "initial" else "old_log_probs"
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=list({"response_mask", "rm_scores", "old_log_probs", reference}),
        )
        mask = data["response_mask"]
        start = row_sums(data["old_log_probs"], mask)
        masks = list(mask.unbind())
        everything = torch.nested.nested_tensor_from_jagged(torch.ones_like(mask.values()), mask.offsets())
        names = [_parse(key) for key in batch.keys]
        valid = [not _is_padding(tag) and bool(m.any()) for tag, m in zip(batch.tags, masks, strict=True)]
        rollouts = Rollouts(
            prompts=[prompt for prompt, _ in names],
            sessions=names,
            reference=start if reference == "old_log_probs" else row_sums(data[reference], mask),
            start=start,
            rewards=row_sums(data["rm_scores"], everything),
            valid=torch.tensor(valid),
            lengths=[tag["seq_len"] for tag in batch.tags],
        )
        return rollouts, masks

    def _score(self, batch: KVBatchMeta, rows: Sequence[int], masks: list[Tensor]) -> Tensor:
        """S under the current policy of these rows, at their places among all rows of the step."""
        real = [i for i in rows if not _is_padding(batch.tags[i])]
        filled = rows[: len(real) + rows_short(len(real), self._row_multiple)]
        part = self._part(batch, filled, calculate_entropy=False, compute_loss=False)
        with marked_timer("gvpo_score", self.timing_raw, color="blue"):
            self.actor_rollout_wg.compute_log_prob(part)
        keys = [batch.keys[i] for i in real]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["log_probs"])
        mask = _jagged([masks[i] for i in real])
        policy = torch.full((len(batch),), torch.nan, dtype=torch.float64)
        policy[real] = row_sums(response_from_nested(data["log_probs"], mask), mask)
        return policy

    def _train(
        self, batch: KVBatchMeta, rows: Sequence[int], weights: Tensor, masks: list[Tensor]
    ) -> dict[str, float]:
        """One optimizer update with the gradient of −Σ w S, by the workers' own code."""
        each = zip(rows, weights.float(), strict=True)
        advantages = _jagged([weight * masks[i].float() for i, weight in each])
        tq.kv_batch_put(
            keys=[batch.keys[i] for i in rows],
            partition_id=batch.partition_id,
            fields=TensorDict({"advantages": advantages}, batch_size=len(rows)),
        )
        part = self._part(
            batch,
            rows,
            calculate_entropy=bool(self.config.actor_rollout_ref.actor.calculate_entropy),
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=1,  # the sum over rows: 1/G is part of the weights
            mini_batch_size=len(rows),
            epochs=1,
            seed=self.settings.seed,
            dataloader_kwargs={"shuffle": False},
        )
        output = self.actor_rollout_wg.update_actor(part)
        found = {name.removeprefix("actor/"): value for name, value in output["metrics"].items()}
        kept = reduce_metrics({name: value for name, value in found.items() if name not in _SURROGATES})
        return {
            "perf/mfu/actor" if name == "mfu" else f"actor/{name}": float(value)
            for name, value in kept.items()
        }

    def _part(self, batch: KVBatchMeta, rows: Sequence[int], **extra: Any) -> KVBatchMeta:
        """Some rows of the step, tokens balanced over the ranks, with instructions for the workers."""
        part = batch.select_keys([batch.keys[i] for i in rows])
        part.extra_info = {"gvpo_mini_batch": True}
        part = self._balance_batch(part, {})
        part.extra_info = {"temperature": self.config.actor_rollout_ref.rollout.temperature, **extra}
        return part

    def _dump(
        self,
        batch: KVBatchMeta,
        rows: Sequence[int],
        rollouts: Rollouts,
        policy: Tensor,
        weights: Tensor,
        update: dict[str, float],
    ) -> None:
        """What an update was made of, to be checked by other means."""
        fields = ["input_ids", "responses", "response_mask"]
        keys = [batch.keys[i] for i in rows]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        mini = rollouts.take(rows)
        record: dict[str, Any] = {name: [row.clone() for row in data[name].unbind()] for name in fields}
        record |= {
            "prompts": mini.prompts,
            "sessions": mini.sessions,
            "rewards": mini.rewards,
            "reference_logps": mini.reference,
            "policy_logps": policy[rows],
            "weights": weights,
            "metrics": update,
            "step": self.global_steps,
        }
        folder = Path(self.settings.dump_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(record, folder / f"update_{self.global_steps:06d}_{self._dumped:04d}.pt")
        self._dumped += 1


def _is_padding(tag: dict[str, Any]) -> bool:
    return bool(tag.get("is_padding", False))


def _parse(key: str) -> tuple[str, str]:
    """Prompt and session of a row's key, `{uid}_{session}_{index}`."""
    prompt, session, _ = key.rsplit("_", 2)
    return prompt, session


def _jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _summarise(updates: list[dict[str, float]]) -> dict[str, float]:
    """One number for the step: the mean over its updates, of the learning rate the last."""
    summary = {}
    for name in updates[0]:
        values = [update[name] for update in updates if not math.isnan(update[name])]
        if values:
            summary[name] = values[-1] if name == "actor/lr" else sum(values) / len(values)
    return summary
