"""Some rows of a batch, as a model is given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gvpo.batch import GroupBatch
from gvpo.images import Images
from gvpo.model.balance import Routing
from gvpo.model.shared_prompts import Continuation


@dataclass
class MicroBatch:
    """Some rows of a batch, trimmed to their longest.

    Padding comes after the first `lengths[i]` tokens, where no causal model can see it.

    Attributes:
        rows: indices into the batch; none for a filler.
        input_ids, lengths, chosen: as in `GroupBatch`, from each row's start on; column 0 is never chosen.
        row_of, column_of: where in the batch each chosen token is.
        tokens: of the rows, without padding.
        images: of the whole batch; None where it has none, or rows go on after their images.
        prompts: after which the rows go on; None: whole rows.
        routing: what the tokens stand for, where experts are balanced.
        last: whether it is the last of its pass.
    """

    rows: list[int]
    input_ids: Int[Tensor, "rows width"]
    lengths: Int[Tensor, "rows"]
    chosen: Bool[Tensor, "rows width"]
    row_of: Int[Tensor, "tokens"]
    column_of: Int[Tensor, "tokens"]
    tokens: int = 0
    images: Images | None = None
    prompts: Continuation | None = None
    routing: Routing | None = None
    last: bool = False

    @classmethod
    def of(
        cls, batch: GroupBatch, rows: list[int], ends: Sequence[int], starts: Sequence[int] | None = None
    ) -> MicroBatch:
        """`rows` from `starts` (by default their first token) to `ends`."""
        device = batch.input_ids.device
        if not rows:  # a filler of two tokens and weight 0, for ranks that have nothing to do
            two, none = torch.tensor([2], device=device), torch.zeros(1, dtype=torch.long, device=device)
            ids, chosen = none.expand(1, 2), torch.tensor([[False, True]], device=device)
            return cls([], ids, two, chosen, none, none)
        begins = [0 if starts is None else starts[row] for row in rows]
        own = [ends[row] - begin for row, begin in zip(rows, begins, strict=True)]
        # One copy to the device, which waits for it: it should wait seldom.
        index, begin, lengths = torch.tensor([rows, begins, own], device=device)[:, :, None]
        end = begin + lengths
        columns = begin + torch.arange(max(2, *own), device=device)
        within = columns.clamp(max=batch.input_ids.shape[1] - 1)
        # Nothing comes before the first token to predict it from.
        chosen = batch.completion_mask[index, within] & (columns < end) & (columns > begin)
        spots = chosen.nonzero()
        row_of, column_of = index[spots[:, 0], 0], within[spots[:, 0], spots[:, 1]]
        ids = batch.input_ids[index, within]
        images = batch.images if starts is None else None
        return cls(rows, ids, lengths[:, 0], chosen, row_of, column_of, sum(own), images)

    @property
    def attention_mask(self) -> Int[Tensor, "rows width"]:
        at = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return (at < self.lengths[:, None]).long()

    def per_token(self, row_weights: Float[Tensor, "batch"]) -> Float[Tensor, "tokens"]:
        return row_weights[self.row_of] if self.rows else row_weights.new_zeros(1)

    def image_arguments(self, input_ids: Int[Tensor, "rows width"]) -> dict[str, Tensor]:
        """What a model takes besides these tokens of the rows."""
        return {} if self.images is None else self.images.arguments(self.rows, input_ids)
