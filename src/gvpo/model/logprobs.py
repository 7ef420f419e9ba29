"""Log-probabilities and weighted log-likelihood of chosen tokens under a causal language model.

`TokenScorer` goes through the fused head of `gvpo.model.fused_head` with a model of transformers, and through
the model's own logits where it finds that the fused head would not give the same.
"""

from __future__ import annotations

import functools
import types
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from gvpo.model.fused_head import TILE_BYTES, LogitTransform, WeightedNLL, chunked_logps
from gvpo.model.vocabulary import VocabularyGradients, embedding_summed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class TokenScores(NamedTuple):
    """Scores of the chosen tokens of a micro-batch, row by row.

    `nll` is −Σ_t weight_t log p_t (None if no weights were given) and carries the gradient; `logps` and
    `entropy` are in nats, without gradient (entropy is None in a pass without weights).
    """

    nll: Float[Tensor, ""] | None
    logps: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"] | None


@dataclass
class ScoreRequest:
    """Asks a prepared model's forward for token scores instead of logits.

    An opaque object on purpose: DDP and FSDP2 leave it as it is, where they would move or cast tensors.
    """

    chosen: Bool[Tensor, "rows length"]
    targets: Int[Tensor, "tokens"]
    token_weights: Float[Tensor, "tokens"] | None
    transform: LogitTransform
    float32_head: bool = False
    sums: VocabularyGradients | None = None
    tile_bytes: int = TILE_BYTES

    def score(self, hidden: Float[Tensor, "rows length dim"], head: nn.Module) -> TokenScores:
        weight, bias = _head_parameters(head)
        if isinstance(weight, DTensor):
            # FSDP2 averages gradients over ranks; without "avg" the head's would be summed instead.
            average = [Partial("avg")] * weight.device_mesh.ndim
            weight = weight.full_tensor(grad_placements=average)
            bias = bias.full_tensor(grad_placements=average) if isinstance(bias, DTensor) else bias
            self.sums = None  # a deferred gradient cannot pass through full_tensor's backward
        h = hidden[self.chosen.to(hidden.device)].to(weight.device)
        outside_autocast = self.float32_head
        if outside_autocast:
            h, weight = h.float(), weight.float()
        tile_rows = max(16, min(max(len(h), 1), self.tile_bytes // (4 * weight.shape[0])))
        context = torch.autocast(h.device.type, enabled=False) if outside_autocast else nullcontext()
        with context:
            if self.token_weights is None:
                logps = chunked_logps(h, weight, bias, self.targets, self.transform, tile_rows)
                return TokenScores(None, logps, None)
            return TokenScores(
                *WeightedNLL.apply(
                    h, weight, bias, self.targets, self.token_weights, self.transform, tile_rows,
                    self.sums,
                )
            )  # fmt: skip


def _head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain linear head, or of one with LoRA adapters (merged, differentiably)."""
    if hasattr(head, "get_base_layer"):  # peft's tuner layers
        base = head.get_base_layer()
        weight = base.weight
        for name in [] if getattr(head, "disable_adapters", False) else head.active_adapters:
            if name in head.lora_A:
                low_rank = head.lora_B[name].weight @ head.lora_A[name].weight
                weight = weight + low_rank.to(weight.dtype) * head.scaling[name]
        return weight, base.bias
    return head.weight, getattr(head, "bias", None)


def prepare_model(model: nn.Module) -> None:
    """Let a transformers causal language model answer `model(..., gvpo=ScoreRequest)`.

    Without a request the forward is what it was. Going through `forward` is what makes DDP, FSDP and mixed
    precision work. Preparing twice does nothing; a deep copy is prepared too.
    """
    if hasattr(model, "_forward_before_gvpo"):
        return
    base: Any = model
    base._forward_before_gvpo = model.forward  # an attribute, not a closure, so that deepcopy rebinds it

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, gvpo: ScoreRequest | None = None, **kwargs: Any) -> Any:
        if gvpo is None:
            return self._forward_before_gvpo(*args, **kwargs)
        with embedding_summed(self, gvpo.sums):
            hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return gvpo.score(hidden, self.get_output_embeddings())

    base.forward = types.MethodType(forward, model)


@dataclass
class TokenScorer:
    """Scores chosen tokens of left-aligned rows under a causal language model.

    Args:
        model: a transformers causal language model (a `PeftModel` is looked through), or any module whose
            `model(input_ids=, attention_mask=)` returns an object with `.logits`.
        temperature: the policy is the model at this sampling temperature.
        float32_head: multiply by the head in float32, outside autocast.
        fused: whether to score without keeping logits. None decides by a check against the model's own
            logits on the first rows scored, and warns if they differ.
    """

    model: nn.Module
    temperature: float = 1.0
    float32_head: bool = False
    fused: bool | None = None
    tile_bytes: int = TILE_BYTES
    _transform: LogitTransform = field(init=False, default_factory=LogitTransform)

    def __post_init__(self) -> None:
        base = unwrap(self.model)
        if hasattr(base, "get_output_embeddings") and hasattr(base, "base_model"):
            self._transform = LogitTransform.of(base.config, self.temperature)
            prepare_model(base)
        else:
            self.fused = False

    def __call__(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "rows length"],
        lengths: Int[Tensor, "rows"],
        chosen: Bool[Tensor, "rows length"],
        token_weights: Float[Tensor, "tokens"] | None = None,
        sums: VocabularyGradients | None = None,
    ) -> TokenScores:
        """Score the tokens where `chosen` is True (never in column 0), each given the ones before it.

        `model` is this scorer's model or a wrapper of it (DDP, FSDP). Rows are left-aligned: padding
        comes after the first `lengths[i]` tokens, where no causal model can see it, so no mask is needed.
        """
        if self.fused is None:
            self.check(model, input_ids, lengths, chosen)
        if not self.fused:
            return self._from_logits(model, input_ids, lengths, chosen, token_weights)
        request = ScoreRequest(
            chosen[:, 1:],
            input_ids[:, 1:][chosen[:, 1:]],
            token_weights,
            self._transform,
            self.float32_head,
            sums,
            self.tile_bytes,
        )
        return model(input_ids=input_ids[:, :-1], gvpo=request)

    def _from_logits(
        self,
        model: nn.Module,
        input_ids: Tensor,
        lengths: Tensor,
        chosen: Tensor,
        token_weights: Tensor | None,
    ) -> TokenScores:
        attention_mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        logits = model(input_ids=input_ids, attention_mask=attention_mask.long()).logits
        logits = logits[:, :-1][chosen[:, 1:]]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        all_logps = F.log_softmax(logits, dim=-1)
        logps = all_logps.gather(1, input_ids[:, 1:][chosen[:, 1:]][:, None])[:, 0]
        if token_weights is None:
            return TokenScores(None, logps, None)
        entropy = -(all_logps.exp() * all_logps).detach().sum(-1)
        return TokenScores(-(logps * token_weights.to(logps)).sum(), logps.detach(), entropy)

    @torch.no_grad()
    def check(self, model: nn.Module, input_ids: Tensor, lengths: Tensor, chosen: Tensor) -> bool:
        """Decide `fused` by scoring both ways the shortest row and the next longer one (for its padding)."""
        by_length = lengths.argsort()
        longer = by_length[lengths[by_length] > lengths[by_length[0]]][:1]
        rows = torch.cat([by_length[:1], longer])
        width = int(lengths[rows].max())
        few = (input_ids[rows, :width], lengths[rows], chosen[rows, :width])
        expected = self._from_logits(model, *few, None).logps
        try:
            self.fused = True
            got = self(model, *few).logps
            # Where the model itself is not finite there is nothing to compare, and the step will say so.
            apart = (got - expected)[expected.isfinite()].abs()
            error = float(apart.max()) if apart.numel() else 0.0
            why = f"log-probabilities differ by up to {error:.2g} nats"
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            error, why = float("inf"), f"{type(failure).__name__}: {failure}"
        narrow = next(self.model.parameters()).dtype.itemsize < 4
        self.fused = error <= (0.25 if narrow or torch.is_autocast_enabled(expected.device.type) else 2e-3)
        if not self.fused:
            warnings.warn(
                f"The fused head does not give this model's log-probabilities ({why}): using the model's own "
                "logits, which takes more memory.",
                stacklevel=3,
            )
        return self.fused


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, torch.compile and PEFT wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
