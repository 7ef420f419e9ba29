"""What a vision-language model is given of a row besides its tokens: the images in its prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

ImageSet = dict[str, Tensor]  # a prompt's images, one after the other, by the names of the model's arguments


@dataclass
class Images:
    """The images of a batch's rows. The k responses of a group have one set: it is kept, and compared, once.

    Attributes:
        of_row: which of `sets` is a row's; -1 for a row without images.
        sets: what the processor made of images: pixel_values, image_grid_thw, …
        token: the token id that stands for a part of an image.
        types: the model's name for the argument that marks those tokens by 1; "" if it takes none.
    """

    of_row: Int[Tensor, "batch"]
    sets: list[ImageSet]
    token: int
    types: str = ""

    @classmethod
    def of(cls, rows: Sequence[ImageSet | None], device: torch.device, token: int, types: str) -> Images:
        """One set a row, None for none; equal ones become one."""
        found: dict[bytes, int] = {}
        sets: list[ImageSet] = []
        of_row = []
        for row in rows:
            if row is None:
                of_row.append(-1)
                continue
            of_row.append(found.setdefault(_digest(row), len(sets)))
            if of_row[-1] == len(sets):
                sets.append({name: value.clone() for name, value in row.items()})  # of a slice of many
        return cls(torch.tensor(of_row, device=device), sets, token, types)

    def select(self, rows: Any) -> Images:
        return replace(self, of_row=self.of_row[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Images | None], sizes: Sequence[int]) -> Images | None:
        """Of the rows of several batches, of `sizes`."""
        given = [part for part in parts if part is not None]
        if not given:
            return None
        sets: list[ImageSet] = []
        of_row = []
        places: dict[int, int] = {}  # slices of one generation have one list of sets
        for part, size in zip(parts, sizes, strict=True):
            if part is None:
                of_row.append(given[0].of_row.new_full((size,), -1))
                continue
            if id(part.sets) not in places:
                places[id(part.sets)] = len(sets)
                sets += part.sets
            of_row.append(torch.where(part.of_row < 0, -1, part.of_row + places[id(part.sets)]))
        return replace(given[0], of_row=torch.cat(of_row), sets=sets)

    def tensors(self) -> dict[str, Tensor]:
        """By name, to be stored; see `from_tensors`."""
        used = [i for i in self.of_row.unique().tolist() if i >= 0]
        of_row = torch.tensor([used.index(i) if i >= 0 else -1 for i in self.of_row.tolist()])
        sets = {f"{j}.{name}": x.clone() for j, i in enumerate(used) for name, x in self.sets[i].items()}
        return {"of_row": of_row, **sets}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], token: int, types: str) -> Images:
        of_row = tensors["of_row"]
        sets: list[ImageSet] = [{} for _ in range(max(of_row.tolist(), default=-1) + 1)]
        for place, _, name in (key.partition(".") for key in tensors if key != "of_row"):
            sets[int(place)][name] = tensors[f"{place}.{name}"]
        return cls(of_row, sets, token, types)

    def keys(self) -> list[bytes]:
        """For each row bytes that tell its images from others'."""
        return [f"image {i};".encode() for i in self.of_row.tolist()]

    def arguments(self, rows: Sequence[int], input_ids: Int[Tensor, "rows width"]) -> dict[str, Tensor]:
        """What a model takes besides the tokens of `rows`; nothing if none of them has images."""
        sets = [self.sets[i] for i in self.of_row[list(rows)].tolist() if i >= 0]
        if not sets:
            return {}
        found = {name: torch.cat([images[name] for images in sets]) for name in sets[0]}
        return found | ({self.types: (input_ids == self.token).long()} if self.types else {})

    def blocks(self, input_ids: Int[Tensor, "rows width"]) -> Int[Tensor, "rows width"] | None:
        """Numbers of the images that tokens are of, −1 for text, where an image's tokens see each other."""
        if self.types != "token_type_ids":
            return None
        inside = input_ids == self.token
        begins = inside & ~torch.nn.functional.pad(inside, (1, -1))
        return torch.where(inside, begins.cumsum(1), -1)

    def within(
        self, input_ids: Int[Tensor, "batch length"], starts: Sequence[int], ends: Sequence[int]
    ) -> bool:
        """Whether a row has images between where it starts and ends."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        start, end = (torch.tensor(x, device=at.device)[:, None] for x in (starts, ends))
        inside = (at >= start) & (at < end) & (self.of_row >= 0)[:, None]
        return bool((inside & (input_ids == self.token)).any())


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """What is trained of a vision-language model besides its language model; rows without images use none."""
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return []
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in text]


def _digest(images: ImageSet) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(images):
        value = images[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.digest()
