"""One exact GVPO optimizer step over any number of groups: score → weights → micro-batches → gradients.

With the weights known, the step's loss is linear in the sequence log-probabilities, so its gradient does
not depend on how rows are cut into micro-batches, put on ranks or ordered (see `gvpo.objective`). The cuts
here are free to be what is cheapest: rows of like length together, each micro-batch trimmed to its own
longest row, rows of weight 0 left out.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gvpo.batch import GroupBatch, MicroBatch, widest_float
from gvpo.model.determinism import without_noise
from gvpo.model.logprobs import TokenScorer, TokenScores
from gvpo.model.vocabulary import VocabularyGradients
from gvpo.objective import GVPOLoss, gvpo_loss
from gvpo.packing import plan_micro_batches
from gvpo.trust import beyond_trust

if TYPE_CHECKING:
    from jaxtyping import Float

DEFAULT_TOKEN_BUDGET = 16_384
Result = TypeVar("Result")


@dataclass
class StepReport:
    """What a step did.

    Attributes:
        loss: the GVPO loss of the step's groups (all ranks) before the update.
        metrics: as `gvpo.objective.GVPOLoss.metrics`.
        weights: w of this rank's rows.
        policy_logps: S of this rank's rows in nats (0 for free rows), or None on a free step.
        tokens_beyond_trust: completion tokens that a trust mask left out of this rank's rows.
        micro_batches: of this rank's gradient pass.
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
    tokens: int = 0
    useful_tokens: int = 0
    scored_tokens: int = 0
    entropy: float = float("nan")
    retries: int = 0


