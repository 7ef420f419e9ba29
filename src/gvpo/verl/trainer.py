"""GVPO on verl 0.9, in all of its trainers: the driver computes weights, verl's own workers do the rest.

What differs from verl's trainers: `_update_actor` makes an update for each mini-batch of whole prompts
(`gvpo.verl.updates`), with the workers' own `compute_log_prob` and `update_actor`, and weights as advantages.
Old log-probabilities are asked for only where they are S' (`gvpo.verl.references`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from copy import deepcopy
from statistics import fmean
from typing import Any

import ray
import transfer_queue as tq
import verl.trainer.ppo.v1.trainer_separate_async as separate
from omegaconf import DictConfig, open_dict
from transfer_queue import KVBatchMeta
from verl.experimental.reward_loop import migrate_legacy_reward_impl
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.utils import need_reference_policy
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from gvpo.errors import InputError
from gvpo.run import Rule
from gvpo.verl.offpolicy import OffPolicy
from gvpo.verl.queued import Queued, is_padding, put, session_of
from gvpo.verl.references import staleness
from gvpo.verl.reward import default_reward
from gvpo.verl.rollouts import rows_short
from gvpo.verl.settings import read_settings
from gvpo.verl.updates import Updates, count_updates
from gvpo.verl.watch import Watch

_TOUCHED = (
    "_balance_batch", "_build_replay_buffer", "_compute_metrics", "_compute_old_log_prob",
    "_get_required_batch_multiple", "_init_dataloader", "_init_resource_pool_mgr", "_load_checkpoint",
    "_log_rollout_data", "_rollout_server_managers", "_save_checkpoint", "_submit_batch_to_rollout",
    "_update_actor", "fit", "step",
)  # fmt: skip
_missing = [name for name in _TOUCHED if not hasattr(PPOTrainer, name)]
_missing += [name for name in ("_TQ_CONTROLLER", "_TQ_STORAGE") if not hasattr(tq.interface, name)]
if _missing:
    raise ImportError(
        f"gvpo.verl works with verl 0.9.1 and TransferQueue 0.1.11: these have no {', '.join(_missing)}. "
        "Install those versions, or tell the GVPO developers of the new ones."
    )
_COUNTS = ("gvpo/updates", "gvpo/scoring_passes", "gvpo/steps_skipped")


class GVPOUpdates(OffPolicy):
    """GVPO's updates in one of verl's V1 trainers; to be named before it among the bases.

    Args:
        config: a configuration that `gvpo.verl.settings.prepare` has been through.
    """

    def __init__(self, config: DictConfig) -> None:
        self.settings = read_settings(config)
        self.updates = Updates(self.settings)
        self.row_multiple = self.settings.row_multiple
        self._counts: Counter[str] = Counter()
        self.rules = [Rule.parse(text) for text in self.settings.warn_when]
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.MODE
        super().__init__(config)
        self.updates_per_step = self.settings.updates_per_step(config.data.train_batch_size)
        self.plan_versions()

    # What verl calls while it puts the trainer together:

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        if self.settings.poll_seconds is not None:
            buffer.poll_interval = self.settings.poll_seconds
        return buffer

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        count_updates(self.config, self.settings, self.total_training_steps)

    # Checkpoints:

    def _save_checkpoint(self) -> None:
        # Before verl's own files, the last of which makes the checkpoint count.
        folder = self._own_folder()
        folder.mkdir(parents=True, exist_ok=True)
        state = {"bad_in_a_row": self.updates.bad_in_a_row}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if self.settings.reference == "moving":
            self.versions.write(folder / "references")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self.versions.workers = self.actor_rollout_wg
        if not self.global_steps:
            return
        folder = self._own_folder()
        if (state := folder / "state.json").exists():
            self.updates.bad_in_a_row = json.loads(state.read_text(encoding="utf-8"))["bad_in_a_row"]
        self.versions.read(folder / "references")
        if self.MODE != "sync":
            self._account_for_groups_in_flight()

    def _account_for_groups_in_flight(self) -> None:
        """Drop what of TransferQueue's checkpoint has been trained already, and say what remains.

        verl saves the queue before it clears a step's rows (docs/upstream/verl-async.md).
        """
        tags = (tq.kv_list("train") or {}).get("train", {})
        prompts = {key: tag["status"] for key, tag in tags.items() if tag.get("is_prompt")}
        trained = [key for key in tags if key not in prompts and session_of(key)[0] not in prompts]
        if trained:
            tq.kv_clear(keys=trained, partition_id="train")
        status = Counter(prompts.values())
        again = status["pending"] + status["running"]
        print(
            f"gvpo: resumed after step {self.global_steps} with {len(prompts)} groups in flight: "
            f"{len(prompts) - again} are complete, {again} are sampled again; rows of groups that had been "
            f"trained: {len(trained)}, dropped.",
            flush=True,
        )

    # A step:

    def fit(self, agent_loop_manager: Any) -> None:
        storage = tq.interface._TQ_STORAGE or {}
        watch = Watch(self.settings.watch_seconds)
        watch.add("a training worker", self.actor_rollout_wg.workers)
        for servers in self._rollout_server_managers():
            replicas = servers.get_replicas()
            watch.add("a rollout server", [server for replica in replicas for server in replica.servers])
            if servers is not self.llm_server_manager:
                watch.add("a rollout server's worker", [w for replica in replicas for w in replica.workers])
            watch.add("the rollouts' load balancer", [servers.global_load_balancer])
        watch.add("an agent loop worker", agent_loop_manager.agent_loop_workers)
        watch.add("a reward worker", self.get_reward_handles() or [])
        watch.add("a store of TransferQueue", list(storage.get("SimpleStorage", {}).values()))
        watch.add("TransferQueue's controller", [tq.interface._TQ_CONTROLLER])
        with watch.watching():
            super().fit(agent_loop_manager)

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self._counts.clear()
        batch = super().step(metrics, timing_raw)
        metrics |= self._counts  # of which verl takes the mean over the parts of a step
        for rule in [rule for rule in self.rules if rule.holds(metrics)]:
            self.rules.remove(rule)  # once is enough
            warnings.warn(
                f"Step {self.global_steps}: {rule.metric} is {metrics[rule.metric]:.4g}, and gvpo.warn_when "
                f"has {rule}.",
                stacklevel=2,
            )
        return batch

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        # verl's own answer also fits mini-batches of equal row counts, which ours need not have.
        self.row_multiple = dp_size * self.settings.row_multiple
        return self.row_multiple

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Balance tokens over the ranks, with padding rows enough to fill up each mini-batch on its own."""
        if not len(batch):
            raise RuntimeError(
                "No response arrived: every session of the rollout failed, as the log says above."
            )
        batch = self.joined(batch, metrics)
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        padding = sum(1 for tag in batch.tags if is_padding(tag))
        mini_batches = self.updates.mini_batches(self.prompts(batch), self.global_steps)
        parts = [*mini_batches, *self.to_score(batch).values()]
        short = max(rows_short(len(rows), self.row_multiple) for rows in parts)
        if short <= padding:
            return batch
        size = len(batch) + self.row_multiple  # enough, for no mini-batch is short of more
        batch = upsample_batch_to_divisible_size(batch, size, self.tokenizer.eos_token_id)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        returns = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["returns"])
        spans, references = self.spans(batch), self.references(batch)
        per_step, parts = self.updates_per_step, self.parameter_sync_step
        made = (self.global_steps - 1) * per_step + self.local_trigger_step * per_step // parts
        ages = {prompt: made - per_step * min(span)[0] for prompt, span in spans.items()}
        rows = Queued(self, batch, references, ages, self.fresh)
        found = self.updates.run(self.global_steps, self.prompts(batch), rows)
        self._counts.update({name: found.pop(name) for name in _COUNTS})
        metrics |= found
        if rows.entropies:
            metrics["actor/entropy"] = fmean(rows.entropies)
        if self.MODE != "sync" or self.settings.reference == "moving":
            metrics |= staleness(spans, ages, {n: made - per_step * v for n, v in references.items()})
        # What verl logs as advantages are again its own.
        put(batch, range(len(batch)), advantages=returns["returns"])
        self.trained(rows)
        return batch


@register_trainer("gvpo_sync")
class GVPOSync(GVPOUpdates, PPOTrainerSync):
    """verl's synchronous trainer with GVPO's updates."""

    MODE = "sync"


@register_trainer("gvpo_colocate_async")
class GVPOColocateAsync(GVPOUpdates, PPOTrainerColocateAsync):
    """verl's trainer whose unfinished responses wait while it trains, on the same GPUs."""

    MODE = "colocate_async"


@register_trainer("gvpo_separate_async")
class GVPOSeparateAsync(GVPOUpdates, separate.PPOTrainerSeparateAsync):
    """verl's trainer beside whose GPUs others go on generating."""

    MODE = "separate_async"

    def _setup(self) -> None:
        if not self._enable_hybrid_replicas:
            # What verl logs then is an error (docs/upstream/verl-async.md).
            separate.logger.setLevel(logging.WARNING)
        super()._setup()


# verl decorates its class in place; this is the class itself.
class GVPOTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's V1 task runner, in a module whose import registers the trainers in the runner's process."""


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
        config.trainer.v1.trainer_mode = f"gvpo_{config.trainer.v1.trainer_mode}"
    run_ppo(config, task_runner_class=ray.remote(GVPOTaskRunner))
