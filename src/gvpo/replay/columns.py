"""Groups as Apache Arrow columns: the open format of a replay buffer and of its export, one row a group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo.errors import refused
from gvpo.replay.group import Group

FIELDS = pa.schema(
    [
        ("policy_step", pa.int64()),
        ("reference", pa.string()),
        ("prompt_ids", pa.list_(pa.list_(pa.int32()))),  # one that all rows share, or one a row
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("counted", pa.list_(pa.list_(pa.bool_()))),  # null: every token
        ("rewards", pa.list_(pa.float64())),
        ("valid", pa.list_(pa.bool_())),  # null: every response
        ("reference_logps", pa.list_(pa.float64())),  # null: not scored
        ("reward_components", pa.map_(pa.string(), pa.list_(pa.float64()))),
        ("metadata", pa.string()),  # JSON
    ]
)


def encode(groups: Sequence[Group]) -> pa.RecordBatch:
    """One row a group.

    Raises:
        InputError: metadata that JSON cannot hold.
    """
    rows = []
    for group in groups:
        with refused("The metadata of a group is not JSON", "use plain values", (TypeError, ValueError)):
            metadata = json.dumps(group.metadata, ensure_ascii=False)
        row: dict[str, Any] = {
            "policy_step": group.policy_step,
            "reference": group.reference,
            "prompt_ids": group.own_prompts or [group.prompt_ids],
            "completion_ids": group.completions,
            "counted": group.counted_of_each,
            "rewards": group.rewards,
            "valid": group.valid,
            "reference_logps": group.reference_logps,
            "reward_components": list(group.components.items()),
            "metadata": metadata,
        }
        rows.append(row)
    return pa.RecordBatch.from_pylist(rows, schema=FIELDS)


def decode(row: pa.RecordBatch) -> Group:
    """The group of a batch of one row; its arrays are views of the batch's memory."""
    column = dict(zip(FIELDS.names, row.columns, strict=True))
    prompts, completions = _values(column["prompt_ids"]), _values(column["completion_ids"])
    flags, valid, logps = column["counted"], column["valid"], column["reference_logps"]
    return Group(
        _values(prompts).to_numpy(),
        _values(completions).to_numpy(),
        np.diff(completions.offsets.to_numpy()),
        _values(column["rewards"]).to_numpy(),
        column["reference"][0].as_py(),
        None if logps.null_count else _values(logps).to_numpy(),
        None if flags.null_count else _values(_values(flags)).to_numpy(zero_copy_only=False),
        None if valid.null_count else _values(valid).to_numpy(zero_copy_only=False),
        np.diff(prompts.offsets.to_numpy()) if len(prompts) > 1 else None,
        column["policy_step"][0].as_py(),
        {name: np.array(values) for name, values in column["reward_components"][0].as_py()},
        json.loads(column["metadata"][0].as_py()),
    )


def _values(lists: pa.ListArray) -> pa.Array:
    """What the lists hold, one after the other (`.values` ignores a slice; `.flatten` is slow)."""
    offsets = lists.offsets
    return lists.values[offsets[0].as_py() : offsets[-1].as_py()]
