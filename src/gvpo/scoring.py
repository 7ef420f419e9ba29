"""Scores of sequences under a model, in micro-batches of any cut that share what rows begin with.

Results do not depend on the cuts, so these are free to be what is cheapest: rows of like length together,
each micro-batch trimmed to its longest row, a prompt read once for its rows (`gvpo.model.shared_prompts`).
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from gvpo.batch import Beginnings, GroupBatch, widest_float
from gvpo.errors import InputError
from gvpo.model.balance import LoadBalance, Routing
from gvpo.model.determinism import without_noise
from gvpo.model.logprobs import TokenScorer, TokenScores, unwrap
from gvpo.model.micro_batch import MicroBatch
from gvpo.model.shared_prompts import (
    Continuation,
    PromptCache,
    attention_shared,
    prompt_cost,
    start_cost,
    token_weight,
)
from gvpo.model.sharing_check import sample_with_images, way_to_share
from gvpo.model.vocabulary import VocabularyGradients
from gvpo.packing import Block, padded_cost, plan_blocks, plan_micro_batches

DEFAULT_TOKEN_BUDGET = 16_384
Result = TypeVar("Result")


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

    def without_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context in which a backward does not share gradients among ranks."""
        if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
            return model.no_sync()
        if isinstance(model, FSDPModule):
            return _without_fsdp_sync(model)
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """A context for forwards, such as autocast."""
        return nullcontext()

    def averaged_over(self, model: nn.Module) -> int:
        """Over how many ranks the engine averages gradients: the loss is multiplied by it."""
        if isinstance(model, DistributedDataParallel) or self.collective_forward(model):
            return dist.get_world_size(self.process_group)
        return 1

    def collective_forward(self, model: nn.Module) -> bool:
        """Whether each forward gathers parameters, so that ranks must run equally many (FSDP, ZeRO-3)."""
        sharded = (FSDPModule, FullyShardedDataParallel)
        return any(isinstance(module, sharded) for module in model.modules())


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
        share_prompts: read what rows begin with once for all of them, where that is less work and the model
            allows it (found out at first use, with a warning if not). No influence on the result.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        backend: Backend | None = None,
        float32_head: bool = False,
        share_prompts: bool = True,
    ) -> None:
        self.model = model
        self.token_budget = token_budget
        self.backend = backend or Backend(dist.group.WORLD if dist.is_initialized() else None)
        self.scorer = TokenScorer(model, temperature, float32_head)
        # How rows share their prompts, text and others; None: not decided yet.
        self._way: str | None = None if share_prompts else "whole"
        self._way_with_images = self._way
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
        self, batch: GroupBatch, rows: Sequence[int] | None = None, balance: LoadBalance | None = None
    ) -> Float[Tensor, "batch length"]:
        """log p of each completion token, whose sum is S; 0 at all other tokens and for rows left out.

        `balance`: is to count the experts of the rows' tokens.
        """
        device, first = batch.input_ids.device, batch.first_equal
        asked = torch.arange(len(batch)) if rows is None else torch.tensor(rows, dtype=torch.long)
        asked = asked.to(device)
        distinct = first[asked].unique().tolist()

        def score() -> Tensor:
            if balance is not None:
                balance.begin(first)
            out = torch.zeros(batch.input_ids.shape, dtype=widest_float(device), device=device)
            with closing(self._micro_batches(batch, distinct, balance=balance)) as micro_batches:
                for micro in micro_batches:
                    logps = self._score(self._bare, micro).logps
                    if micro.rows:
                        out[micro.row_of, micro.column_of] = logps.to(out.dtype)
            return out

        with without_noise(self.model):
            self._decide(batch)
            scores = self._retrying(score, batch.lengths.tolist())[0]
        out = torch.zeros_like(scores)
        out[asked] = scores[first[asked]]
        return out

    def _score(
        self,
        model: nn.Module,
        micro: MicroBatch,
        token_weights: Float[Tensor, "tokens"] | None = None,
        sums: VocabularyGradients | None = None,
    ) -> TokenScores:
        with self.backend.forward_context():
            return self.scorer(model, micro, token_weights, sums)

    def _micro_batches(
        self,
        batch: GroupBatch,
        rows: Sequence[int],
        sums: VocabularyGradients | None = None,
        chosen: Bool[Tensor, "batch length"] | None = None,
        balance: LoadBalance | None = None,
    ) -> Generator[MicroBatch]:
        """Those of `rows` in turn. To be closed: attention is another one while it runs.

        With `sums`, for a gradient pass: at least one, if of weight 0, since ranks share gradients in the
        last one, and a gradient of 0 is not the same to an optimizer with momentum as none.
        """
        lengths = batch.lengths.tolist()
        beginnings, blocks = self._plan(batch, lengths, rows, chosen, balance is not None)
        if sums is not None and not any(block.micro_batches for block in blocks):
            blocks[-1].micro_batches.append([])
        for block in blocks:
            if sums is not None:
                sums.last = block is blocks[-1]
            places: dict[int | None, int] = {b: place for place, b in enumerate(block.beginnings)}
            with self._read(batch, beginnings, block, sums, balance) as cache:
                for members in block.micro_batches:
                    ends_block = members is block.micro_batches[-1]
                    if beginnings is None or cache is None:
                        micro = MicroBatch.of(batch, members, lengths)
                    else:
                        where = [places.get(beginnings.of_row[row]) for row in members] or [None]
                        micro = MicroBatch.of(batch, members, beginnings.ends, beginnings.starts)
                        micro.prompts = Continuation(cache, where, ends_block)
                    if balance is not None:
                        micro.routing = Routing(balance, [[row] for row in members], micro.lengths)
                    micro.last = ends_block and block is blocks[-1]
                    self._retry_is_safe &= not self._shares(micro.last and sums is not None)
                    yield micro

    def _plan(
        self,
        batch: GroupBatch,
        lengths: list[int],
        rows: Sequence[int],
        chosen: Tensor | None,
        whole_rows: bool,
    ) -> tuple[Beginnings | None, list[Block]]:
        """Blocks of micro-batches, and the beginnings that they share if that costs less than whole rows.

        Ranks whose forwards are collective come to equally many.
        """
        start = self._start_cost
        beginnings, plan = None, plan_micro_batches(lengths, rows, self.token_budget, start)
        blocks = [Block([], plan)]
        found = None if self._way_of(batch) == "whole" else Beginnings.of(batch, chosen, whole=whole_rows)
        if found is not None and found.hold_images(batch):
            model, whole = unwrap(self.model), padded_cost(lengths, plan, start)
            # Ranks that go together must all plan: one's rows may gain nothing where another's gain much.
            limit = math.inf if self.backend.collective_forward(self.model) else whole
            shared, cost = plan_blocks(
                found, rows, self.token_budget, token_weight(model), prompt_cost(model), limit, start
            )
            costs = self._over_ranks([whole, cost], dist.ReduceOp.SUM)
            if costs[1] < costs[0]:
                beginnings, blocks = found, shared
        most = int(self._over_ranks([len(blocks)])[0])
        blocks += [Block([], []) for _ in range(most - len(blocks))]
        for block, n in zip(blocks, self._over_ranks([len(b.micro_batches) for b in blocks]), strict=True):
            block.micro_batches += [[] for _ in range(int(n) - len(block.micro_batches))]
        return beginnings, blocks

    @contextmanager
    def _read(
        self,
        batch: GroupBatch,
        beginnings: Beginnings | None,
        block: Block,
        sums: VocabularyGradients | None,
        balance: LoadBalance | None,
    ) -> Iterator[PromptCache | None]:
        """Read a block's beginnings, if any; while it is open, its rows can go on after them."""
        if beginnings is None:
            yield None
            return
        model = self._bare
        with attention_shared(unwrap(model)) as original:
            lengths = [beginnings.lengths[b] for b in block.beginnings]
            having = [beginnings.rows[b] for b in block.beginnings]
            ids, images = batch.input_ids[having, : max(lengths, default=1)], None
            if not lengths:  # a filler, for ranks that have nothing to do
                lengths, ids = [1], ids.new_zeros(1, 1)
            elif batch.images is not None:
                images = batch.images.select(having)
            cache = PromptCache(lengths, original, self._way_of(batch) == "merged", sums)
            if balance is not None:
                rows = [beginnings.rows_with(b) for b in block.beginnings]
                cache.routing = Routing(balance, rows, torch.tensor(lengths, device=ids.device))
            self._retry_is_safe &= not self._shares(last=False)
            with self.backend.forward_context():
                cache.read(model, ids, images)
            try:
                yield cache
            finally:
                cache.clear()

    def _retrying(
        self, attempt: Callable[[], Result], lengths: Sequence[int], *, gradients: bool = False
    ) -> tuple[Result, int]:
        """Run `attempt`, again with half the token budget whenever it is safe to after running out of memory.

        `attempt` clears `_retry_is_safe` when other ranks may wait for it in a collective. `gradients`: it
        makes some, which go before the next.
        """
        # Gradients that others left would be lost in a retry.
        safe = not gradients or all(p.grad is None for p in self.model.parameters())
        retries = 0
        while True:
            self._retry_is_safe = safe
            try:
                return attempt(), retries
            except RuntimeError as error:
                fits_no_more = self.token_budget <= max(lengths)
                if not is_out_of_memory(error) or not self._retry_is_safe or fits_no_more:
                    raise
            # Out of the except block, so that the traceback no longer holds the failed pass's tensors.
            self.token_budget = max(*lengths, self.token_budget // 2)
            if gradients:
                for parameter in self.model.parameters():
                    parameter.grad = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"Out of memory: made again with micro-batches of {self.token_budget} tokens.", stacklevel=4
            )
            retries += 1

    def _decide(self, batch: GroupBatch) -> None:
        """Let the scorer check the model, and how prompts can be shared, once; all ranks alike."""
        if self.scorer.probe is None:
            with self.backend.forward_context():
                self.scorer.check(self._bare, batch, self._agree)
            self._start_cost = start_cost(unwrap(self.model))
        collective = self.backend.collective_forward(self.model)
        choose = partial(
            way_to_share, self.scorer, self._bare, self.backend.forward_context, collective=collective
        )
        if self._way is None:
            self._way = choose(batch.input_ids.device, agree=self._agree)
        if batch.images is None:
            return
        if collective:
            raise InputError(
                "The batch has images, which ranks that gather their parameters (FSDP, ZeRO-3) would have to "
                "run equally often: use DDP or one process."
            )
        if self._way_with_images is None and (sample := sample_with_images(batch)) is not None:
            # Ranks may choose differently, as the gradient is the same.
            self._way_with_images = choose(batch.input_ids.device, agree=bool, sample=sample)

    def _way_of(self, batch: GroupBatch) -> str:
        return (self._way if batch.images is None else self._way_with_images) or "whole"

    def _agree(self, holds: bool) -> bool:
        """Whether something holds on all ranks."""
        return bool(self._reduced([holds], dist.ReduceOp.MIN)[0])

    def _over_ranks(
        self, values: Sequence[float], op: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX
    ) -> Sequence[float]:
        """The values' maxima (or sums) over ranks whose forwards are collective."""
        return self._reduced(values, op) if self.backend.collective_forward(self.model) else values

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> Sequence[float]:
        if self.backend.process_group is None:
            return values
        device = next(self.model.parameters()).device
        numbers = torch.tensor(values, dtype=widest_float(device), device=device)
        dist.all_reduce(numbers, op=op, group=self.backend.process_group)
        return list(numbers.tolist())

    def _shares(self, last: bool) -> bool:
        """Whether other ranks may be waiting in a collective while this micro-batch runs."""
        group = self.backend.process_group
        alone = group is None or dist.get_world_size(group) == 1
        return not alone and (last or self.backend.collective_forward(self.model))


def is_out_of_memory(error: RuntimeError) -> bool:
    signs = "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
