"""What goes into a step: the responses of its groups, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gvpo.images import Images


@dataclass
class GroupBatch:
    """The responses of one optimizer step on this rank, in any order, groups whole over all ranks.

    Attributes:
        input_ids: prompt and completion, left-aligned; what pads a row on the right is never looked at.
        lengths: tokens of each row without padding.
        completion_mask: the tokens whose log-probabilities make up S (not the prompt, not tool output).
        rewards: R, one a row.
        group_ids: the prompt that a row answers; any integers.
        valid: False drops a row from its group. None: all rows are valid.
        reference_logps: S' in nats, or None where the policy *is* the reference (the first step after a
            rollout with the rollout policy as the reference): then no scoring pass is needed.
        on_policy: where only some groups are measured against the policy as it is: True for their rows, whose
            `reference_logps` are not looked at and which need no scoring pass. None: no rows.
        rollout_logps: log p of each completion token under the policy of the rollout, in nats; NaN where
            that is not known. Only a step with a trust mask looks at them.
        images: of the rows' prompts, for a vision-language model.
    """

    input_ids: Int[Tensor, "batch length"]
    lengths: Int[Tensor, "batch"]
    completion_mask: Bool[Tensor, "batch length"]
    rewards: Float[Tensor, "batch"]
    group_ids: Int[Tensor, "batch"]
    valid: Bool[Tensor, "batch"] | None = None
    reference_logps: Float[Tensor, "batch"] | None = None
    on_policy: Bool[Tensor, "batch"] | None = None
    rollout_logps: Float[Tensor, "batch length"] | None = None
    images: Images | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def from_tokens(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        rewards: Sequence[float] | Tensor,
        group_ids: Sequence[int] | Tensor,
        *,
        device: torch.device | str = "cpu",
        **others: Any,
    ) -> GroupBatch:
        """From lists of token ids, one prompt and one completion a row."""
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        width = max(map(len, rows), default=0)
        input_ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], dtype=torch.long)
        starts = torch.tensor([len(p) for p in prompts], dtype=torch.long)
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
        at = torch.arange(width)
        chosen = (at >= starts[:, None]) & (at < lengths[:, None])
        return cls(
            input_ids.view(len(rows), width).to(device),
            lengths.to(device),
            chosen.to(device),
            torch.as_tensor(rewards, dtype=widest_float(torch.device(device))).to(device),
            torch.as_tensor(group_ids).to(device),
            **others,
        )

    @classmethod
    def from_padded(
        cls,
        token_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"],
        completion_mask: Int[Tensor, "batch length"],
        rewards: Float[Tensor, "batch"],
        group_ids: Int[Tensor, "batch"],
        **others: Any,
    ) -> GroupBatch:
        """From rows padded anywhere (left-padded prompts, say): tokens outside `attention_mask` go."""
        seen = attention_mask.bool()
        order = seen.byte().argsort(dim=1, descending=True, stable=True)
        lengths = seen.sum(1)
        width = int(lengths.max()) if len(lengths) else 0
        order = order[:, :width]
        chosen = (completion_mask.bool() & seen).gather(1, order)
        return cls(token_ids.gather(1, order), lengths, chosen, rewards, group_ids, **others)

    @cached_property  # looked for once by scoring and update
    def first_equal(self) -> Int[Tensor, "batch"]:
        """For each row the first of the same tokens and images, the same of them chosen: of one score."""
        ids, chosen, images = (
            self.input_ids.cpu().numpy(),
            self.completion_mask.cpu().numpy(),
            self.image_keys(),
        )
        found: dict[bytes, int] = {}
        first = [
            found.setdefault(images[row] + ids[row, :n].tobytes() + chosen[row, :n].tobytes(), row)
            for row, n in enumerate(self.lengths.tolist())
        ]
        return torch.tensor(first, dtype=torch.long, device=self.input_ids.device)

    def image_keys(self) -> list[bytes]:
        """For each row bytes that tell its images from others'."""
        return [b""] * len(self) if self.images is None else self.images.keys()

    def as_on_policy(self) -> GroupBatch:
        """The same rows measured against the policy, to stand beside others that have reference log-probs."""
        n, device = len(self), self.input_ids.device
        zeros = torch.zeros(n, dtype=widest_float(device), device=device)
        return replace(self, reference_logps=zeros, on_policy=torch.ones(n, dtype=torch.bool, device=device))

    @classmethod
    def concatenate(cls, parts: Sequence[GroupBatch]) -> GroupBatch:
        """One batch of several of the same kind (all with reference log-probs or `as_on_policy`, or none)."""
        width = max(part.input_ids.shape[1] for part in parts)

        def joined(name: str, missing: Callable[[GroupBatch], Tensor] | None = None) -> Any:
            """A field of all rows; `missing` makes it for the parts that have none."""
            given = [getattr(part, name) for part in parts]
            if all(value is None for value in given):
                return None
            if missing is None and any(value is None for value in given):
                raise ValueError(f"{name} is given for some parts of the batch only.")
            values = [missing(p) if missing and v is None else v for p, v in zip(parts, given, strict=True)]
            return torch.cat([F.pad(v, (0, width - v.shape[1])) if v.dim() == 2 else v for v in values])

        dtype = widest_float(parts[0].input_ids.device)
        return cls(
            joined("input_ids"),
            joined("lengths"),
            joined("completion_mask"),
            joined("rewards"),
            joined("group_ids"),
            joined("valid", lambda part: torch.ones_like(part.lengths, dtype=torch.bool)),
            joined("reference_logps"),
            joined("on_policy", lambda part: torch.zeros_like(part.lengths, dtype=torch.bool)),
            joined("rollout_logps", lambda part: torch.full_like(part.input_ids, torch.nan, dtype=dtype)),
            Images.concatenate([part.images for part in parts], [len(part) for part in parts]),
        )


