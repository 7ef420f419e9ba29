"""Responses that the rollout servers did not just sample: replay and demonstrations on verl.

Groups of earlier steps are in the store of `gvpo.replay`. The driver holds it, as it computes the weights of
whole groups anyway; verl's workers see rows like any other. A replayed row brings its S' in its tag
(`reference_logp`), and so is scored under no reference.
"""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import build_padding_position_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import assign_non_tensor_stack, get, list_of_dict_to_tensordict

from gvpo.errors import InputError
from gvpo.replay.demonstrations import Demonstrations
from gvpo.replay.group import Group, worth_keeping
from gvpo.replay.reuse import Reuse
from gvpo.replay.tokens import Encoder
from gvpo.verl.queued import Queued, session_of
from gvpo.verl.references import References
from gvpo.verl.settings import SHOWN
from gvpo.verl.updates import REPLAYED

Row = dict[str, Any]
_TOKENS = ("prompts", "responses", "response_mask")
_STATE = "run.json"


class Replay(Reuse):
    """The groups of a run. Steps are those of verl: `step` is the version of the present policy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, group_size=None, **kwargs)
        self._numbers = itertools.count()

    def join(self, batch: KVBatchMeta, groups: Sequence[Group], step: int, updates: int) -> KVBatchMeta:
        """The batch and rows of these groups, which are put into TransferQueue.

        Args:
            batch: fresh rows, of which the first is a pattern for fields that replay does not know.
            groups: to be replayed at `step`.
            updates: of a step, for ages.

        Raises:
            InputError: the rows have images, or a record of experts, which are not stored.
        """
        if not groups:
            return batch
        first = tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id)[0]
        pattern = {name: first[name] for name in first.keys()}  # noqa: SIM118 (whose items would be wrapped)
        if pattern.get("multi_modal_inputs") or "routed_experts" in pattern:
            raise InputError(
                "gvpo.replay_ratio does not go with images in prompts or with recorded experts, which are "
                "not stored: set it to 0."
            )
        keys, rows, tags = list[str](), list[Row](), list[Row]()
        stored = self.options.replay_reference == "stored"
        for group in groups:
            age = updates * max(0, self.earlier + step - group.policy_step)
            tag = batch.tags[0] | {"is_replayed": True, "age": age}
            tag |= dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), step)
            for key, row, own in rows_of(group, f"{REPLAYED}{next(self._numbers):012d}", pattern, stored):
                keys.append(key)
                rows.append(row)
                tags.append(tag | own)
        fields = list_of_dict_to_tensordict(rows)
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields, tags=tags)
        return KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[*batch.keys, *keys],
            tags=[*batch.tags, *tags],
            extra_info=batch.extra_info,
        )

    def store(
        self, rows: Queued, prompts: Mapping[str, list[int]], step: int, shown: Mapping[str, list[int]]
    ) -> int:
        """Keep the fresh groups of a step; returns how many could not be, for a session left several rows.

        `step` is the version of the policy that was trained, `shown` has the sessions of each prompt that are
        demonstrations.
        """
        fresh = {n: at for n, at in prompts.items() if not rows.batch.tags[at[0]].get("is_replayed")}
        whole = {n: at for n, at in fresh.items() if len({rows.rollouts.sessions[i] for i in at}) == len(at)}
        every = [i for at in whole.values() for i in at]
        if not every:
            return len(fresh)
        data = tq.kv_batch_get(
            keys=[rows.batch.keys[i] for i in every],
            partition_id=rows.batch.partition_id,
            select_fields=list(_TOKENS),
        )
        tokens = {field: dict(zip(every, data[field].unbind(), strict=True)) for field in _TOKENS}
        groups = []
        for name, places in whole.items():
            at = sorted(places, key=lambda i: int(rows.rollouts.sessions[i][1]))
            its = rows.rollouts.take(at)
            rewards, logps = its.rewards.tolist(), its.reference.tolist()
            valid = (its.valid & ~its.rewards.isnan()).tolist()
            if not worth_keeping(rewards, valid, logps):
                continue
            asked, answers, masks = ([tokens[field][i].numpy() for i in at] for field in _TOKENS)
            version = rows.references.get(name)
            reference = "initial" if version is None else f"version {version}"
            begun = [rows.batch.tags[i].get("min_global_steps") for i in at]
            group = Group.of(
                asked,
                answers,
                rewards,
                reference=f"{reference} of run {self.run}",
                reference_logps=logps,
                counted=masks,
                valid=valid,
                policy_step=self.earlier + min(step if b is None else int(b) for b in begun),
                metadata={"demonstrations": shown[name]} if shown.get(name) else None,
            )
            groups.append(group)
        self.keep(groups, step)
        return len(fresh) - len(whole)


def rows_of(group: Group, name: str, pattern: Row, stored: bool) -> Iterator[tuple[str, Row, Row]]:
    """The key, the fields and the tag of each response that takes part, as verl's agent loops write them.

    They become those of the prompt called `name`, have the fields of `pattern`, a row of the same run, and
    with `stored` bring their S'.
    """
    columns = zip(group.prompts, group.completions, group.masks, strict=True)
    for i, row in enumerate(columns):
        if not group.takes_part[i]:
            continue
        prompts, responses, counted = (torch.tensor(values, dtype=torch.long) for values in row)
        input_ids = torch.cat([prompts, responses])
        scores = torch.zeros(len(responses), dtype=torch.float32)
        scores[-1] = group.rewards[i]
        every = torch.ones_like(input_ids)
        own = {
            "prompts": prompts,
            "responses": responses,
            "input_ids": input_ids,
            "attention_mask": every,
            "position_ids": build_padding_position_ids(pattern.get("position_ids"), every),
            "response_mask": counted,
            "loss_mask": counted,
            "rm_scores": scores,
            "rollout_log_probs": torch.zeros_like(scores),
            "uid": name,
            "session_id": i,
            "num_turns": 2,
        }
        tag: Row = {"prompt_len": len(prompts), "response_len": len(responses), "seq_len": len(input_ids)}
        if stored and group.reference_logps is not None:
            tag["reference_logp"] = float(group.reference_logps[i])
        yield f"{name}_{i}_0", pattern | {field: own[field] for field in own if field in pattern}, tag


def sampled(batch: KVBatchMeta) -> KVBatchMeta:
    """The batch without replayed rows."""
    rows = zip(batch.keys, batch.tags, strict=True)
    return batch.select_keys([key for key, tag in rows if not tag.get("is_replayed")])


def shown_in(batch: KVBatchMeta) -> tuple[dict[str, list[int]], dict[str, float]]:
    """The sessions of each prompt that are demonstrations, and what is logged of these rewarded rows."""
    names = ["rm_scores", SHOWN]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    rewards: dict[bool, list[float]] = {True: [], False: []}
    shown: dict[str, list[int]] = {}
    for key, given, scores in zip(batch.keys, data[SHOWN], data["rm_scores"].unbind(), strict=True):
        prompt, session = session_of(key)
        rewards[int(session) in given].append(float(scores.sum()))
        if int(session) in given:
            shown.setdefault(prompt, []).append(int(session))
    facts = {"demonstrations/rows": float(len(rewards[True]))}
    for name, values in (("reward", rewards[True]), ("sampled_reward", rewards[False])):
        if values:
            facts[f"demonstrations/{name}"] = float(np.nanmean(values))
    return shown, facts


class OffPolicy(References):
    """Replay and demonstrations.

    Attributes:
        replay: the groups of earlier steps; None without `gvpo.replay_ratio`.
        demonstrations: which given answers go where; None without `gvpo.demonstrations_per_group`.
    """

    replay: Replay | None = None
    demonstrations: Demonstrations | None = None
    _numbers: Any = None  # of groups that were given demonstrations

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

    def _own_folder(self) -> Path:
        """GVPO's part of the checkpoint of this step."""
        trainer, step = self.config.trainer, f"global_step_{self.global_steps}"
        given = Path(trainer.resume_from_path or "")
        resumed = trainer.resume_mode == "resume_path" and given.name == step
        return (given if resumed else Path(trainer.default_local_dir) / step) / "gvpo"

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
            self._shown, facts = shown_in(batch)
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
        if self.replay is not None:
            step = self.global_steps - 1
            if lost := self.replay.store(rows, self.prompts(rows.batch), step, self._shown):
                warnings.warn(
                    f"Step {self.global_steps}: {lost} groups are not kept for replay, for their sessions "
                    "left several rows.",
                    stacklevel=2,
                )
        super().trained(rows)

    # What verl logs is of responses that were sampled.

    def _compute_metrics(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(sampled(batch), *args, **kwargs)

    def _log_rollout_data(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> None:
        super()._log_rollout_data(sampled(batch), *args, **kwargs)
