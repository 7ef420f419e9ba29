"""GVPO on verl 0.6.0, the version that the published recipe names, with the same driver-side weights.

What differs from verl's own trainer: `update_actor` of its worker group is called once for each mini-batch of
whole prompts, with weights as advantages. The workers run verl's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import verl.trainer.main_ppo as main_ppo
from omegaconf import DictConfig, open_dict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

from gvpo.errors import InputError
from gvpo.verl.minibatches import rows_short, split_prompts
from gvpo.verl.rollouts import Rollouts, weigh
from gvpo.verl.settings import Settings, read_settings

_Runner: Any = main_ppo.TaskRunner.__ray_metadata__.modified_class
_missing = [name for name in ("_create_dataloader", "init_workers") if not hasattr(RayPPOTrainer, name)]
if _missing or not hasattr(_Runner, "run"):
    raise ImportError(
        "gvpo.verl.v060 works with verl 0.6.0, and this verl is not built like it: install verl==0.6.0."
    )


class GVPORayTrainer(RayPPOTrainer):
    """verl's trainer with GVPO's updates."""

    def __init__(self, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        self.settings = read_settings(config)
        super().__init__(config, *args, **kwargs)

    def _create_dataloader(self, *args: Any, **kwargs: Any) -> None:
        super()._create_dataloader(*args, **kwargs)
        # The workers' scheduler steps at each `update_actor`, which is here a mini-batch and not a rollout.
        updates = self.settings.updates_per_step(self.config.data.train_batch_size)
        optim = self.config.actor_rollout_ref.actor.optim
        with open_dict(self.config):
            optim.total_training_steps = self.total_training_steps * updates
            if (optim.get("lr_warmup_steps", None) or -1) > 0:
                optim.lr_warmup_steps *= updates

    def init_workers(self) -> None:
        super().init_workers()
        group = self.actor_rollout_wg
        group.update_actor = _Updates(self, group, group.update_actor)


class _Updates:
    """Takes the place of the worker group's `update_actor`: all updates for one rollout."""

    def __init__(self, trainer: GVPORayTrainer, group: Any, update_actor: Any) -> None:
        config = trainer.config
        self.trainer, self.group, self.update_actor = trainer, group, update_actor
        self.settings: Settings = trainer.settings
        self.ranks = group.world_size // config.actor_rollout_ref.actor.get(
            "ulysses_sequence_parallel_size", 1
        )
        # verl 0.6.0 divides by this number of rows, whatever the mini-batch holds.
        self.rows = self.settings.mini_batch * config.actor_rollout_ref.rollout.n
        self.dumped = 0

    def __call__(self, batch: DataProto) -> DataProto:
        rollouts = _read(batch, self.settings.reference)
        collected: dict[str, list[float]] = {}
        updates = 0
        for rows in self._mini_batches(rollouts):
            policy = self._score(batch, rows) if updates else rollouts.start[rows]
            weights, result = weigh(rollouts.take(rows), policy, self.settings.beta)
            metrics = self._train(batch, rollouts, rows, weights * self.settings.scale)
            metrics |= {f"gvpo/{name}": value.item() for name, value in result.metrics.items()}
            if self.settings.dump_dir:
                self._dump(batch, rollouts, rows, policy, weights, metrics)
            updates += 1
            for name, value in metrics.items():
                if not np.isnan(value):
                    collected.setdefault(name, []).append(value)
        collected["gvpo/updates"], collected["gvpo/scoring_passes"] = [updates], [updates - 1]
        return DataProto(meta_info={"metrics": collected})

    def _mini_batches(self, rollouts: Rollouts) -> Iterator[list[int]]:
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(rollouts.prompts):
            rows.setdefault(prompt, []).append(i)
        seed = self.settings.seed + self.trainer.global_steps if self.settings.shuffle else None
        for prompts in split_prompts(list(rows), self.settings.mini_batch, self.settings.epochs, seed):
            yield [i for prompt in prompts for i in rows[prompt]]

    def _score(self, batch: DataProto, rows: list[int]) -> Tensor:
        """S of these rows under the current policy, in nats."""
        filled = rows + rows[:1] * rows_short(len(rows), self.ranks)
        part = batch.select_idxs(np.array(filled))
        scored = self.group.compute_log_prob(part).batch["old_log_probs"]
        return _sums(scored, part.batch["response_mask"])[: len(rows)]

    def _train(
        self, batch: DataProto, rollouts: Rollouts, rows: list[int], weights: Tensor
    ) -> dict[str, float]:
        """One update with the gradient of −Σ w S; a row of weight 0 stands in for each that is missing."""
        short = self.rows - len(rows)
        taken = rows + rows[:1] * short
        weights = torch.cat([weights, weights.new_zeros(short)])
        lengths = [rollouts.lengths[i] for i in taken]
        parts = get_seqlen_balanced_partitions(lengths, k_partitions=self.ranks, equal_size=True)
        order = [i for part in parts for i in part]
        part = batch.select_idxs(np.array([taken[i] for i in order]))
        part.meta_info["global_token_num"] = [lengths[i] for i in order]
        advantages = weights[order, None] * self.rows * part.batch["response_mask"]
        part.batch["advantages"] = advantages.float()
        metrics = self.update_actor(part).meta_info["metrics"]
        return {
            name: float(np.mean(value))
            for name, value in metrics.items()
            if name not in ("actor/pg_loss", "actor/kl_loss", "actor/kl_coef")
        }

    def _dump(
        self,
        batch: DataProto,
        rollouts: Rollouts,
        rows: list[int],
        policy: Tensor,
        weights: Tensor,
        metrics: dict[str, float],
    ) -> None:
        """What an update was made of, to be checked by other means; without padding, as on verl 0.9."""
        part = batch.select_idxs(np.array(rows)).batch
        width = part["responses"].shape[1]
        real = part["attention_mask"].bool()
        mini = rollouts.take(rows)
        record = {
            "input_ids": [ids[keep] for ids, keep in zip(part["input_ids"], real, strict=True)],
            "responses": [r[keep[-width:]] for r, keep in zip(part["responses"], real, strict=True)],
            "response_mask": [m[keep[-width:]] for m, keep in zip(part["response_mask"], real, strict=True)],
            "prompts": mini.prompts,
            "sessions": mini.sessions,
            "rewards": mini.rewards,
            "reference_logps": mini.reference,
            "policy_logps": policy,
            "weights": weights,
            "metrics": metrics,
            "step": self.trainer.global_steps,
        }
        folder = Path(self.settings.dump_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(record, folder / f"update_{self.trainer.global_steps:06d}_{self.dumped:04d}.pt")
        self.dumped += 1


def _read(batch: DataProto, reference: str) -> Rollouts:
    mask = batch.batch["response_mask"]
    prompts = [str(prompt) for prompt in batch.non_tensor_batch["uid"]]
    start = _sums(batch.batch["old_log_probs"], mask)
    return Rollouts(
        prompts=prompts,
        sessions=[(prompt, str(i)) for i, prompt in enumerate(prompts)],
        reference=_sums(batch.batch["ref_log_prob"], mask) if reference == "initial" else start,
        start=start,
        rewards=batch.batch["token_level_rewards"].double().sum(-1),
        valid=mask.bool().any(-1),
        lengths=batch.batch["attention_mask"].sum(-1).tolist(),
    )


def _sums(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), values.double(), 0.0).sum(-1)