class Backend:
    """How gradients are made and shared: plain PyTorch, alone or under DDP or FSDP2.

    Engines override it; `gvpo.trl` does so for accelerate.

    Args:
        process_group: the ranks that make a step together; None: this process by itself.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Accumulate the gradient of a micro-batch's loss; `last`: no other of this step follows."""
        loss.backward()

    def without_sync(self, model: nn.Module) -> AbstractContextManager:
        """A context in which a backward does not share gradients among ranks."""
        if isinstance(model, DistributedDataParallel):
            return model.no_sync()
        if isinstance(model, FSDPModule):
            return _without_fsdp_sync(model)
        return nullcontext()

    def forward_context(self) -> AbstractContextManager:
        """A context for forwards, such as autocast."""
        return nullcontext()

    def averaged_over(self, model: nn.Module) -> int:
        """Over how many ranks the engine averages gradients: the loss is multiplied by it."""
        if isinstance(model, DistributedDataParallel) or self.collective_forward(model):
            return dist.get_world_size(self.process_group)
        return 1

    def collective_forward(self, model: nn.Module) -> bool:
        """Whether each forward gathers parameters, so that ranks must run equally many (FSDP, ZeRO-3)."""
        return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def _without_fsdp_sync(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


class SequenceScorer:
    """Scores sequences under a model, in micro-batches of a token budget.

    Args:
        model: a causal language model of transformers (or any module with `.logits`), bare or wrapped in
            DDP, FSDP2 or PEFT.
        temperature: sampling temperature at which the policy is the model.
        token_budget: padded tokens per micro-batch. What it is has no influence on the result. Halved by
            itself, and the same work done again, when memory runs out.
        backend: how ranks work together; by default as the model is wrapped, in the default process group.
        float32_head: compute the head's logits in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        backend: Backend | None = None,
        float32_head: bool = False,
    ) -> None:
        self.model = model
        self.token_budget = token_budget
        self.backend = backend or Backend(dist.group.WORLD if dist.is_initialized() else None)
        self.scorer = TokenScorer(model, temperature, float32_head)
        self._retry_is_safe = False

    @property
    def _bare(self) -> nn.Module:
        # A forward through DDP would broadcast buffers, which only some ranks might do in a scoring pass.
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def sequence_logps(self, batch: GroupBatch, rows: Sequence[int] | None = None) -> Float[Tensor, "batch"]:
        """S in nats of the batch's rows under the model as it is, float64; 0 for rows left out.

        The policy's own scoring pass, and how reference log-probs are made: under the rollout policy before
        its first update, or under a fixed model.
        """
        return self.token_logps(batch, rows).sum(1)

    @torch.no_grad()
    def token_logps(
        self, batch: GroupBatch, rows: Sequence[int] | None = None
    ) -> Float[Tensor, "batch length"]:
        """log p of each completion token, whose sum is S; 0 at all other tokens and for rows left out."""
        device, lengths = batch.input_ids.device, batch.lengths.tolist()
        chosen_rows = range(len(batch)) if rows is None else rows

        def score() -> Tensor:
            out = torch.zeros(batch.input_ids.shape, dtype=widest_float(device), device=device)
            plan = plan_micro_batches(lengths, chosen_rows, self.token_budget)
            for index in range(self._equal_count(len(plan))):
                micro = MicroBatch.of(batch, plan[index] if index < len(plan) else [], lengths)
                self._retry_is_safe &= not self._shares(last=False)
                with self.backend.forward_context():
                    scores = self.scorer(self._bare, micro.input_ids, micro.lengths, micro.chosen)
                if micro.rows:
                    spread = micro.spread(scores.logps)[:, : out.shape[1]]
                    out[torch.tensor(micro.rows, device=device), : spread.shape[1]] = spread
            return out

        with without_noise(self.model):
            self._decide_head(batch)
            return self._retrying(score, lengths)[0]

    def _retrying(
        self,
        attempt: Callable[[], Result],
        lengths: Sequence[int],
        *,
        safe: bool = True,
        clear_gradients: bool = False,
    ) -> tuple[Result, int]:
        """Run `attempt`, again with half the token budget whenever it is safe to after running out of memory.

        `attempt` clears `_retry_is_safe` when other ranks may wait for it in a collective.
        """
        for retries in count():
            self._retry_is_safe = safe
            try:
                return attempt(), retries
            except RuntimeError as error:
                fits_no_more = self.token_budget <= max(lengths)
                if not is_out_of_memory(error) or not self._retry_is_safe or fits_no_more:
                    raise
            # Out of the except block, so that the traceback no longer holds the failed pass's tensors.
            self.token_budget = max(*lengths, self.token_budget // 2)
            if clear_gradients:
                for parameter in self.model.parameters():
                    parameter.grad = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"Out of memory: made again with micro-batches of {self.token_budget} tokens.", stacklevel=4
            )
        raise AssertionError("unreachable")

    def _decide_head(self, batch: GroupBatch) -> None:
        """Let the scorer check the model once, and all ranks come to the same answer."""
        if self.scorer.checked:
            return
        micro = MicroBatch.of(batch, list(range(len(batch))), batch.lengths.tolist())

        def agree(holds: bool) -> bool:
            if self.backend.process_group is None:
                return holds
            vote = torch.tensor(int(holds), device=batch.input_ids.device)
            dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self.backend.process_group)
            return bool(vote.item())

        with self.backend.forward_context():
            self.scorer.check(self._bare, micro.input_ids, micro.lengths, agree)

    def _equal_count(self, count: int) -> int:
        if self.backend.process_group is None or not self.backend.collective_forward(self.model):
            return count
        most = torch.tensor(count, device=next(self.model.parameters()).device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.backend.process_group)
        return int(most.item())

    def _shares(self, last: bool) -> bool:
        """Whether other ranks may be waiting in a collective while this micro-batch runs."""
        group = self.backend.process_group
        alone = group is None or dist.get_world_size(group) == 1
        return not alone and (last or self.backend.collective_forward(self.model))


class GVPOStep(SequenceScorer):
    """Adds the exact gradient of one GVPO step to the model's `.grad`; the optimizer step is the caller's.

    Args:
        model: the policy; this and the other arguments as for `SequenceScorer`.
        beta: the implicit reward's temperature β > 0.
        trust: leave out the gradient of tokens whose probability has already moved by more than this share
            of what it was at rollout, in the direction of their weight (`gvpo.trust`); between 0 and 1. Not
            part of the published algorithm; None for the formula as it is.

    Examples:
        >>> step = GVPOStep(model, beta=0.1)
        >>> step(GroupBatch.from_tokens(prompts, completions, rewards, group_ids))
        >>> optimizer.step()
    """

    def __init__(
        self, model: nn.Module, *, beta: float = 0.1, trust: float | None = None, **others: Any
    ) -> None:
        super().__init__(model, **others)
        self.beta, self.trust = beta, trust

    @torch.no_grad()
    def weigh(self, batch: GroupBatch) -> tuple[GVPOLoss, Float[Tensor, "batch length"] | None]:
        """Loss, weights and metrics of `batch` before any update; and its `token_logps`, if needed."""
        if batch.reference_logps is None:
            # θ is θ': Rθ = 0 whatever S is, and the weights need no forward (docs/theory.md, fact 3).
            policy = reference = torch.zeros(len(batch), device=batch.input_ids.device)
            token_logps = None
        else:
            token_logps = self.token_logps(batch, _rows_to_score(batch))
            policy = token_logps.sum(1)
            # Free rows have no score: 0 on both sides, for Rθ = 0.
            reference = batch.reference_logps
            reference = reference if batch.free is None else reference.masked_fill(batch.free, 0.0)
        result = gvpo_loss(
            policy.to(widest_float(policy.device)),
            reference,
            batch.rewards,
            batch.group_ids,
            beta=self.beta,
            mask=batch.valid,
            process_group=self.backend.process_group,
        )
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
        if self.trust is not None and token_logps is not None:
            batch, report = self._within_trust(batch, report, token_logps)
        # Gradients that others left would be lost in a retry.
        owned = all(p.grad is None for p in self.model.parameters())
        lengths = batch.lengths.tolist()
        with without_noise(self.model):
            self._decide_head(batch)
            report, retries = self._retrying(
                lambda: self._accumulate(batch, lengths, report), lengths, safe=owned, clear_gradients=True
            )
        return replace(report, retries=retries)

    def _within_trust(
        self, batch: GroupBatch, report: StepReport, token_logps: Float[Tensor, "batch length"]
    ) -> tuple[GroupBatch, StepReport]:
        """The batch without tokens beyond trust; rows that have no other tokens lose their weight."""
        assert self.trust is not None
        if batch.rollout_logps is None:
            raise ValueError(
                "trust needs the batch's rollout_logps: log p of each token when it was sampled."
            )
        left_out = batch.completion_mask & beyond_trust(
            report.weights, token_logps, batch.rollout_logps, self.trust
        )
        if batch.free is not None:
            left_out &= ~batch.free[:, None]  # not scored: they are as they were sampled
        kept = batch.completion_mask & ~left_out
        weights = report.weights.masked_fill(left_out.any(1) & ~kept.any(1), 0.0)
        count = int(left_out.sum())
        return replace(batch, completion_mask=kept), replace(
            report, weights=weights, tokens_beyond_trust=count
        )

    def _accumulate(self, batch: GroupBatch, lengths: list[int], report: StepReport) -> StepReport:
        """The gradient pass over the rows that have weight."""
        weights = report.weights * self.backend.averaged_over(self.model)
        plan = plan_micro_batches(lengths, weights.nonzero()[:, 0].tolist(), self.token_budget)
        # At least one micro-batch, if of weight 0: ranks share gradients in the last one, and a gradient
        # of 0 is not the same to an optimizer with momentum as none.
        n_micro = self._equal_count(max(1, len(plan)))
        sums = VocabularyGradients(with_embedding=not self.backend.collective_forward(self.model))
        tokens, entropies = 0, []
        for index in range(n_micro):
            micro = MicroBatch.of(batch, plan[index] if index < len(plan) else [], lengths)
            sums.last = last = index == n_micro - 1
            self._retry_is_safe &= not self._shares(last)
            with nullcontext() if last else self.backend.without_sync(self.model):
                scores = self._backward(micro, weights, sums, last)
            tokens += micro.input_ids.numel()
            if micro.rows and scores.entropy is not None:
                entropies.append(scores.entropy)
        return replace(
            report,
            micro_batches=n_micro,
            tokens=tokens,
            useful_tokens=sum(lengths[row] for rows in plan for row in rows),
            scored_tokens=sum(len(e) for e in entropies),
            entropy=torch.cat(entropies).mean().item() if entropies else float("nan"),
        )

    def _backward(
        self, micro: MicroBatch, weights: Tensor, sums: VocabularyGradients, last: bool
    ) -> TokenScores:
        with self.backend.forward_context():
            scores = self.scorer(
                self.model,
                micro.input_ids,
                micro.lengths,
                micro.chosen,
                micro.per_token(weights),
                sums,
            )
        assert scores.nll is not None
        self.backend.backward(scores.nll, last=last)
        return scores


def _rows_to_score(batch: GroupBatch) -> list[int]:
    """Valid rows that are not free. (Whether a group has two valid ones is known only over all ranks.)"""
    needed = torch.ones_like(batch.lengths, dtype=torch.bool) if batch.valid is None else batch.valid
    if batch.free is not None:
        needed = needed & ~batch.free
    return needed.nonzero()[:, 0].tolist()


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
