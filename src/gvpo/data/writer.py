"""Prompt data sets on disk: one parquet a split that verl and TRL both read, and a manifest.

The same input gives byte-identical files: no times, no paths, a fixed schema and fixed row groups.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pyarrow.parquet

from gvpo import __version__
from gvpo.data.logs import Logs
from gvpo.data.prompts import SPLITS, iterate_prompts
from gvpo.data.recipes import RECIPES
from gvpo.data.sources import SUFFIXES, Row, hub_revision, looks_like_file
from gvpo.errors import InputError, refused

_ROWS_PER_GROUP = 1024
_TEXT = pyarrow.string()
_TASK = {"task": _TEXT, "entry": _TEXT}
_EXTRA = {"split": _TEXT, "index": pyarrow.int64(), "question": _TEXT}
_LOGGED = {"content": _TEXT, "reward": pyarrow.float64(), "complete": pyarrow.bool_()}
_LOGGED |= {"completion_ids": pyarrow.list_(pyarrow.int32())}
# Of columns that not every data set has.
_OWN = {"answer": _TEXT, **_TASK, "logged": pyarrow.list_(pyarrow.struct(_LOGGED))}
Progress = Callable[[str, int], None]


def write_dataset(
    name: str,
    output: str | Path,
    *,
    sources: Sequence[str] = (),
    revision: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write `train.parquet`, `test.parquet` (as far as there are such splits) and `manifest.json`.

    Args:
        name: a data set as `load_prompts` takes it, but `arithmetic`, which needs no files.
        output: folder; files of these names in it are replaced once everything is written, and only then.
        sources: local files, folders with train and test files, or one Hub id. Empty for the name's own.
        revision, seed, options: as for `load_prompts`; the manifest, which is returned, has the commit.
        progress: called with the split and the number of its rows written so far.

    Raises:
        InputError: anything about the input or the output folder; nothing is left half-written.
    """
    if name.partition(":")[0] == "arithmetic":
        raise InputError("arithmetic is made on the fly and needs no files: name it where data is asked for.")
    origins = _origins(name, sources)
    on_hub = [origin for origin in set(origins.values()) if origin and not looks_like_file(origin)]
    commit = hub_revision(on_hub[0], revision) if on_hub else None
    manifest: dict[str, Any] = {"name": name, "gvpo": __version__, "splits": {}}
    with _aside(Path(output), manifest) as aside:
        for split, origin in origins.items():
            prompts, rows = iterate_prompts(
                name, split=split, source=origin, revision=commit, seed=seed, **options
            )
            path = aside / f"{split}.parquet"
            written = _write_parquet(path, rows, prompts.recipe.ability, split, progress)
            if not written:
                why = f"no usable row of {prompts.seen} for {split} ({prompts.describe_dropped()})"
                raise InputError(f"{origin or name}: {why}.")
            manifest |= {"instruction": prompts.instruction, "system_prompt": prompts.system_prompt}
            manifest["splits"][split] = {
                **_provenance(origin, commit, seed),
                "rows_read": prompts.seen,
                "rows_written": written,
                "rows_dropped": dict(sorted(prompts.dropped.items())),
                "file": path.name,
                "sha256": _sha256(path),
            }
    return manifest


def write_logs(files: Sequence[Path], output: str | Path, logs: Logs) -> dict[str, Any]:
    """Write `train.parquet`, a row a prompt with its `logged` answers, and `manifest.json`; returns that.

    Raises:
        InputError: anything about the logs or the output folder; nothing is left half-written.
    """
    prompts = logs.prompts(files)
    left_out = dict(sorted(logs.dropped.items()))
    if not prompts:
        why = ", ".join(f"{count}: {reason}" for reason, count in left_out.items())
        raise InputError(f"{', '.join(map(str, files))}: no answer of {logs.lines} lines is of use ({why}).")
    rows = (
        {"data_source": "logs", "index": index, "question": row["prompt"][-1]["content"], **row}
        for index, row in enumerate(prompts)
    )
    rewards = [answer["reward"] for row in prompts for answer in row["logged"]]
    rated = [reward for reward in rewards if reward is not None]
    manifest: dict[str, Any] = {}
    with _aside(Path(output), manifest) as aside:
        path = aside / "train.parquet"
        _write_parquet(path, rows, "logs", "train")
        manifest |= {
            "name": "logs",
            "gvpo": __version__,
            "sources": [{"source": Path(file).name, "source_sha256": _sha256(Path(file))} for file in files],
            "lines": logs.lines,
            "prompts": len(prompts),
            "prompts_with_two_or_more": sum(len(row["logged"]) > 1 for row in prompts),
            "answers": len(rewards),
            "answers_dropped": left_out,
            "rated": len(rated),
            "rewards": {"lowest": min(rated), "mean": sum(rated) / len(rated), "highest": max(rated)}
            if rated
            else None,
            "file": path.name,
            "sha256": _sha256(path),
        }
    return manifest


