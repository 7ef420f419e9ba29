"""GVPO on verl 0.9: the driver computes weights, verl's own workers do the rest.

What differs from verl's trainer: `_update_actor` makes an update for each mini-batch of whole prompts
(`gvpo.verl.updates`), with the workers' own `compute_log_prob` and `update_actor`, and weights as advantages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.experimental.reward_loop import migrate_legacy_reward_impl
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.utils import need_reference_policy
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import validate_config
from verl.utils.debug import marked_timer
from verl.utils.device import auto_set_device
from verl.utils.metric import reduce_metrics
from verl.workers.utils.padding import response_from_nested

from gvpo.errors import InputError
from gvpo.verl.reward import default_reward
from gvpo.verl.rollouts import Rollouts, choose_rows, row_sums, rows_short
from gvpo.verl.settings import read_settings
from gvpo.verl.updates import Updates, count_updates
from gvpo.verl.watch import Watch

_TOUCHED = ("_balance_batch", "_get_required_batch_multiple", "_init_dataloader", "_update_actor", "fit")
_missing = [name for name in (*_TOUCHED, "_submit_batch_to_rollout") if not hasattr(PPOTrainer, name)]
_missing += [name for name in ("_TQ_CONTROLLER", "_TQ_STORAGE") if not hasattr(tq.interface, name)]
if _missing:
    raise ImportError(
        f"gvpo.verl works with verl 0.9.1 and TransferQueue 0.1.11: these have no {', '.join(_missing)}. "
        "Install those versions, or tell the GVPO developers of the new ones."
    )


class GVPOUpdates(PPOTrainer):
    """GVPO's updates in one of verl's V1 trainers; to be named before it among the bases.

    Attributes:
        MODE: verl's name of that trainer, which its own code compares `trainer.v1.trainer_mode` with.

    Args:
        config: a configuration that `gvpo.verl.settings.prepare` has been through.
    """

    MODE: str

    def __init__(self, config: DictConfig) -> None:
        self.settings = read_settings(config)
        self.updates = Updates(self.settings)
        self.row_multiple = self.settings.row_multiple
        self._arrival: dict[str, int] = {}
        self._arrivals = itertools.count()
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.MODE
        super().__init__(config)
        if self.settings.poll_seconds is not None:
            self.replay_buffer.poll_interval = self.settings.poll_seconds

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        count_updates(self.config, self.settings, self.total_training_steps)

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
        self.row_multiple = dp_size * self.settings.row_multiple
        return self.row_multiple

    def balance(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Rows in an order that balances tokens over the ranks, as verl does it."""
        return super()._balance_batch(batch, {})

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Balance tokens over the ranks, with padding rows enough to fill up each mini-batch on its own."""
        if not len(batch):
            raise RuntimeError(
                "No response arrived: every session of the rollout failed, as the log says above."
            )
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        padding = sum(1 for tag in batch.tags if _is_padding(tag))
        mini_batches = self.updates.mini_batches(self._prompts(batch), self.global_steps)
        short = max(rows_short(len(rows), self.row_multiple) for rows in mini_batches)
        if short <= padding:
            return batch
        size = len(batch) + self.row_multiple  # enough, for no mini-batch is short of more
        batch = upsample_batch_to_divisible_size(batch, size, self.tokenizer.eos_token_id)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _prompts(self, batch: KVBatchMeta) -> dict[str, list[int]]:
        """The rows of each prompt, prompts in the order of the data; without padding rows."""
        rows: dict[str, list[int]] = {}
        for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if not _is_padding(tag):
                rows.setdefault(_parse(key)[0], []).append(i)
        return dict(sorted(rows.items(), key=lambda item: (self._arrival.get(item[0], math.inf), item[0])))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        returns = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["returns"])
        metrics |= self.updates.run(self.global_steps, self._prompts(batch), _Queued(self, batch))
        # What verl logs as advantages are again its own.
        advantages = TensorDict({"advantages": returns["returns"]}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=advantages)
        self._arrival.clear()
        return batch


@register_trainer("gvpo")
class GVPOTrainer(GVPOUpdates, PPOTrainerSync):
    """verl's synchronous trainer with GVPO's updates."""

    MODE = "sync"


class _Queued:
    """A rollout in TransferQueue, as `gvpo.verl.updates.Workers`."""

    def __init__(self, trainer: GVPOUpdates, batch: KVBatchMeta) -> None:
        self.trainer, self.batch = trainer, batch
        self.padding = [i for i, tag in enumerate(batch.tags) if _is_padding(tag)]
        reference = "ref_log_prob" if trainer.settings.reference == "initial" else "old_log_probs"
        data = self._get(range(len(batch)), "response_mask", "rm_scores", "old_log_probs", reference)
        mask = data["response_mask"]
        self.masks = list(mask.unbind())
        every_token = torch.nested.nested_tensor_from_jagged(torch.ones_like(mask.values()), mask.offsets())
        sessions = [_parse(key) for key in batch.keys]
        rows = zip(batch.tags, self.masks, strict=True)
        self.rollouts = Rollouts(
            prompts=[prompt for prompt, _ in sessions],
            sessions=sessions,
            reference=row_sums(data[reference], mask),
            start=row_sums(data["old_log_probs"], mask),
            rewards=row_sums(data["rm_scores"], every_token),
            valid=torch.tensor([not _is_padding(tag) and bool(kept.any()) for tag, kept in rows]),
        )

    def score(self, rows: Sequence[int]) -> Tensor:
        filled = [*rows, *self.padding[: rows_short(len(rows), self.trainer.row_multiple)]]
        with marked_timer("gvpo_score", self.trainer.timing_raw, color="blue"):
            part = self._part(filled, calculate_entropy=False, compute_loss=False)
            self.trainer.actor_rollout_wg.compute_log_prob(part)
        mask = _jagged([self.masks[i] for i in rows])
        return row_sums(response_from_nested(self._get(rows, "log_probs")["log_probs"], mask), mask)

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
        advantages = _jagged([weight * self.masks[i].float() for i, weight in pairs])
        tq.kv_batch_put(
            keys=[self.batch.keys[i] for i in chosen],
            partition_id=self.batch.partition_id,
            fields=TensorDict({"advantages": advantages}, batch_size=len(chosen)),
        )
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

    def tokens(self, rows: Sequence[int]) -> dict[str, list[Tensor]]:
        names = ("input_ids", "responses", "response_mask")
        data = self._get(rows, *names)
        return {name: list(data[name].unbind()) for name in names}

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


def _is_padding(tag: dict[str, Any]) -> bool:
    return bool(tag.get("is_padding", False))


def _parse(key: str) -> tuple[str, str]:
    """Prompt and session of a row's key, `{uid}_{session}_{index}`."""
    prompt, session, _ = key.rsplit("_", 2)
    return prompt, session


def _jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


# verl decorates its class in place; this is the class itself.
class GVPOTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's V1 task runner, in a module whose import registers the trainer in the runner's process."""


def train(config: DictConfig) -> None:
    """Run verl 0.9 with a configuration that `gvpo.verl.settings.prepare` has been through.

    Raises:
        InputError: verl's own checks refuse it.
    """
    auto_set_device(config)
    # verl 0.9 still lists the old names of reward settings, but no longer reads them by itself.
    config = migrate_legacy_reward_impl(config)
    default_reward(config.reward)
    checked = deepcopy(config)
    # verl asks for rows that split evenly over workers; ours are filled up where they do not.
    checked.data.train_batch_size *= checked.trainer.n_gpus_per_node * checked.trainer.nnodes
    try:
        validate_config(checked, use_reference_policy=need_reference_policy(checked), use_critic=False)
    except (AssertionError, ValueError) as error:
        raise InputError(f"verl refuses this configuration: {error}") from error
    with open_dict(config):
        config.trainer.v1.trainer_mode = "gvpo"
    run_ppo(config, task_runner_class=ray.remote(GVPOTaskRunner))
