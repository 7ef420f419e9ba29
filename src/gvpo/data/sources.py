"""Rows from .jsonl and .parquet files and from the Hugging Face Hub, one at a time.

Files are streamed, so a file larger than memory can be read. Whatever cannot be read is an `InputError` that
names the file and the row (rows count from 1). The Hub is read by `datasets`; files are not, since its JSON
reader (5.2) fills missing columns with None and counts a damaged row from the block that it is in.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gvpo.errors import InputError, refused

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet")
_BATCH_ROWS = 1024


def looks_like_file(source: str) -> bool:
    """Whether `source` names a local file rather than a Hub data set."""
    return source.endswith(SUFFIXES) or source.startswith(("/", "./", "../", "~")) or Path(source).is_file()


def read_file(path: str | Path) -> Iterator[Row]:
    """Rows of a local .jsonl or .parquet file, in order.

    Raises:
        InputError: the file is missing, empty, not UTF-8, of another type, or a row is no object.
    """
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """The same rows, each with the number of its line in the file, from 1 (of Parquet: of the row)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a .jsonl or .parquet file that exists.")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} has no rows: give a file with at least one.")
    yield first
    yield from rows


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is neither .jsonl nor .parquet: convert it to one of these.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                # A byte-order mark is what editors on Windows leave; everything else must be plain UTF-8.
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                byte = f"{error.object[error.start]:#04x}"
                raise InputError(f"{where}: byte {byte} is not UTF-8; save it as UTF-8.") from error
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise InputError(f"{where} is not JSON ({reason}): write one object a line.") from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object: write one object a line.")
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    kinds = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    with (
        refused(f"{path} cannot be read as parquet", "write it again", kinds),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        batches = file.iter_batches(batch_size=_BATCH_ROWS)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


_CHECK = "check its name and the network, or give a local file instead"


def read_hub(dataset: str, *, config: str | None, split: str, revision: str | None) -> Iterator[Row]:
    """Rows of a split of a Hub data set, streamed.

    Raises:
        InputError: the data set, configuration, split or revision cannot be loaded.
    """
    import datasets

    # The Hub client raises a dozen unrelated types for "not there".
    with refused(f"the Hub data set {dataset!r} (split {split!r}) cannot be loaded", _CHECK):
        yield from datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True)


def hub_revision(dataset: str, revision: str | None) -> str:
    """The commit that `revision` (default: the main branch) of a Hub data set stands for.

    Raises:
        InputError: the Hub cannot be asked, or knows no such data set or revision.
    """
    from huggingface_hub import HfApi

    with refused(f"the revision of the Hub data set {dataset!r} cannot be resolved", _CHECK):
        return str(HfApi().dataset_info(dataset, revision=revision).sha)
