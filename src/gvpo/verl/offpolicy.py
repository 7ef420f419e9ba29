"""The part of a GVPO trainer on verl that trains responses which the rollout servers did not just sample."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import assign_non_tensor_stack, get

from gvpo.errors import InputError
from gvpo.replay.demonstrations import Demonstrations
from gvpo.replay.tokens import Encoder
from gvpo.verl.queued import Queued
from gvpo.verl.references import References
from gvpo.verl.replay import Replay, sampled, shown_in
from gvpo.verl.settings import SHOWN

_STATE = "run.json"


class OffPolicy(References):
    """Replay and demonstrations.

    Attributes:
        replay: the groups of earlier steps; None without `gvpo.replay_ratio`.
        demonstrations: which given answers go where; None without `gvpo.demonstrations_per_group`.
    """

    replay: Replay | None = None
    demonstrations: Demonstrations | None = None
    _numbers: Any = None  # of groups that were given demonstrations

    @abstractmethod
    def _own_folder(self) -> Path:
        """GVPO's part of the checkpoint of this step."""

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        options, data = self.settings.off_policy, self.config.data
        if not (options.replay_ratio or options.demonstrations_per_group):
            return
        model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        ends = getattr(model.generation_config, "eos_token_id", None) or []
        encoder = Encoder(
            self.tokenizer,
            [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id],
            vocabulary_size=model.hf_config.get_text_config().vocab_size,
            chat_template_kwargs=dict(data.get("apply_chat_template_kwargs", None) or {}),
        )
        seed = data.get("seed", None) or 0
        if options.replay_ratio:
            home, reference = self.config.trainer.default_local_dir, self.settings.reference
            self.replay = Replay(options, home, encoder, seed=seed, reference=reference)
        if options.demonstrations_per_group:
            self.demonstrations = Demonstrations(
                encoder,
                options.demonstrations_per_group,
                self.config.actor_rollout_ref.rollout.n,
                options.demonstration_slots,
                options.demonstration_column,
                data.max_response_length,
                seed,
            )
            column, prompts = options.demonstration_column, data.get("prompt_key", "prompt")
            rows: Any = getattr(self.train_dataset, "dataframe", None)
            if rows is not None:  # a data set class of one's own may have none
                rows = rows.select_columns([n for n in (column, prompts) if n in rows.column_names])
                self.demonstrations.check({**row, "prompt": row[prompts]} for row in rows)

    # ----------------------------------------------------------------------------------------- checkpoints

    def _replay_folder(self) -> Path:
        return self._own_folder().with_name("gvpo_replay")

    def _save_checkpoint(self) -> None:
        if self.replay is not None:
            folder = self._replay_folder()
            if self.config.trainer.default_hdfs_dir is None:
                # Groups stay on the disk while a checkpoint names them: not of those that verl has deleted.
                for other in folder.parent.parent.glob(f"global_step_*/{folder.name}"):
                    if other != folder and not (other.parent / "actor").exists():
                        shutil.rmtree(other, ignore_errors=True)
            state = self.replay.save(folder)
            (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.replay is None:
            return
        if not self.global_steps:
            self.replay.begin()
            return
        folder = self._replay_folder()
        if not (folder / _STATE).exists():
            warnings.warn(f"{folder.parent} has no replay buffer: replay starts empty.", stacklevel=2)
            self.replay.restore({})
            return
        self.replay.restore(json.loads((folder / _STATE).read_text(encoding="utf-8")), folder)

    # ---------------------------------------------------------------------------------------------- a step

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        if self.demonstrations is not None:
            if "agent_name" in batch:
                raise InputError(
                    "gvpo.demonstrations_per_group does not go with a column agent_name, whose agents know "
                    "nothing of them: remove it."
                )
            if self._numbers is None:
                self._numbers = itertools.count((self.global_steps - 1) * self.config.data.train_batch_size)
            column, chosen = self.demonstrations.column, []
            for prompt, given in zip(get(batch, "raw_prompt"), get(batch, column), strict=True):
                shown = self.demonstrations.chosen({"prompt": prompt, column: given}, next(self._numbers))
                default = self.settings.off_policy.demonstration_reward
                chosen.append(
                    {slot: (d.ids, default if d.reward is None else d.reward) for slot, d in shown.items()}
                )
            assign_non_tensor_stack(batch, SHOWN, chosen)
        return super()._submit_batch_to_rollout(batch)

    def joined(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """The fresh rows that were sampled for an update, and those that are replayed beside them."""
        self._shown: dict[str, list[int]] = {}
        if self.demonstrations is not None:
            self._shown, facts = shown_in(batch, SHOWN)
            metrics |= facts
        if self.replay is None:
            return batch
        step = self.global_steps - 1
        if self.local_trigger_step == 0:
            self._stored_before = self.replay.buffer.next_number  # a group comes back in a later step
        owed = self.replay.owed(len(self.prompts(batch)))
        groups = self.replay.take(owed, step, self._stored_before)
        for name, (total, count) in self.replay.facts(groups, step).items():
            if count is None or count:
                metrics[name] = total if count is None or name.endswith("_max") else total / count
        return self.replay.join(batch, groups, step, self.updates_per_step)

    def trained(self, rows: Queued) -> None:
        """After the updates of these rows, whose rewards and S' are known."""
        if self.replay is None:
            return
        lost = self.replay.store(rows, self.prompts(rows.batch), self.global_steps - 1, self._shown)
        if lost:
            warnings.warn(
                f"Step {self.global_steps}: {lost} groups are not kept for replay, for their sessions left "
                "several rows.",
                stacklevel=2,
            )

    # What verl logs is of responses that were sampled.

    def _compute_metrics(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(sampled(batch), *args, **kwargs)

    def _log_rollout_data(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> None:
        super()._log_rollout_data(sampled(batch), *args, **kwargs)
