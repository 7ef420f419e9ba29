"""Load balancing of a mixture of experts over a whole optimizer step, exact for every cut of it.

With f_i how often a token's router picks expert i and P_i the mean of its probability, both over all tokens
and layers, the auxiliary loss is (Switch Transformers, arXiv 2101.03961, equations 4 to 6)

    E Σ_i f_i P_i

f has no gradient. Once f of the *whole step* is known, from a pass without gradient over all its rows, the
loss is a sum over tokens of a linear function of their probabilities: as with GVPO's weights, any
micro-batches, ranks and orders give the same gradient ("global-batch" balancing, arXiv 2501.11873). It is
what transformers' `load_balancing_loss_func` gives for the step as one batch: prompts and completions
count, padding does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from gvpo.batch import widest_float
from gvpo.errors import InputError
from gvpo.model.determinism import is_reentrant

_NO_LOGITS = "has no router logits by which its experts could be balanced: leave router_aux_loss_coef out."


class LoadBalance:
    """The auxiliary loss of a step: counted in one pass (`begin` … `close`), differentiated in the next.

    Args:
        coefficient: by which E Σ_i f_i P_i is multiplied.
        top_k: experts that a token goes to.

    Attributes:
        loss: E Σ_i f_i P_i of the step that was counted last, over all ranks; top_k where loads are even.
        load_max: the largest f_i, in shares of an even load: 1 where loads are even.
    """

    def __init__(self, coefficient: float, top_k: int) -> None:
        self.coefficient, self.top_k, self.checked = coefficient, top_k, False

    @classmethod
    def of(cls, model: Any, coefficient: float) -> LoadBalance:
        """For a model of transformers.

        Raises:
            InputError: it has no router whose logits it returns.
        """
        config = model.config.get_text_config() if hasattr(model, "config") else None
        top_k = getattr(model, "num_experts_per_tok", getattr(config, "num_experts_per_tok", None))
        if not hasattr(config, "output_router_logits") or top_k is None:
            raise InputError(f"{type(model).__name__} {_NO_LOGITS}")
        return cls(coefficient, top_k)

    def check(self, model: nn.Module, own: Float[Tensor, ""] | None, agree: Callable[[bool], bool]) -> None:
        """Compare the loss of what was counted with the model's `own`.

        Raises:
            InputError: it is another one, or gradient checkpointing hides the routers.
        """
        self.checked = True
        if is_reentrant(model):
            raise InputError(
                f"router_aux_loss_coef={self.coefficient:g} needs the routers' gradient, which reentrant "
                "gradient checkpointing hides: set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        error = math.inf if own is None else float((self.loss - own).abs() / self.loss)
        if not agree(error < 0.02):  # bfloat16 may pick other experts
            raise InputError(
                f"router_aux_loss_coef={self.coefficient:g}: {type(model).__name__} balances its experts by "
                f"another loss than E Σ f P (its own is {own}, not {float(self.loss):.4g}): leave it out."
            )

    def begin(self, first: Int[Tensor, "batch"]) -> None:
        """Start to count the rows of a batch, of which those with an equal `first` are run once."""
        self._counts: Tensor | None = None  # by expert: picks, sums of probabilities, tokens × layers
        self._slopes: Tensor | None = None  # of the loss in a token's probabilities
        self.stands_for(first)

    def stands_for(self, first: Int[Tensor, "batch"]) -> None:
        self.times = first.bincount(minlength=len(first)).to(widest_float(first.device))

    def close(self, group: dist.ProcessGroup | None, averaged: int) -> None:
        """End counting, over all ranks of `group`, over `averaged` of which gradients are averaged."""
        counts = self._counts
        if group is not None:
            experts = torch.tensor(0 if counts is None else counts.shape[1], device=self.times.device)
            dist.all_reduce(experts, op=dist.ReduceOp.MAX, group=group)
            if counts is None:  # a rank without rows
                counts = self.times.new_zeros(3, int(experts))
            dist.all_reduce(counts, group=group)
        assert counts is not None
        picks, probability, tokens = counts
        n, share = len(picks), picks / tokens
        self.loss = n * (share * probability / tokens).sum()
        self.load_max = share.max() * n / self.top_k
        self._slopes = self.coefficient * averaged * n * share / tokens

    def see(
        self, router_logits: Sequence[Float[Tensor, "tokens experts"]], times: Float[Tensor, "rows width"]
    ) -> Tensor:
        """Count a forward's tokens; or, once counting is closed, their part of coefficient × loss.

        Args:
            router_logits: of each layer.
            times: for how many tokens of the step each one stands; 0 for padding.
        """
        total = times.new_zeros(())
        for logits in router_logits:
            # What prompt tuning puts before a row does not count.
            z = logits.reshape(len(times), -1, logits.shape[-1])[:, -times.shape[1] :]
            p = z.to(torch.promote_types(z.dtype, torch.float32)).softmax(-1).flatten(0, 1)
            n = times.flatten().to(p.device)
            if self._slopes is None:
                self._count(p.detach(), n)
            else:
                total = total + ((p @ self._slopes.to(p)) * n.to(p)).sum().to(total.device)
        return total

    def _count(self, p: Float[Tensor, "tokens experts"], n: Float[Tensor, "tokens"]) -> None:
        picks = n.new_zeros(p.shape[1])
        picks.index_add_(0, p.topk(self.top_k).indices.flatten(), n.repeat_interleave(self.top_k))
        counts = torch.stack([picks, n @ p.to(n), n.sum().expand_as(picks)])
        self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)


class Routing:
    """What the tokens of one forward stand for in a `LoadBalance`. Given to a model with a request.

    Args:
        balance: being counted, or closed.
        rows: of the step's batch, for which each row of the forward stands; none for a filler.
        lengths: tokens of each row of the forward.

    Attributes:
        loss: their part of the loss times its coefficient, with a gradient; 0 in the pass that counts.
    """

    def __init__(
        self, balance: LoadBalance, rows: Sequence[Sequence[int]], lengths: Int[Tensor, "rows"]
    ) -> None:
        self.balance = balance
        times = balance.times.new_tensor([float(balance.times[list(which)].sum()) for which in rows] or [0.0])
        at = torch.arange(int(lengths.max()), device=lengths.device)
        self.times = times[:, None] * (at < lengths[:, None])
        self.loss: Tensor = times.new_zeros(())

    def see(self, output: Any) -> None:
        """Look at what a model returned."""
        router_logits = getattr(output, "router_logits", None)
        if not router_logits:
            raise InputError(f"{type(output).__name__} {_NO_LOGITS}")
        self.loss = self.balance.see(router_logits, self.times)
