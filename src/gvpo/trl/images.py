"""Images in TRL's columns `image` and `images`: read in their row's turn, and as processors return them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Image, List
from PIL import Image as Pillow
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid

from gvpo.errors import InputError, refused
from gvpo.images import Images, ImageSet

COLUMNS = ("image", "images")
# What models take of images, as TRL gives it.
_OF_IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
    "image_position_ids",
)  # fmt: skip


def unread(dataset: Any) -> Any:
    """The data set with images as they are stored, so that each is read in its row's turn."""
    features = getattr(dataset, "features", None) or {}
    for name in COLUMNS:
        feature = features.get(name)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, Image):
            stored = Image(mode=inner.mode, decode=False)
            dataset = dataset.cast_column(name, stored if inner is feature else List(stored))
    return dataset


def named(dataset: Any, column: str) -> Any:
    """The data set with the images of `column` under TRL's name for one or for several."""
    ours = "images" if isinstance(dataset[0][column], list) else "image"
    return dataset if ours == column else dataset.rename_column(column, ours)


def read(inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a data set with their images read.

    Raises:
        InputError: one cannot be.
    """
    rows = [dict(row) for row in inputs]
    for row in rows:
        for name in COLUMNS:
            value = row.get(name)
            if value is not None:
                row[name] = [_read(v, row) for v in value] if isinstance(value, list) else _read(value, row)
    return rows


def _read(value: Any, row: Mapping[str, Any]) -> Any:
    path = value.get("path") if isinstance(value, dict) else value
    stored = value.get("bytes") if isinstance(value, dict) else None
    local = isinstance(path, str | Path) and not str(path).startswith(("http://", "https://", "data:"))
    if stored is None and not local:
        return value  # an image already, or what the processor fetches
    what = f"The image {path or 'in the data set'} of the prompt {str(row.get('prompt'))[:80]!r}"
    kinds = (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError)
    with refused(f"{what} cannot be read", "repair it, or leave the row out", kinds):
        image = Pillow.open(str(path) if stored is None else BytesIO(stored))
        image.load()
        return image


def images_of(out: Mapping[str, Any], model: Any) -> Images | None:
    """The images of a generation's rows, from what TRL gives with them; None if there are none.

    Raises:
        InputError: what the processor made of them has a form that is not known.
    """
    counts = out.get("num_images")
    if "pixel_values" not in out or counts is None:
        return None
    n, device = len(out["prompt_ids"]), out["prompt_ids"].device
    by_row: dict[str, Sequence[Tensor]] = {}
    split = split_pixel_values_by_grid(dict(out))
    for name in _OF_IMAGES:
        value = split.get(name)
        if isinstance(value, list):
            by_row[name] = value
        elif value is not None:
            by_images = len(value) == sum(counts)
            if not by_images and len(value) != n:
                raise InputError(
                    f"{type(model).__name__} takes {name} of shape {tuple(value.shape)} for {n} rows with "
                    f"{sum(counts)} images, and which is whose is not known: train it without images."
                )
            by_row[name] = value.split(counts if by_images else 1)
    rows: list[ImageSet | None] = [
        {name: values[i] for name, values in by_row.items()} if counts[i] else None for i in range(n)
    ]
    names = ("image_token_id", "image_token_index")
    token: int = next((t for name in names if (t := getattr(model.config, name, None)) is not None), -1)
    types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in out), "")
    if types:
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        if not bool((out[types].bool() == (ids == token)).all()):
            raise InputError(
                f"{types} of {type(model).__name__} marks other tokens than images': train it without images."
            )
    return Images.of(rows, device, token, types)
