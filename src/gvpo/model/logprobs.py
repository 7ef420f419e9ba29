"""Log-probabilities and weighted log-likelihood of chosen tokens under a causal language model.

`TokenScorer` goes through the fused head of `gvpo.model.fused_head` with a model of transformers, and through
the model's own logits where it finds that the fused head would not give the same.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial

from gvpo.batch import GroupBatch
from gvpo.errors import InputError
from gvpo.model.determinism import apart, random_module
from gvpo.model.fused_head import LogitTransform, WeightedNLL, chunked_logps, tile_bytes, tile_rows
from gvpo.model.head import head_parameters, is_linear, probed
from gvpo.model.micro_batch import MicroBatch
from gvpo.model.shared_prompts import PromptCache
from gvpo.model.vocabulary import VocabularyGradients, embedding_summed

PROBE_TOKENS = 24  # of the row that a model is checked with


class TokenScores(NamedTuple):
    """Scores of the chosen tokens of a micro-batch, row by row.

    `nll` is −Σ_t weight_t log p_t (None if no weights were given), and with it the part of a load-balancing
    loss that was asked for; it carries the gradient. `logps` and `entropy` are in nats, without gradient
    (entropy is None in a pass without weights).
    """

    nll: Float[Tensor, ""] | None
    logps: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"] | None


class ScoreRequest:
    """Asks a prepared model's forward for token scores instead of logits.

    An opaque object on purpose: DDP and FSDP2 leave it as it is, where they would move or cast tensors (those
    of a dataclass too).
    """

    def __init__(
        self,
        scorer: TokenScorer,
        micro: MicroBatch,
        token_weights: Float[Tensor, "tokens"] | None = None,
        sums: VocabularyGradients | None = None,
    ) -> None:
        self.token_weights, self.sums = token_weights, sums
        self.shared_prompts, self.routing = micro.prompts, micro.routing
        self.transform, self.tile_bytes = scorer.transform, scorer.tile_bytes
        self.float32_head = scorer.float32_head
        at, targets = micro.chosen[:, 1:].flatten().nonzero()[:, 0], micro.input_ids[:, 1:]
        self.targets = targets.flatten()[at]
        # What is run, and where in it (rows × width) the targets are predicted.
        self.input_ids, self.at = micro.input_ids[:, :-1], at
        if micro.routing is not None:  # the last token predicts none, but is routed
            self.input_ids, self.at = micro.input_ids, at + at // targets.shape[1]

    def score(self, output: Any, head: nn.Module) -> TokenScores:
        hidden: Float[Tensor, "rows width dim"] = output.last_hidden_state
        weight, bias = head_parameters(head)
        if isinstance(weight, DTensor):
            # FSDP2 averages gradients over ranks; without "avg" the head's would be summed instead.
            average = [Partial("avg")] * weight.device_mesh.ndim
            weight = weight.full_tensor(grad_placements=average)
            bias = bias.full_tensor(grad_placements=average) if isinstance(bias, DTensor) else bias
            self.sums = None  # a deferred gradient cannot pass through full_tensor's backward
        h = hidden.flatten(0, 1).index_select(0, self.at.to(hidden.device)).to(weight.device)
        outside_autocast = self.float32_head
        if outside_autocast:
            h, weight = h.float(), weight.float()
        rows = tile_rows(len(h), len(weight), self.tile_bytes or tile_bytes(h.device))
        context = torch.autocast(h.device.type, enabled=False) if outside_autocast else nullcontext()
        with context:
            if self.token_weights is None:
                logps = chunked_logps(h, weight, bias, self.targets, self.transform, rows)
                return TokenScores(None, logps, None)
            return TokenScores(
                *WeightedNLL.apply(  # type: ignore[no-untyped-call]
                    h, weight, bias, self.targets, self.token_weights, self.transform, rows, self.sums
                )
            )  # fmt: skip


def prepare_model(model: nn.Module) -> None:
    """Let a transformers causal language model answer `model(..., gvpo=ScoreRequest)`.

    Without a request the forward is what it was. Going through `forward` is what makes DDP, FSDP and mixed
    precision work. Preparing twice does nothing; a deep copy is prepared too.
    """
    if hasattr(model, "_forward_before_gvpo"):
        return
    base: Any = model
    for module in base.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        # In evaluation mode on such CPUs bitsandbytes packs a layer for good, for a product without gradient.
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise InputError("The model's 4-bit weights are packed for inference: load the model anew.")
        module.support_avx512bf16_for_cpu = False
    base._forward_before_gvpo = model.forward  # an attribute, not a closure, so that deepcopy rebinds it

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, gvpo: ScoreRequest | PromptCache | None = None, **kwargs: Any) -> Any:
        if gvpo is None:
            return self._forward_before_gvpo(*args, **kwargs)
        if gvpo.shared_prompts is not None:
            kwargs["shared_prompts"] = gvpo.shared_prompts
        if gvpo.routing is not None:
            kwargs["output_router_logits"] = True
        with embedding_summed(self, gvpo.sums):
            output = self.base_model(*args, use_cache=False, **kwargs)
        if gvpo.routing is not None:
            gvpo.routing.see(output)
        return gvpo.score(output, self.get_output_embeddings())

    base.forward = types.MethodType(forward, model)


class TokenScorer:
    """Scores chosen tokens of left-aligned rows under a causal language model.

    Args:
        model: a transformers causal language model (a `PeftModel` is looked through), or any module whose
            `model(input_ids=, attention_mask=)` returns an object with `.logits`.
        temperature: the policy is the model at this sampling temperature.
        float32_head: multiply by the head in float32, outside autocast.

    Attributes:
        fused: whether it scores without keeping logits. None lets `check` decide, by the model's own logits.
        tile_bytes: of the fused head's float32 logits at a time; None: what suits the device.
        probe: what the model was checked with; None: not yet.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, float32_head: bool = False) -> None:
        self.model, self.temperature, self.float32_head = model, temperature, float32_head
        self.fused: bool | None = None
        self.tile_bytes: int | None = None
        self.probe: MicroBatch | None = None
        self.transform = LogitTransform(temperature)
        self._options: dict[str, bool] = {}  # of the model's own forward
        base = unwrap(model)
        # FSDP1 gathers parameters in its own forward, which a request would go around.
        sharded = isinstance(base, FullyShardedDataParallel)
        if hasattr(base, "get_output_embeddings") and hasattr(base, "base_model") and not sharded:
            self.transform = LogitTransform.of(base.config, temperature)
            if "use_cache" in inspect.signature(base.forward).parameters:
                self._options["use_cache"] = False
            prepare_model(base)
        else:
            self.fused = False

    def __call__(
        self,
        model: nn.Module,
        micro: MicroBatch,
        token_weights: Float[Tensor, "tokens"] | None = None,
        sums: VocabularyGradients | None = None,
    ) -> TokenScores:
        """Score the micro-batch's chosen tokens, each given the ones before it.

        `model` is this scorer's model, which has been checked, or a wrapper of it (DDP, FSDP).
        """
        # An adapter may have been put on the head, or taken off, since the check.
        if self.fused and is_linear(unwrap(self.model).get_output_embeddings()):
            request = ScoreRequest(self, micro, token_weights, sums)
            more = micro.image_arguments(request.input_ids)
            if micro.prompts is not None:
                more["position_ids"] = micro.prompts.positions(request.input_ids)
            scores: TokenScores = model(input_ids=request.input_ids, gvpo=request, **more)
        else:
            scores = self._from_logits(model, micro, token_weights)
        if scores.nll is None or micro.routing is None:
            return scores
        return scores._replace(nll=scores.nll + micro.routing.loss.to(scores.nll))

    def _from_logits(
        self, model: nn.Module, micro: MicroBatch, token_weights: Float[Tensor, "tokens"] | None
    ) -> TokenScores:
        ids, chosen = micro.input_ids, micro.chosen[:, 1:]
        options: dict[str, Any] = self._options | micro.image_arguments(ids)
        if micro.routing is not None:
            options["output_router_logits"] = True
        output = model(input_ids=ids, attention_mask=micro.attention_mask, **options)
        if micro.routing is not None:
            micro.routing.see(output)
        # Prompt tuning puts virtual tokens before the row.
        logits = output.logits[:, -ids.shape[1] : -1][chosen]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        all_logps = F.log_softmax(logits, dim=-1)
        logps = all_logps.gather(1, ids[:, 1:][chosen][:, None])[:, 0]
        if token_weights is None:
            return TokenScores(None, logps, None)
        entropy = -(all_logps.exp() * all_logps).detach().sum(-1)
        return TokenScores(-(logps * token_weights.to(logps)).sum(), logps.detach(), entropy)

    @torch.no_grad()
    def check(self, model: nn.Module, batch: GroupBatch, agree: Callable[[bool], bool]) -> None:
        """Decide `fused`, and refuse a model whose scores are not a function of weights and tokens alone.

        Warns if the fused head is not used. Ranks that score together call it together; `agree` says whether
        something holds on all of them.

        Raises:
            InputError: scores are random even in evaluation mode, or depend on what pads a row.
        """
        size = min(PROBE_TOKENS, positions(unwrap(self.model)))
        probe = self.probe = _probe(batch, size)
        wide = next(self.model.parameters()).dtype.itemsize >= 4
        tolerance = 2e-3 if wide and not torch.is_autocast_enabled(probe.chosen.device.type) else 0.05
        differs = ""
        if self.fused is None:
            differs = self._differs(model, probe, tolerance, agree)
            self.fused = not differs

        first, second = (self(model, probe).logps for _ in range(2))
        error = apart(first, second)
        if not agree(error <= tolerance):
            name = random_module(model, lambda: self(model, probe))
            raise InputError(
                f"The model scores a row differently at each try, even in evaluation mode ({error:.2g} nats "
                f"a token apart): {name} is random; take its noise out, so that the weights alone decide."
            )
        whole, beginning = first.split([int(n) - 1 for n in probe.lengths])
        error = apart(whole[: len(beginning)], beginning)
        if not agree(error <= tolerance):
            raise InputError(
                f"The model's log-probabilities depend on what pads a row on the right ({error:.2g} nats a "
                "token apart): GVPO needs a causal language model, in which no token sees a later one."
            )
        if differs:
            warnings.warn(
                f"The fused head does not give this model's log-probabilities ({differs}): using the model's "
                "own logits, which takes more memory.",
                stacklevel=3,
            )

    def _differs(
        self, model: nn.Module, probe: MicroBatch, tolerance: float, agree: Callable[[bool], bool]
    ) -> str:
        """Why the fused head does not give the model's log-probabilities; "" where it does."""
        base, why = unwrap(self.model), ""
        own: Tensor | None = None
        if unknown := LogitTransform.unknown(base.config):
            why = f"it does not know the configuration's {unknown}"
        elif not is_linear(base.get_output_embeddings()):
            why = "the head is more than a linear layer with plain LoRA"
        for compare in (self._compare_heads, self._compare_hidden):
            if not why:
                try:
                    own, why = compare(model, probe, own, tolerance)
                except torch.OutOfMemoryError:
                    raise
                except Exception as failure:
                    why = f"{type(failure).__name__}: {failure}"
            if not agree(not why):
                return why or "on another rank"
        return ""

    def _compare_heads(
        self, model: nn.Module, probe: MicroBatch, _: Tensor | None, tolerance: float
    ) -> tuple[Float[Tensor, "tokens"], str]:
        """The model's own log-probs of the probe; and why its head is not the fused one ("" if it is).

        Both get the same hidden states, and logits of the whole vocabulary are compared.
        """
        ids, chosen = probe.input_ids, probe.chosen[:, 1:]
        head = unwrap(self.model).get_output_embeddings()
        with probed(head, precise=not isinstance(model, FSDPModule)) as linear:
            logits = model(input_ids=ids, attention_mask=probe.attention_mask, **self._options).logits
        (z,) = linear
        exact = torch.promote_types(z.dtype, torch.float32)
        rounding = 1e-4 if z.dtype == exact else 2**-6
        theirs = (logits.to(exact) / self.temperature).log_softmax(-1)
        # Where the hidden states are not finite there is nothing to compare: the step says so.
        comparable = z.isfinite().all(-1)
        ours = self.transform(z.to(exact))[0].log_softmax(-1)
        error = (ours - theirs)[comparable].abs()
        own = theirs[: len(ids), :-1][chosen].gather(1, ids[:, 1:][chosen][:, None])[:, 0]
        if bool((error <= rounding * (1 + ours[comparable].abs().amax(-1, keepdim=True))).all()):
            return own, ""
        return own, f"log-probabilities differ by up to {float(error.max()):.2g} nats"

    def _compare_hidden(
        self, model: nn.Module, probe: MicroBatch, own: Tensor | None, tolerance: float
    ) -> tuple[Float[Tensor, "tokens"], str]:
        """Whether `base_model` gives the hidden states that the model's own logits were made of."""
        assert own is not None
        request = ScoreRequest(self, probe)
        request.float32_head = True
        got = model(input_ids=request.input_ids, gvpo=request).logps
        if (error := apart(own, got)) <= tolerance:
            return own, ""
        return own, f"base_model's hidden states are others: {error:.2g} nats a token apart"


def _probe(batch: GroupBatch, size: int) -> MicroBatch:
    """The beginning of the longest row, and half of it with other padding."""
    ids = batch.input_ids
    longest = ids.new_zeros(1)
    if ids.numel():
        longest = ids[int(batch.lengths.argmax()), : max(1, int(batch.lengths.max()))]
    # Repeated where it is short: any tokens will do, so there always are some.
    whole, half = longest.repeat(-(-size // len(longest)))[:size], size // 2
    ids = torch.stack([whole, torch.cat([whole[:half], whole[half:].flip(0)])])
    lengths, at = torch.tensor([size, half], device=ids.device), torch.arange(size, device=ids.device)
    chosen = (at > 0) & (at < lengths[:, None])
    row_of, column_of = chosen.nonzero().unbind(1)
    return MicroBatch([0, 1], ids, lengths, chosen, row_of, column_of)


def positions(model: Any) -> int:
    """How many tokens the model has positions for, as far as its configuration says."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(text, "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 1 else PROBE_TOKENS


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
