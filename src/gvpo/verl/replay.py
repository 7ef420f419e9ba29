"""Groups of earlier steps, in the store of `gvpo.replay`, as rows of a rollout in TransferQueue and back.

The driver holds the store, as it computes the weights of whole groups anyway; verl's workers see rows like
any other. A replayed row brings its S' in its tag (`reference_logp`), and so is scored under no reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import build_padding_position_ids
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from gvpo.errors import InputError
from gvpo.replay.group import Group, worth_keeping
from gvpo.replay.reuse import Reuse
from gvpo.verl.queued import Queued, session_of
from gvpo.verl.updates import REPLAYED

Row = dict[str, Any]
_TOKENS = ("prompts", "responses", "response_mask")


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
        tag = {"prompt_len": len(prompts), "response_len": len(responses), "seq_len": len(input_ids)}
        if stored and group.reference_logps is not None:
            tag["reference_logp"] = float(group.reference_logps[i])
        yield f"{name}_{i}_0", pattern | {field: own[field] for field in own if field in pattern}, tag


def sampled(batch: KVBatchMeta) -> KVBatchMeta:
    """The batch without replayed rows."""
    rows = zip(batch.keys, batch.tags, strict=True)
    return batch.select_keys([key for key, tag in rows if not tag.get("is_replayed")])


def shown_in(batch: KVBatchMeta, column: str) -> tuple[dict[str, list[int]], dict[str, float]]:
    """The sessions of each prompt that are demonstrations, and what is logged of them.

    The rows are fresh and rewarded; in `column` is what the driver has given to each prompt's sessions.
    """
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores", column]
    )
    rewards: dict[bool, list[float]] = {True: [], False: []}
    shown: dict[str, list[int]] = {}
    for key, given, scores in zip(batch.keys, data[column], data["rm_scores"].unbind(), strict=True):
        prompt, session = session_of(key)
        rewards[int(session) in given].append(float(scores.sum()))
        if int(session) in given:
            shown.setdefault(prompt, []).append(int(session))
    facts = {"demonstrations/rows": float(len(rewards[True]))}
    for name, values in (("reward", rewards[True]), ("sampled_reward", rewards[False])):
        if values:
            facts[f"demonstrations/{name}"] = float(np.nanmean(values))
    return shown, facts
