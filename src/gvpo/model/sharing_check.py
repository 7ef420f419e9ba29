"""Whether and how prompts can be shared under a model: by its kind, and by trying."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gvpo.batch import Beginnings, GroupBatch
from gvpo.images import Images, vision_parameters
from gvpo.model.determinism import is_reentrant
from gvpo.model.logprobs import RowImages, TokenScorer, unwrap
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
    device: torch.device,
    context: Context,
    collective: bool,
    agree: Callable[[bool], bool],
    sample: Sample | None = None,
) -> str:
    """ "merged" or "copied" keys (see `PromptCache`), or "whole" rows where neither gives the model's scores.

    A few rows are scored both ways, and their gradients compared. Warns if nothing is shared.

    Args:
        context: for forwards, such as autocast.
        collective: whether each forward gathers parameters from other ranks.
        agree: whether something holds on all ranks.
        sample: the rows; by default made-up ones.
    """
    if not scorer.fused:  # which has been warned of
        return "whole"
    why = obstacle(unwrap(model))
    if collective and not any(isinstance(m, FSDPModule) for m in model.modules()):
        why = "its parameters are sharded by something else than FSDP2"
    if why is None:
        for way in ("merged", "copied"):
            rows = Sample.made_up(model, device) if sample is None else sample
            why = _difference(scorer, model, context, collective, way == "merged", rows)
            if agree(why is None):
                return way
            why = why or "another rank found a difference"
    what = "Prompts are" if sample is None else "Prompts with images are"
    warnings.warn(f"{what} not shared, each row is run with its own: {why}.", stacklevel=5)
    return "whole"


def _difference(
    scorer: TokenScorer,
    model: nn.Module,
    context: Context,
    collective: bool,
    merged: bool,
    sample: Sample,
) -> str | None:
    """What is not the same when rows share their prompts."""
    # Gradients of single parameters cannot be asked for where they are sharded.
    vision = vision_parameters(unwrap(model))
    text = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in vision)]
    parts = [] if collective else [text] if sample.images is None else [text, vision]
    trained = [p for part in parts for p in sorted(part, key=lambda p: p.numel())[:8]]
    rows = _Rows(scorer, model, context, trained, sample)
    try:
        with torch.set_grad_enabled(bool(trained)), _whole_float32():
            expected, got = rows.whole(), rows.shared(merged)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    finite = expected[0].isfinite()
    apart = (expected[0] - got[0])[finite].abs().max().item() if finite.any() else 0.0
    with context():
        autocast = torch.is_autocast_enabled(sample.ids.device.type)
    narrow = autocast or next(model.parameters()).dtype.itemsize < 4
    if apart > (0.25 if narrow else 2e-3):
        return f"log-probabilities differ by up to {apart:.2g} nats"
    size, error = expected[1].norm(), (expected[1] - got[1]).norm()
    if size.isfinite() and error > (0.25 if narrow else 1e-3) * size:
        return f"gradients differ by {error / size:.2g}"
    return None


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


@dataclass
class Sample:
    """Three rows, two of which begin alike.

    Attributes:
        begin: tokens of the first two rows' beginning, and of the third's.
        images: of the rows.
    """

    ids: Int[Tensor, "3 length"]
    begin: tuple[int, int]
    images: Images | None = None

    @classmethod
    def made_up(cls, model: nn.Module, device: torch.device) -> Sample:
        vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
        ids = ids[[0, 0, 1]]
        ids[1, 7:] = ids[2, 7:]
        return cls(ids, (6, 4))

    @classmethod
    def with_images(cls, batch: GroupBatch) -> Sample | None:
        """Rows from one of the batch that has images in its beginning; None where none has."""
        beginnings, images = Beginnings.of(batch), batch.images
        assert images is not None
        for row, (start, end) in enumerate(zip(beginnings.starts, beginnings.ends, strict=True)):
            own = batch.input_ids[row, start:end]
            if start and images.of_row[row] >= 0 and not bool((own == images.token).any()):
                own = own.repeat(8)[:8]
                ids = torch.stack([torch.cat([batch.input_ids[row, :start], x]) for x in (own, own.flip(0))])
                return cls(ids[[0, 1, 0]], (start, start), images.select([row] * 3))
        return None

    def of(self, rows: list[int]) -> RowImages | None:
        return None if self.images is None else partial(self.images.arguments, rows)


class _Rows:
    """The rows of a sample; from their logits on the same whatever is shared."""

    def __init__(
        self,
        scorer: TokenScorer,
        model: nn.Module,
        context: Context,
        trained: list[nn.Parameter],
        sample: Sample,
    ) -> None:
        self.scorer, self.model, self.context, self.trained = scorer, model, context, trained
        self.sample, self.ids, self.begin = sample, sample.ids, sample.begin

    def _score(
        self, ids: Tensor, start: int, prompts: Continuation | None = None, images: RowImages | None = None
    ) -> tuple[Tensor, Tensor]:
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        chosen = (torch.arange(ids.shape[1], device=ids.device) > start)[None]
        weights = torch.linspace(-1, 1, int(chosen.sum()), device=ids.device)
        with self.context():
            scores = self.scorer(self.model, ids, lengths, chosen, weights, None, prompts, None, images)
        if not self.trained:
            return scores.logps.double(), torch.zeros(1)
        assert scores.nll is not None
        gradients = torch.autograd.grad(scores.nll, self.trained, allow_unused=True, materialize_grads=True)
        return scores.logps.double(), torch.cat([g.flatten().double() for g in gradients])

    def whole(self) -> tuple[Tensor, Tensor]:
        """A row at a time, as the sharing rows are run."""
        parts = [
            self._score(self.ids[i : i + 1], self.begin[i // 2], images=self.sample.of([i]))
            for i in (0, 1, 2)
        ]
        return _joined(parts)

    def shared(self, merged: bool) -> tuple[Tensor, Tensor]:
        with attention_shared(unwrap(self.model)) as original:
            cache = PromptCache(list(self.begin), original, merged)
            ids = self.ids[[0, 2], : max(self.begin)]
            with self.context():
                cache.read(self.model, ids, self.sample.images and self.sample.images.select([0, 2]))
            parts = []
            for i in (0, 1, 2):
                prompts = Continuation(cache, [i // 2], last=i == 2)
                parts.append(self._score(self.ids[i : i + 1, self.begin[i // 2] :], 0, prompts))
        return _joined(parts)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all rows, and the sum of their gradients."""
    return torch.cat([p[0] for p in parts]), torch.stack([p[1] for p in parts]).sum(0)
