"""What `gvpo.dump_dir` and the incidents folder hold, as tensors."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch


def updates(folder: Path) -> list[dict[str, Any]]:
    return [_read(file) for file in sorted(folder.glob("update_*.parquet"))]


def _read(file: Path) -> dict[str, Any]:
    table = pyarrow.parquet.read_table(file)
    columns = table.to_pydict()
    record = {
        name: [torch.tensor(row) for row in columns.pop(name)]
        for name in ("input_ids", "responses", "response_mask")
    }
    prompts, sessions = columns.pop("prompt"), columns.pop("session")
    record |= {"prompts": prompts, "sessions": list(zip(prompts, sessions, strict=True))}
    record |= {f"{name}s": torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    return record | json.loads(table.schema.metadata[b"facts"])
