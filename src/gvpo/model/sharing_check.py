"""Whether and how prompts can be shared under a model: by its kind, and by trying."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gvpo.batch import Beginnings, GroupBatch
from gvpo.images import Images, vision_parameters
from gvpo.model.determinism import is_reentrant
from gvpo.model.logprobs import TokenScorer, unwrap
from gvpo.model.micro_batch import MicroBatch
from gvpo.model.shared_prompts import Continuation, PromptCache, attention_shared

Context = Callable[[], AbstractContextManager[Any]]
_ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


def obstacle(model: Any) -> str | None:
    """Why prompts cannot be shared under a transformers model of this kind; None if they may be."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    if kinds or getattr(model, "_is_stateful", False):
        found = ", ".join(sorted(kinds)) or "recurrent"
        return f"{type(model).__name__} has layers whose state is not keys and values ({found})"
    if not getattr(model, "_supports_attention_backend", False):
        return f"the attention of {type(model).__name__} cannot be chosen"
    if config._attn_implementation not in _ATTENTIONS:
        return f"attn_implementation={config._attn_implementation!r} is not one of {', '.join(_ATTENTIONS)}"
    if changing := ropes & {"dynamic", "longrope"}:
        return f"its rotary embedding ({changing.pop()}) depends on the length of what is run"
    if is_reentrant(model):
        return "gradient checkpointing is reentrant (use_reentrant=False shares)"
    return None


