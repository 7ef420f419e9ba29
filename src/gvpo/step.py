"""One exact GVPO optimizer step over any number of groups: score → weights → micro-batches → gradients.

With the weights known, the step's loss is linear in the sequence log-probabilities, so its gradient does
not depend on how rows are cut into micro-batches, put on ranks or ordered (see `gvpo.objective`). The cuts
here are free to be what is cheapest: rows of like length together, each micro-batch trimmed to its own
longest row, rows of weight 0 left out, equal rows run once, a prompt read once for all its rows
(`gvpo.model.shared_prompts`).
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gvpo.batch import GroupBatch, widest_float
from gvpo.images import vision_parameters
from gvpo.model.balance import LoadBalance, Routing
from gvpo.model.determinism import without_noise
from gvpo.model.logprobs import TokenScores, unwrap
from gvpo.model.micro_batch import MicroBatch
from gvpo.model.vocabulary import VocabularyGradients
from gvpo.objective import GVPOLoss, gvpo_loss
from gvpo.scoring import Backend, SequenceScorer, is_out_of_memory
from gvpo.trust import beyond_trust

__all__ = ["Backend", "GVPOStep", "SequenceScorer", "StepReport", "is_out_of_memory"]


@dataclass
class StepReport:
    """What a step did.

    Attributes:
        loss: the GVPO loss of the step's groups (all ranks) before the update.
        metrics: as `gvpo.objective.GVPOLoss.metrics`.
        weights: w of this rank's rows.
        policy_logps: S of this rank's rows in nats (0 for on-policy rows), or None on an on-policy step.
        tokens_beyond_trust: completion tokens that a trust mask left out of this rank's rows.
        micro_batches: of this rank's gradient pass.
        shared_prompts: beginnings that its rows shared, each read once; 0 where nothing was shared.
        tokens: of this rank's gradient pass, padding included.
        useful_tokens: the same without padding.
        scored_tokens: completion tokens of this rank that have weight.
        entropy: mean over those, in nats; NaN if there are none.
        retries: how often the step was made again with a smaller token budget, being out of memory.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]
    weights: Float[Tensor, "batch"]
    policy_logps: Float[Tensor, "batch"] | None
    tokens_beyond_trust: int = 0
    micro_batches: int = 0
    shared_prompts: int = 0
    tokens: int = 0
    useful_tokens: int = 0
    scored_tokens: int = 0
    entropy: float = float("nan")
    retries: int = 0

    def count(self, micro: MicroBatch) -> None:
        """Add a micro-batch, and with a block's last one the prompts read for it."""
        self.micro_batches += 1
        self.tokens += micro.input_ids.numel()
        self.useful_tokens += micro.tokens
        if micro.prompts is not None and micro.prompts.last:
            lengths = micro.prompts.cache.lengths
            self.shared_prompts += len(lengths)
            self.tokens += len(lengths) * max(lengths)
            self.useful_tokens += sum(lengths)


