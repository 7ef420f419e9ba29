"""The step under DDP and FSDP2 on gloo ranks: the gradient of the union, in uneven shares."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gvpo import scoring
from gvpo.batch import GroupBatch
from gvpo.step import GVPOStep
from tests.failures import OutOfMemory
from tests.gloo import run_ranks
from tests.models import gradients, literal_gradient, random_batch, relative_error, tiny_model

BETA = 0.4
# Rows of rank 0 out of 20: even, cutting groups, nearly none, none.
SHARES = [10, 7, 1, 0]


def share_of(batch: GroupBatch, rank: int, first: int) -> GroupBatch:
    rows = slice(0, first) if rank == 0 else slice(first, None)
    parts = [batch.input_ids, batch.lengths, batch.completion_mask, batch.rewards, batch.group_ids]
    share = GroupBatch(*(part[rows] for part in parts))
    if batch.reference_logps is not None:
        share.reference_logps = batch.reference_logps[rows]
    return share


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def errors_of(rank: int, world: int, kind: str, head: str, prompt: tuple[int, int]) -> list[float]:
    """Relative errors of gradient and loss against literal autograd of the union in float64."""
    scoring.prompt_cost = lambda model: 0.0  # as under a large model
    errors = []
    for first in SHARES:
        for reference in (False, True):
            batch = random_batch(groups=5, k=4, reference=reference, equal_groups=2, prompt=prompt)
            expected, loss = literal_gradient(tiny_model(head).double(), batch, BETA)
            model = tiny_model(head)
            if kind == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                mesh = init_device_mesh("cpu", (world,))
                if kind == "fsdp2, checkpointed":
                    model.train()
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                if kind == "fsdp2, own head":  # docs/upstream/trl-fsdp2-head.md
                    fully_shard(model.lm_head, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            # Checkpointed, a shared token's keys take more memory than the rest of it.
            budget = 800 if "checkpointed" in kind else 4 * prompt[1] + 24
            step = GVPOStep(wrapped, beta=BETA, token_budget=budget)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                report = step(share_of(batch, rank, first))
            assert step.scorer.fused
            if prompt[0] > 20 and rank and first < 2:
                assert report.shared_prompts
            got = {n: whole(g) for n, g in gradients(model).items()}
            errors += [relative_error(got, expected), abs(report.loss.item() / loss - 1)]
    return errors


def fsdp1_error_of(rank: int, world: int) -> tuple[bool, float]:
    """FSDP1, whose parameters only its own forward gathers: whether fused, and the gradient's error."""
    batch = random_batch(groups=5, k=4, reference=True)
    expected, _ = literal_gradient(tiny_model().double(), batch, BETA)
    wrapped = FullyShardedDataParallel(tiny_model(), use_orig_params=True, device_id=torch.device("cpu"))
    step = GVPOStep(wrapped, beta=BETA, token_budget=60)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The fused head")
        step(share_of(batch, rank, 7))
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        got = {n.replace("_fsdp_wrapped_module.", ""): g for n, g in gradients(wrapped).items()}
    return bool(step.scorer.fused), relative_error(got, expected)


@pytest.mark.slow
def test_fsdp1_gets_the_gradient_of_the_union_through_the_model_s_own_logits():
    for fused, error in run_ranks(fsdp1_error_of, 2):
        assert not fused
        assert error < 1e-5


def out_of_memory_on_rank_one(rank: int, world: int) -> float:
    """One rank runs out of memory before anything is shared: it retries alone, the update is the same."""
    batch = random_batch(groups=8, k=4, reference=True)
    expected, _ = literal_gradient(tiny_model().double(), batch, BETA)
    model = tiny_model()
    backend = OutOfMemory([0] if rank == 1 else [], dist.group.WORLD)
    step = GVPOStep(DistributedDataParallel(model), beta=BETA, token_budget=128, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = step(share_of(batch, rank, 15))
    assert report.retries == rank
    dist.barrier()
    return relative_error(gradients(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "head", "prompt"),
    [
        ("ddp", "llama", (2, 9)),
        ("fsdp2", "untied", (2, 9)),
        ("fsdp2", "llama", (2, 9)),
        ("fsdp2, own head", "untied", (2, 9)),
        # Long enough to be shared.
        ("ddp", "llama", (30, 50)),
        ("fsdp2", "llama", (30, 50)),
        ("fsdp2, checkpointed", "untied", (30, 50)),
    ],
)
def test_wrapped_models_get_the_gradient_of_the_union(kind, head, prompt):
    for errors in run_ranks(errors_of, 2, kind, head, prompt):
        assert max(errors) < 1e-5, errors


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_retries_alone():
    for error in run_ranks(out_of_memory_on_rank_one, 2):
        assert error < 1e-5


def votes_of(rank: int, world: int) -> tuple[bool, float]:
    """Rank 1 alone meets a setting that the fused head does not know; whether rank 0 fuses, and the error."""
    batch = random_batch(reference=True)
    expected, _ = literal_gradient(tiny_model().double(), batch, BETA)
    model = tiny_model()
    if rank == 1:
        model.config.lm_head_scale = 2.5
    step = GVPOStep(DistributedDataParallel(model), beta=BETA, token_budget=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(share_of(batch, rank, 10))
    return step.scorer.fused, relative_error(gradients(model), expected)


@pytest.mark.slow
def test_a_head_that_one_rank_cannot_fuse_is_fused_on_none():
    for fused, error in run_ranks(votes_of, 2):
        assert not fused
        assert error < 1e-5


def out_of_memory_in_the_last(rank: int, world: int) -> str:
    step = GVPOStep(DistributedDataParallel(tiny_model()), beta=BETA, token_budget=60)
    batch = random_batch()
    last = step(share_of(batch, rank, 10)).micro_batches - 1
    step.model.zero_grad()
    step.backend = OutOfMemory([last] if rank == 1 else [], dist.group.WORLD)
    try:
        step(share_of(batch, rank, 10))
    except torch.OutOfMemoryError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_no_retry_where_the_other_ranks_have_shared_their_gradients():
    assert run_ranks(out_of_memory_in_the_last, 2) == ["", "injected"]


def five_steps(rank: int, world: int, budget: int) -> dict[str, torch.Tensor]:
    """Parameters after five steps, in float64."""
    scoring.prompt_cost = lambda model: 0.0
    model = tiny_model().double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    step, optimizer = GVPOStep(wrapped, beta=BETA, token_budget=budget), torch.optim.AdamW(model.parameters())
    for seed in range(5):
        batch = random_batch(groups=5, k=4, seed=seed, reference=True, prompt=(30, 50))
        optimizer.zero_grad()
        step(share_of(batch, rank, 7) if world > 1 else batch)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_five_steps_with_shared_prompts_end_alike_on_one_rank_and_on_two():
    alone, *ends = [*run_ranks(five_steps, 1, 10_000), *run_ranks(five_steps, 2, 150)]
    for end in ends:
        assert relative_error(end, alone) < 1e-7