def way_to_share(
    scorer: TokenScorer,
    model: nn.Module,
    context: Context,
    device: torch.device,
    *,
    collective: bool,
    agree: Callable[[bool], bool],
    sample: GroupBatch | None = None,
) -> str:
    """ "merged" or "copied" keys (see `PromptCache`), or "whole" rows where neither gives the model's scores.

    A few rows are scored both ways, and their gradients compared. Warns if nothing is shared.

    Args:
        context: for forwards, such as autocast.
        collective: whether each forward gathers parameters from other ranks.
        agree: whether something holds on all ranks.
        sample: the rows (see `_sample`); by default made-up ones.
    """
    if not scorer.fused:  # which has been warned of
        return "whole"
    why = obstacle(unwrap(model))
    if collective and not any(isinstance(m, FSDPModule) for m in model.modules()):
        why = "its parameters are sharded by something else than FSDP2"
    if why is None:
        given = _made_up(model, device) if sample is None else sample
        rows = _Rows(scorer, model, context, collective, given)
        for way in ("merged", "copied"):
            why = rows.difference(way)
            if agree(why is None):
                return way
            why = why or "another rank found a difference"
    what = "Prompts are" if sample is None else "Prompts with images are"
    warnings.warn(f"{what} not shared, each row is run with its own: {why}.", stacklevel=5)
    return "whole"


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Without TensorFloat32, whose rounding (7e-3 nats seen) would be taken for a difference."""
    products = torch.backends.cuda.matmul
    # Before torch 2.9 the switch was another; to mix the two is an error there.
    name, off = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, off)
    try:
        yield
    finally:
        setattr(products, name, before)


def _made_up(model: nn.Module, device: torch.device) -> GroupBatch:
    vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    ids = ids[[0, 0, 1]]
    ids[1, 7:] = ids[2, 7:]
    return _sample(ids, [6, 6, 4])


def sample_with_images(batch: GroupBatch) -> GroupBatch | None:
    """Rows from one of the batch that has images in its beginning; None where none has."""
    beginnings, images = Beginnings.of(batch), batch.images
    assert images is not None
    for row, (start, end) in enumerate(zip(beginnings.starts, beginnings.ends, strict=True)):
        own = batch.input_ids[row, start:end]
        if start and images.of_row[row] >= 0 and not bool((own == images.token).any()):
            own = own.repeat(8)[:8]
            ids = torch.stack([torch.cat([batch.input_ids[row, :start], x]) for x in (own, own.flip(0))])
            return _sample(ids[[0, 1, 0]], [start] * 3, images.select([row] * 3))
    return None


def _sample(ids: Int[Tensor, "3 length"], starts: list[int], images: Images | None = None) -> GroupBatch:
    """Three rows, the first two of which begin alike; their own tokens begin at `starts`."""
    at = torch.arange(ids.shape[1], device=ids.device)
    chosen = at > torch.tensor(starts, device=ids.device)[:, None]
    none = torch.zeros(3, device=ids.device)
    return GroupBatch(ids, torch.full_like(none, len(at)).long(), chosen, none, none.long(), images=images)


class _Rows:
    """A sample's rows under a model: the same from their logits on, whatever is shared."""

    def __init__(
        self, scorer: TokenScorer, model: nn.Module, context: Context, collective: bool, sample: GroupBatch
    ) -> None:
        self.scorer, self.model, self.context, self.sample = scorer, model, context, sample
        self.starts, self.ends = Beginnings.of(sample).starts, sample.lengths.tolist()
        # Gradients of single parameters cannot be asked for where they are sharded.
        vision = vision_parameters(unwrap(model))
        text = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in vision)]
        parts = [] if collective else [text] if sample.images is None else [text, vision]
        self.trained = [p for part in parts for p in sorted(part, key=lambda p: p.numel())[:8]]

    def difference(self, way: str) -> str | None:
        """What is not the same when the rows share their prompts."""
        try:
            with torch.set_grad_enabled(bool(self.trained)), _whole_float32():
                expected, got = self.whole(), self.shared(way == "merged")
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            return f"{type(failure).__name__}: {failure}"
        finite = expected[0].isfinite()
        apart = (expected[0] - got[0])[finite].abs().max().item() if finite.any() else 0.0
        with self.context():
            autocast = torch.is_autocast_enabled(self.sample.input_ids.device.type)
        narrow = autocast or next(self.model.parameters()).dtype.itemsize < 4
        if apart > (0.25 if narrow else 2e-3):
            return f"log-probabilities differ by up to {apart:.2g} nats"
        size, error = expected[1].norm(), (expected[1] - got[1]).norm()
        if size.isfinite() and error > (0.25 if narrow else 1e-3) * size:
            return f"gradients differ by {error / size:.2g}"
        return None

    def whole(self) -> tuple[Tensor, Tensor]:
        return self._scores(MicroBatch.of(self.sample, [row], self.ends) for row in range(3))

    def shared(self, merged: bool) -> tuple[Tensor, Tensor]:
        sample, first = self.sample, [0, 2]  # the rows whose beginnings are read
        with attention_shared(unwrap(self.model)) as original:
            cache = PromptCache([self.starts[row] for row in first], original, merged)
            ids = sample.input_ids[first, : max(self.starts)]
            with self.context():
                cache.read(self.model, ids, sample.images and sample.images.select(first))
            return self._scores(self._after(cache, row) for row in range(3))

    def _after(self, cache: PromptCache, row: int) -> MicroBatch:
        micro = MicroBatch.of(self.sample, [row], self.ends, self.starts)
        micro.prompts = Continuation(cache, [row // 2], last=row == 2)
        return micro

    def _scores(self, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all rows, run one at a time, and the sum of their gradients."""
        logps, gradients = [], []
        for micro in micro_batches:
            weights = torch.linspace(-1, 1, int(micro.chosen.sum()), device=micro.chosen.device)
            with self.context():
                scores = self.scorer(self.model, micro, weights)
            logps.append(scores.logps.double())
            if self.trained:
                assert scores.nll is not None
                found = torch.autograd.grad(
                    scores.nll, self.trained, allow_unused=True, materialize_grads=True
                )
                gradients.append(torch.cat([g.flatten().double() for g in found]))
        return torch.cat(logps), torch.stack(gradients).sum(0) if gradients else torch.zeros(1)