class GVPOTaskRunner(_Runner):
    """verl's task runner with our trainer in the place of verl's."""

    def run(self, config: DictConfig) -> None:
        main_ppo.RayPPOTrainer = GVPORayTrainer
        super().run(config)


def train(config: DictConfig) -> None:
    """Run verl 0.6.0 with a configuration that `gvpo.verl.settings.prepare` has been through.

    Raises:
        InputError: sizes that verl 0.6.0 cannot split.
    """
    actor = config.actor_rollout_ref.actor
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    ranks = workers // actor.get("ulysses_sequence_parallel_size", 1)
    n = config.actor_rollout_ref.rollout.n
    multiple = ranks * (1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu)
    rows = actor.ppo_mini_batch_size * n
    if rows % multiple:
        raise InputError(
            f"verl 0.6.0 needs ppo_mini_batch_size × rollout.n = {rows} rows to be a multiple of {multiple}, "
            "which is workers × ppo_micro_batch_size_per_gpu: change one, or use verl 0.9, which fills up."
        )
    rows = config.data.train_batch_size * n
    if rows % ranks:
        raise InputError(
            f"verl 0.6.0 needs train_batch_size × rollout.n = {rows} rows to be a multiple of the "
            f"{ranks} workers: change one, or use verl 0.9, which fills up."
        )
    with open_dict(config):
        # The driver repeats, and the workers don't.
        config.gvpo.epochs, actor.ppo_epochs = actor.ppo_epochs, 1
    main_ppo.TaskRunner = ray.remote(num_cpus=1)(GVPOTaskRunner)
    main_ppo.run_ppo(config)