@contextmanager
def _aside(output: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """A folder whose files move to `output`, with the manifest, when all went well; else none remains."""
    new = not output.exists()
    with refused(f"{output} cannot be written to", "choose another", OSError):
        output.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=".partial-", dir=output)
    try:
        with folder as aside:
            yield Path(aside)
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            (Path(aside) / "manifest.json").write_text(text, encoding="utf-8")
            for file in sorted(Path(aside).iterdir()):
                os.replace(file, output / file.name)
    finally:
        if new:
            with suppress(OSError):  # not empty: all went well
                output.rmdir()


def _origins(name: str, sources: Sequence[str]) -> dict[str, str | None]:
    """What each split is read from; None for the generator of a task."""
    if name.startswith("reasoning_gym:"):
        if sources:
            raise InputError("reasoning_gym makes its problems itself: leave --source out.")
        return {"train": None, "test": None}
    known, _, attached = name.partition(":")
    recipe = RECIPES.get(known)
    splits = list(recipe.splits) if recipe else list(SPLITS)
    sources = sources or [attached or (recipe.hub_id or "" if recipe else name)]
    files = [file for source in sources for file in _files(source)]
    if not files:
        return dict.fromkeys(splits, sources[0])
    origins: dict[str, str | None] = {}
    for file in files:
        # A file named for neither split is for training, unless the set is for tests only.
        alone = "train" if "train" in splits else "test"
        split = next((split for split in SPLITS if split in file.stem), alone)
        if split in origins:
            raise InputError(f"both {origins[split]} and {file} are for {split}: rename one of them.")
        origins[split] = str(file)
    return {split: origins[split] for split in SPLITS if split in origins}


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = (path / f"{split}{suffix}" for split in SPLITS for suffix in SUFFIXES)
        found = [file for file in files if file.is_file()]
        if not found:
            raise InputError(
                f"{path} has no train or test file, such as train.jsonl: give a file, or add it."
            )
        return found
    return [path] if looks_like_file(source) else []


def _provenance(origin: str | None, commit: str | None, seed: int) -> dict[str, Any]:
    if origin is None:
        return {"source": f"reasoning_gym {version('reasoning_gym')}", "seed": seed}
    if looks_like_file(origin):
        return {"source": Path(origin).name, "source_sha256": _sha256(Path(origin))}
    return {"source": origin, "revision": commit}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verl_rows(rows: Iterable[Row], ability: str, split: str) -> Iterator[Row]:
    for row in rows:
        extra = {"split": split, **{key: row[key] for key in ("index", "question", *_TASK) if key in row}}
        yield {
            "data_source": row["data_source"],
            "prompt": row["prompt"],
            "ability": ability,
            "reward_model": {"style": "rule", "ground_truth": row.get("answer", "")},
            "extra_info": extra,
            **{key: row[key] for key in _OWN if key in row},
        }


def _write_parquet(
    path: Path, rows: Iterable[Row], ability: str, split: str, progress: Progress | None = None
) -> int:
    made = _verl_rows(rows, ability, split)
    first = next(made, None)
    if first is None:
        return 0
    extra = _EXTRA | {key: kind for key, kind in _TASK.items() if key in first}
    schema = pyarrow.schema(
        {
            "data_source": _TEXT,
            "prompt": pyarrow.list_(pyarrow.struct({"role": _TEXT, "content": _TEXT})),
            "ability": _TEXT,
            "reward_model": pyarrow.struct({"style": _TEXT, "ground_truth": _TEXT}),
            "extra_info": pyarrow.struct(extra),
            **{key: kind for key, kind in _OWN.items() if key in first},
        }
    )
    written = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as file:
        made = chain([first], made)
        while group := list(islice(made, _ROWS_PER_GROUP)):
            file.write_table(pyarrow.Table.from_pylist(group, schema=schema))
            written += len(group)
            if progress:
                progress(split, written)
    return written
