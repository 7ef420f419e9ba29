"""Load balancing: the whole step's loss, whatever the cuts, against autograd of transformers' function."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gvpo import scoring
from gvpo.errors import InputError
from gvpo.step import GVPOStep
from gvpo.trl.rollouts import select
from tests.gloo import run_ranks
from tests.models import SHAPE, gradients, literal_logps, random_batch, relative_error, tiny_model
from tests.test_objective import literal_loss

BETA, COEFFICIENT = 0.4, 0.3
CLOSE = 1e-6  # transformers' routers and fractions are float32 in a float64 model, too
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe", "jamba")


def tiny_mixture(kind="mixtral", **changes):
    """A tiny mixture of experts in float64, the same at each call; its routers are far from even."""
    torch.manual_seed(0)
    shape = {**SHAPE, **EXPERTS, "head_dim": 8, **changes}
    if kind == "jamba":
        shape |= {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        }
    config = AutoConfig.for_model(kind, **shape)
    config._experts_implementation = "eager"  # the others know no float64
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def literal_balance(model, batch):
    """transformers' function on the step as one padded batch."""
    mask = (torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]).long()
    routers = model(input_ids=batch.input_ids, attention_mask=mask, output_router_logits=True).router_logits
    return load_balancing_loss_func(routers, 4, 2, mask)


def literal(model, batch):
    """Gradient of the formula and of the balancing loss by autograd; and the latter's value."""
    model = copy.deepcopy(model).eval()
    policy = literal_logps(model, batch)
    reference = policy.detach() if batch.reference_logps is None else batch.reference_logps
    valid = torch.ones(len(batch), dtype=torch.bool) if batch.valid is None else batch.valid
    loss = literal_loss(policy, reference, batch.rewards, batch.group_ids, BETA, valid)
    balance = literal_balance(model, batch)
    (loss + COEFFICIENT * balance).backward()
    return gradients(model), balance.item()


def step_of(model, budget=10_000, **others):
    return GVPOStep(model, beta=BETA, router_aux_loss_coef=COEFFICIENT, token_budget=budget, **others)


def long_batch(**changes):
    """Prompts that are worth sharing; with rows that come twice, are not valid, or have no completion."""
    batch = random_batch(**{"groups": 4, "k": 3, "reference": True, "prompt": (30, 40), **changes})
    batch = select(batch, [*range(len(batch)), 0, 5])
    batch.valid = torch.ones(len(batch), dtype=torch.bool)
    batch.valid[2] = False
    batch.completion_mask[3] = False
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_whole_step_s_loss(kind):
    model, batch = tiny_mixture(kind), random_batch(reference=True)
    expected, balance = literal(model, batch)
    report = step_of(model, budget=60)(batch)
    assert report.micro_batches > 3
    assert report.metrics["aux_loss"].item() == pytest.approx(balance, rel=CLOSE)
    assert report.metrics["expert_load_max"] > 1.05
    assert relative_error(gradients(model), expected) < CLOSE


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("budget", [1, 150, 400, 10_000])
def test_no_cut_and_no_shared_prompt_changes_it(reference, budget, monkeypatch):
    monkeypatch.setattr(scoring, "prompt_cost", lambda model: 0.0)  # as under a large model
    model, batch = tiny_mixture(), long_batch(reference=reference)
    if not reference:
        batch.rewards[batch.group_ids == 1] = 0.5  # rows of weight 0 are balanced too
    expected, balance = literal(model, batch)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(budget))
    wide = select(batch, order)
    wide.input_ids = torch.nn.functional.pad(wide.input_ids, (0, 3), value=7)
    wide.completion_mask = torch.nn.functional.pad(wide.completion_mask, (0, 3))
    got = copy.deepcopy(model)
    report = step_of(got, budget)(wide)
    assert (report.shared_prompts > 0) is (budget > 1)
    assert report.metrics["aux_loss"].item() == pytest.approx(balance, rel=CLOSE)
    assert relative_error(gradients(got), expected) < CLOSE


@pytest.mark.parametrize("case", ["on-policy rows", "trust", "checkpointed", "own logits", "LoRA"])
def test_it_goes_with_everything_else_in_a_step(case):
    model, batch = tiny_mixture(), long_batch()
    changed, others = batch, {}
    if case == "on-policy rows":
        free = batch.group_ids == 2
        changed = select(batch, slice(None))
        changed.on_policy, changed.reference_logps = free, batch.reference_logps.masked_fill(free, -5.0)
        batch.reference_logps = torch.where(free, literal_logps(model, batch).detach(), batch.reference_logps)
    elif case == "trust":  # so wide that no token is beyond it
        others["trust"] = 0.99
        batch.rollout_logps = scoring.SequenceScorer(model).token_logps(batch)
    elif case == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    elif case == "own logits":
        model.config.lm_head_scale = 2.5  # which the fused head does not know, nor Mixtral
    else:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected, _ = literal(model, batch)
    step = step_of(model, 400, **others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(changed)
    assert step.scorer.fused is (case != "own logits")
    assert relative_error(gradients(model), expected) < CLOSE


def test_without_rewards_that_differ_the_step_balances_only():
    """All weights are 0, and the gradient is the balancing loss's alone."""
    model, batch = tiny_mixture(), random_batch()
    batch.rewards[:] = 1.0
    expected, _ = literal(model, batch)
    step_of(model, 60)(batch)
    assert relative_error(gradients(model), expected) < CLOSE
    assert gradients(model)["model.layers.0.mlp.gate.weight"].abs().max() > 1e-3


def test_what_cannot_be_balanced_is_refused_by_a_sentence():
    deepseek = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "head_dim": 4}
    for model in (tiny_model(), tiny_mixture("deepseek_v3", **deepseek)):
        with pytest.raises(InputError, match="has no router logits"):
            step_of(model)
    with pytest.raises(InputError, match="has no router logits"):
        step_of(tiny_mixture("granitemoe"))(random_batch())
    model = tiny_mixture().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant"):
        step_of(model)(random_batch())
    step = step_of(tiny_mixture())
    step.balance.top_k = 1  # as another formula would count
    with pytest.raises(InputError, match="balances its experts by another loss"):
        step(random_batch())


def errors_of(rank, world, kind):
    """Relative errors of the gradient where rank 0 has some, all or none of the rows."""
    scoring.prompt_cost = lambda model: 0.0
    errors = []
    for first in (5, 0, 14):
        model, batch = tiny_mixture(), long_batch()
        expected, balance = literal(model, batch)
        if kind == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            if "checkpointed" in kind:
                model.train()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            mesh = init_device_mesh("cpu", (world,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        rows = slice(0, first) if rank == 0 else slice(first, None)
        report = step_of(wrapped, 400)(select(batch, rows))
        got = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(model).items()}
        errors += [relative_error(got, expected), abs(report.metrics["aux_loss"].item() / balance - 1)]
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, checkpointed"])
def test_ranks_balance_their_experts_together(kind):
    for errors in run_ranks(errors_of, 2, kind):
        assert max(errors) < CLOSE, errors
