"""Groups as Apache Arrow columns: the open format that a replay buffer is stored in, one row a group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo.errors import InputError
from gvpo.replay.group import Group

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


def encode(groups: Sequence[Group]) -> pa.RecordBatch:
    """One row a group.

    Raises:
        InputError: metadata that JSON cannot hold.
    """
    sizes = [len(g) for g in groups]
    lengths = _joined([g.lengths for g in groups])
    columns = [
        pa.array([g.policy_step for g in groups], pa.int64()),
        pa.array([g.reference for g in groups], pa.string()),
        _lists([len(g.prompt_ids) for g in groups], _plain(_joined([g.prompt_ids for g in groups]))),
        _lists(sizes, _lists(lengths, _plain(_joined([g.token_ids for g in groups])))),
        _counted(groups),
        _lists(sizes, _plain(_joined([g.rewards for g in groups]))),
        _optional([g.valid for g in groups], FIELDS.field("valid").type),
        _optional([g.reference_logps for g in groups], FIELDS.field("reference_logps").type),
        _components(groups),
        pa.array([_json(g.metadata) for g in groups], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=FIELDS)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _plain(values: np.ndarray) -> pa.Array:
    """Numbers without copying them (`pa.array` would look at each, and for pandas)."""
    if values.dtype == bool:
        return pa.array(values)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def _lists(lengths: Sequence[int] | np.ndarray, values: pa.Array, null: list[bool] | None = None) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    mask = None if null is None else pa.array(null)
    return pa.ListArray.from_arrays(_plain(offsets), values, mask=mask)


def _optional(values: list[np.ndarray | None], kind: pa.DataType) -> pa.Array:
    given = [v for v in values if v is not None]
    if not given:
        return pa.nulls(len(values), kind)
    lengths = [0 if v is None else len(v) for v in values]
    return _lists(
        lengths, _plain(_joined(given)), None if len(given) == len(values) else [v is None for v in values]
    )


def _counted(groups: Sequence[Group]) -> pa.Array:
    kept = [g for g in groups if g.counted is not None]
    if not kept:
        return pa.nulls(len(groups), FIELDS.field("counted").type)
    flags = pa.array(np.concatenate([g.counted for g in kept if g.counted is not None]))
    inner = _lists(_joined([g.lengths for g in kept]), flags)
    sizes = [0 if g.counted is None else len(g) for g in groups]
    return _lists(sizes, inner, [g.counted is None for g in groups])


def _components(groups: Sequence[Group]) -> pa.Array:
    names = list(chain.from_iterable(g.components for g in groups))
    values = list(chain.from_iterable(g.components.values() for g in groups))
    items = _lists([len(v) for v in values], _plain(_joined(values) if values else np.zeros(0)))
    offsets = np.cumsum([0, *(len(g.components) for g in groups)], dtype=np.int32)
    return pa.MapArray.from_arrays(_plain(offsets), pa.array(names, pa.string()), items)


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