@dataclass
class Beginnings:
    """What rows begin with and what is their own, found from their tokens.

    A row's prompt is all that comes before its first chosen token. Its last token predicts the completion's
    first, so it is run with the completion; the tokens before it are the row's *beginning*, which is the same
    for all rows that begin with the same tokens, of one group or of several. What follows the last chosen
    token has no influence and is left out.

    Attributes:
        starts, ends: where each row's own tokens start and end; both 0 for a row without a chosen token.
        of_row: each row's beginning, None if it has none or no chosen token.
        rows, lengths: for each beginning a row that has it, and its tokens.
    """

    starts: list[int]
    ends: list[int]
    of_row: list[int | None]
    rows: list[int]
    lengths: list[int]

    @classmethod
    def of(
        cls, batch: GroupBatch, chosen: Bool[Tensor, "batch length"] | None = None, *, whole: bool = False
    ) -> Beginnings:
        """`chosen`: the completion's tokens, where `batch.completion_mask` has fewer (a trust mask).

        `whole`: what follows a row's last chosen token is not left out, nor are rows without one.
        """
        if not batch.input_ids.numel():
            none = [0] * len(batch)
            return cls(none, none, [None] * len(batch), [], [])
        kept = batch.completion_mask.clone()
        kept[:, :1] = False
        chosen = kept if chosen is None else kept | chosen
        last = torch.arange(1, kept.shape[1] + 1, device=kept.device).mul(kept).amax(1)
        ends = (batch.lengths if whole else last).tolist()
        starts = (chosen.byte().argmax(1) - 1).clamp(min=0).tolist()
        tokens, images = batch.input_ids.cpu().numpy(), batch.image_keys()
        found: dict[bytes, int] = {}
        of_row: list[int | None] = []
        rows: list[int] = []
        for row, start in enumerate(starts):
            key = images[row] + tokens[row, :start].tobytes()
            of_row.append(found.setdefault(key, len(rows)) if start else None)
            if of_row[-1] == len(rows):
                rows.append(row)
        return cls(starts, ends, of_row, rows, [starts[row] for row in rows])

    def rows_with(self, beginning: int) -> list[int]:
        """The rows that have a beginning."""
        return [row for row, its in enumerate(self.of_row) if its == beginning]

    def hold_images(self, batch: GroupBatch) -> bool:
        """Whether all images of the rows are in what they begin with."""
        return batch.images is None or not batch.images.within(batch.input_ids, self.starts, self.ends)

    @property
    def own(self) -> list[int]:
        """Each row's own tokens."""
        return [max(0, end - start) for start, end in zip(self.starts, self.ends, strict=True)]


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
