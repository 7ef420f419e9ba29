"""Groups as Apache Arrow columns: the open format that a replay buffer is stored in, one row a group."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo.errors import InputError
from gvpo.offpolicy.group import Group

FIELDS = pa.schema(
    [
        ("policy_step", pa.int64()),
        ("reference", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("counted", pa.list_(pa.list_(pa.bool_()))),  # null: every token
        ("rewards", pa.list_(pa.float64())),
        ("valid", pa.list_(pa.bool_())),  # null: every response
        ("reference_logps", pa.list_(pa.float64())),  # null: not scored
        ("reward_components", pa.map_(pa.string(), pa.list_(pa.float64()))),
        ("metadata", pa.string()),  # JSON
    ]
)


def encode(groups: Sequence[Group], schema: pa.Schema = FIELDS) -> pa.RecordBatch:
    """One row a group.

    Raises:
        InputError: metadata that JSON cannot hold.
    """
    k = _offsets([len(g) for g in groups])
    inner = _offsets(np.concatenate([g.lengths for g in groups]))
    no_mask = pa.array([g.counted is None for g in groups])
    counted = [g.counted for g in groups if g.counted is not None]
    columns = [
        pa.array([g.policy_step for g in groups], pa.int64()),
        pa.array([g.reference for g in groups], pa.string()),
        pa.ListArray.from_arrays(
            _offsets([len(g.prompt_ids) for g in groups]), np.concatenate([g.prompt_ids for g in groups])
        ),
        pa.ListArray.from_arrays(
            k, pa.ListArray.from_arrays(inner, np.concatenate([g.token_ids for g in groups]))
        ),
        pa.nulls(len(groups), FIELDS.field("counted").type)
        if not counted
        else _masked_lists(groups, no_mask, counted),
        pa.ListArray.from_arrays(k, np.concatenate([g.rewards for g in groups])),
        _optional(groups, lambda g: g.valid, pa.bool_()),
        _optional(groups, lambda g: g.reference_logps, pa.float64()),
        _components(groups),
        pa.array([_json(g.metadata) for g in groups], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _offsets(lengths: Sequence[int] | np.ndarray) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def _masked_lists(groups: Sequence[Group], null: pa.Array, counted: list[np.ndarray]) -> pa.Array:
    kept = [g for g in groups if g.counted is not None]
    outer = _offsets([0 if g.counted is None else len(g) for g in groups])
    inner = pa.ListArray.from_arrays(
        _offsets(np.concatenate([g.lengths for g in kept])), pa.array(np.concatenate(counted))
    )
    return pa.ListArray.from_arrays(outer, inner, mask=null)


def _optional(
    groups: Sequence[Group], of: Callable[[Group], np.ndarray | None], kind: pa.DataType
) -> pa.Array:
    values = [of(g) for g in groups]
    given = [v for v in values if v is not None]
    if not given:
        return pa.nulls(len(groups), pa.list_(kind))
    offsets = _offsets([0 if v is None else len(v) for v in values])
    flat = pa.array(np.concatenate(given), kind)
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array([v is None for v in values]))


def _components(groups: Sequence[Group]) -> pa.Array:
    names = list(chain.from_iterable(g.components for g in groups))
    values = list(chain.from_iterable(g.components.values() for g in groups))
    flat = np.concatenate(values) if values else np.zeros(0)
    items = pa.ListArray.from_arrays(_offsets([len(v) for v in values]), flat)
    return pa.MapArray.from_arrays(
        _offsets([len(g.components) for g in groups]), pa.array(names, pa.string()), items
    )


def _json(metadata: Any) -> str:
    try:
        return json.dumps(metadata, ensure_ascii=False) if metadata else "{}"
    except (TypeError, ValueError) as error:
        raise InputError(f"The metadata of a group is not JSON ({error}): use plain values.") from error


def decode(batch: pa.RecordBatch) -> list[Group]:
    """The groups of a batch; their arrays are views of its memory."""
    if batch.num_rows == 1:
        return [_decode_row(batch)]
    return [_decode_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _decode_row(row: pa.RecordBatch) -> Group:
    step, reference, prompt, completions, counted, rewards, valid, logps, components, metadata = row.columns
    inner = _values(completions)
    text = metadata[0].as_py()
    named = components[0].as_py() if len(components.keys) else ()
    return Group(
        _values(prompt).to_numpy(),
        _values(inner).to_numpy(),
        np.diff(inner.offsets.to_numpy()),
        _values(rewards).to_numpy(),
        reference[0].as_py(),
        None if logps.null_count else _values(logps).to_numpy(),
        None if counted.null_count else _values(_values(counted)).to_numpy(zero_copy_only=False),
        None if valid.null_count else _values(valid).to_numpy(zero_copy_only=False),
        step[0].as_py(),
        {name: np.array(values, dtype=np.float64) for name, values in named},
        {} if text == "{}" else json.loads(text),
    )


def _values(lists: pa.ListArray) -> pa.Array:
    """What the lists hold, one after the other (`.values` ignores a slice; `.flatten` is slow)."""
    offsets = lists.offsets
    return lists.values[offsets[0].as_py() : offsets[-1].as_py()]
