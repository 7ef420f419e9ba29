"""A replay buffer as a Parquet file, for other tools and for `offline`."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo.errors import InputError
from gvpo.replay.columns import FIELDS, encode
from gvpo.replay.view import ReplayView

_AT_ONCE = 256  # groups in memory


def export(folder: str | Path, output: str | Path) -> int:
    """Write all groups of a buffer (`ReplayView`) in the columns of `FIELDS`, a row each; returns how many.

    Raises:
        InputError: there is no buffer, or a damaged one; or the file cannot be written, and nothing is left.
    """
    output = Path(output)
    aside = output.with_name(f".{output.name}.partial")
    with ReplayView(folder, memory=0, hold=True) as view:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(aside, FIELDS) as writer:
                for start in range(0, len(view), _AT_ONCE):
                    groups = view.read(range(start, min(start + _AT_ONCE, len(view))))
                    writer.write_batch(encode(groups))
            os.replace(aside, output)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{output} cannot be written ({error}): choose another place.") from error
        finally:
            if aside.exists():
                aside.unlink()
        return len(view)