class GVPOStep(SequenceScorer):
    """Adds the exact gradient of one GVPO step to the model's `.grad`; the optimizer step is the caller's.

    Args:
        model: the policy; this and the other arguments as for `SequenceScorer`.
        beta: the implicit reward's temperature β > 0.
        trust: leave out the gradient of tokens whose probability has already moved by more than this share
            of what it was at rollout, in the direction of their weight (`gvpo.trust`); between 0 and 1. Not
            part of the published algorithm; None for the formula as it is.
        router_aux_loss_coef: of a mixture of experts: add the gradient of this times the load-balancing loss
            of the whole step (`gvpo.model.balance`). It takes a pass over all rows, also those of weight 0.

    Examples:
        >>> step = GVPOStep(model, beta=0.1)
        >>> step(GroupBatch.from_tokens(prompts, completions, rewards, group_ids))
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.1,
        trust: float | None = None,
        router_aux_loss_coef: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(model, **others)
        self.beta, self.trust = beta, trust
        self.balance = LoadBalance.of(unwrap(model), router_aux_loss_coef) if router_aux_loss_coef else None

    def _decide(self, batch: GroupBatch) -> None:
        super()._decide(batch)
        if self.balance is None or self.balance.checked:
            return
        probe = self.scorer.probe
        assert probe is not None
        ids, mask = probe.input_ids, probe.attention_mask
        self.balance.begin(torch.arange(2, device=ids.device))
        routed = replace(probe, routing=Routing(self.balance, [[0], [1]], probe.lengths))
        with torch.no_grad(), self.backend.forward_context():
            self.scorer(self._bare, routed)
            own = self._bare(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
        self.balance.close(None, 1)
        self.balance.check(unwrap(self.model), own, self._agree)

    @torch.no_grad()
    def weigh(self, batch: GroupBatch) -> tuple[GVPOLoss, Float[Tensor, "batch length"] | None]:
        """Loss, weights and metrics of `batch` before any update; and its `token_logps`, if needed."""
        token_logps, balance = None, self.balance
        if balance is not None:
            token_logps = self.token_logps(batch, balance=balance)
            balance.close(self.backend.process_group, self.backend.averaged_over(self.model))
        if batch.reference_logps is None:
            # θ is θ': Rθ = 0 whatever S is, and the weights need no forward (docs/theory.md, fact 3).
            policy = reference = torch.zeros(len(batch), device=batch.input_ids.device)
            token_logps = None
        else:
            if token_logps is None:
                token_logps = self.token_logps(batch, _rows_to_score(batch))
            policy, reference = token_logps.sum(1), batch.reference_logps
            if batch.on_policy is not None:  # free rows have no score: 0 on both sides, for Rθ = 0
                token_logps = token_logps.masked_fill(batch.on_policy[:, None], 0.0)
                policy, reference = (x.masked_fill(batch.on_policy, 0.0) for x in (policy, reference))
        result = gvpo_loss(
            policy.to(widest_float(policy.device)),
            reference,
            batch.rewards,
            batch.group_ids,
            beta=self.beta,
            mask=batch.valid,
            process_group=self.backend.process_group,
        )
        if balance is not None:
            result.metrics.update(aux_loss=balance.loss, expert_load_max=balance.load_max)
        return result, token_logps

    def __call__(self, batch: GroupBatch) -> StepReport:
        """Accumulate the gradient of the GVPO loss of `batch` (on all ranks of the backend together).

        If no group has two valid rows, no gradient is made: `.grad` stays as it was and an optimizer skips
        the parameters. Where all weights are 0 instead, the gradient is made and is 0.

        Raises:
            ValueError: as `gvpo.objective.gvpo_loss`.
            torch.OutOfMemoryError: a single row does not fit, or gradients were already (being) shared.
        """
        result, token_logps = self.weigh(batch)
        policy_logps = None if token_logps is None else token_logps.sum(1)
        report = StepReport(result.loss.detach(), result.metrics, result.weights, policy_logps)
        if result.metrics["groups"].item() == 0:
            return report
        chosen = batch.completion_mask
        if self.trust is not None and token_logps is not None:
            batch = self._within_trust(batch, report, token_logps)
        with without_noise(self.model):
            self._decide(batch)
            report, retries = self._retrying(
                lambda: self._accumulate(batch, report, chosen), batch.lengths.tolist(), gradients=True
            )
        return replace(report, retries=retries)

    def _within_trust(
        self, batch: GroupBatch, report: StepReport, token_logps: Float[Tensor, "batch length"]
    ) -> GroupBatch:
        """The batch without tokens beyond trust; rows that have no other tokens lose their weight."""
        assert self.trust is not None
        if batch.rollout_logps is None:
            raise ValueError(
                "trust needs the batch's rollout_logps: log p of each token when it was sampled."
            )
        beyond = beyond_trust(report.weights, token_logps, batch.rollout_logps, self.trust)
        left_out = batch.completion_mask & beyond
        if batch.on_policy is not None:
            left_out &= ~batch.on_policy[:, None]  # not scored: they are as they were sampled
        kept = batch.completion_mask & ~left_out
        report.weights = report.weights.masked_fill(left_out.any(1) & ~kept.any(1), 0.0)
        report.tokens_beyond_trust = int(left_out.sum())
        return replace(batch, completion_mask=kept)

    def _accumulate(
        self, batch: GroupBatch, report: StepReport, chosen: Bool[Tensor, "batch length"]
    ) -> StepReport:
        """The gradient pass over the rows that have weight; `chosen`: before a trust mask."""
        each = report.weights * self.backend.averaged_over(self.model)
        # Equal responses are run once, with the sum of their weights.
        first = batch.first_equal
        weights = torch.zeros_like(each).index_add_(0, first, each)
        times = torch.zeros_like(each).index_add_(0, first, (each != 0).to(each))
        sums = VocabularyGradients(with_embedding=not self.backend.collective_forward(self.model))
        rows = weights.nonzero()[:, 0].tolist()
        if self.balance is not None:
            self.balance.stands_for(first)
            rows = first.unique().tolist()
        done, entropy, scored = replace(report), each.new_zeros(()), each.new_zeros(())
        with closing(self._micro_batches(batch, rows, sums, chosen, self.balance)) as micro_batches:
            for micro in micro_batches:
                sums.last = micro.last
                with nullcontext() if micro.last else self.backend.without_sync(self.model):
                    scores = self._backward(micro, weights, sums)
                done.count(micro)
                if micro.rows and scores.entropy is not None:
                    tokens = micro.per_token(times)
                    entropy += (scores.entropy * tokens).sum()
                    scored += tokens.sum()
        done.scored_tokens = int(scored)
        done.entropy = float(entropy / scored)  # NaN if there are none
        return done

    def _backward(self, micro: MicroBatch, weights: Tensor, sums: VocabularyGradients) -> TokenScores:
        scores = self._score(self.model, micro, micro.per_token(weights), sums)
        assert scores.nll is not None
        loss = scores.nll
        ddp = isinstance(self.model, DistributedDataParallel) and not self.model.find_unused_parameters
        if micro.last and ddp:  # it waits for all gradients, and this rank's rows may have no images
            vision = vision_parameters(unwrap(self.model))
            loss = loss + sum(p.flatten()[:0].sum().to(loss) for p in vision)
        if micro.prompts is not None and micro.prompts.last:
            cache = micro.prompts.cache
            if cache.routing is not None:
                loss = loss + cache.routing.loss.to(loss)
            if self.backend.collective_forward(self.model):
                # FSDP gathers a layer's parameters for its backward when a gradient reaches its output.
                assert cache.hidden is not None
                loss = loss + cache.hidden[..., :0].sum()
        self.backend.backward(loss, last=micro.last)
        return scores


def _rows_to_score(batch: GroupBatch) -> list[int]:
    """Valid rows that are not on-policy. (Whether a group has two is known only over all ranks.)"""
    needed = torch.ones_like(batch.lengths, dtype=torch.bool) if batch.valid is None else batch.valid
    if batch.on_policy is not None:
        needed = needed & ~batch.on_policy
    return needed.nonzero()[:, 0].tolist()
