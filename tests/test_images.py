"""Images in prompts: the formula's gradient through the vision tower too, against autograd of single rows."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from gvpo import scoring
from gvpo.batch import GroupBatch
from gvpo.images import Images
from gvpo.step import GVPOStep, SequenceScorer
from gvpo.trl.rollouts import select
from tests.gloo import run_ranks
from tests.models import VOCAB, gradients, relative_error
from tests.test_objective import literal_loss
from tests.vision import literal_vision_logps, tiny_vision_model, vision_batch

BETA, CLOSE = 0.4, 1e-6  # norms of Gemma are float32 in a float64 model, too
KINDS = ("qwen2.5-vl", "gemma3")


def literal(model, batch):
    model = copy.deepcopy(model)
    policy = literal_vision_logps(model, batch)
    reference = policy.detach() if batch.reference_logps is None else batch.reference_logps
    mask = torch.ones(len(batch), dtype=torch.bool)
    literal_loss(policy, reference, batch.rewards, batch.group_ids, BETA, mask).backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("kind", "share", "budget"),
    [(kind, share, budget) for kind in KINDS for share in (True, False) for budget in (1, 150, 10_000)]
    + [("qwen3-vl", True, 150)],
)
def test_the_gradient_is_the_formula_s(kind, share, budget, monkeypatch):
    monkeypatch.setattr(scoring, "prompt_cost", lambda model: 0.0)  # as under a large model
    model, batch = tiny_vision_model(kind), vision_batch(kind)
    expected = literal(model, batch)
    step = GVPOStep(model, beta=BETA, token_budget=budget, share_prompts=share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = step(batch)
    assert step.scorer.fused
    assert (report.shared_prompts > 0) is share
    assert relative_error(gradients(model), expected) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case", ["on-policy", "checkpointed", "LoRA", "own logits", "an image among a row's own"]
)
def test_it_goes_with_everything_else_in_a_step(kind, case, monkeypatch):
    monkeypatch.setattr(scoring, "prompt_cost", lambda model: 0.0)
    model, batch = tiny_vision_model(kind), vision_batch(kind, reference=case != "on-policy")
    if case == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    elif case == "LoRA":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    elif case == "own logits":
        model.config.get_text_config().lm_head_scale = 2.5  # unknown to the fused head, and to the model
    elif case == "an image among a row's own":  # as a tool's: it is context, after tokens that count
        batch.completion_mask[:, 2:5] = True
        batch.completion_mask &= batch.input_ids < VOCAB
        batch.completion_mask[:, 0] = False
    expected = literal(model, batch)
    step = GVPOStep(model, beta=BETA, token_budget=400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = step(batch)
    assert step.scorer.fused is (case != "own logits")
    assert (report.shared_prompts > 0) is (case in ("on-policy", "checkpointed", "LoRA"))
    assert relative_error(gradients(model), expected) < CLOSE


def test_no_one_s_images_are_taken_for_another_s():
    """Two groups have the same tokens and other images: their scores differ."""
    kind = "qwen2.5-vl"
    model, batch = tiny_vision_model(kind), vision_batch(kind)
    assert len(batch.images.sets) == 3
    logps = SequenceScorer(model).sequence_logps(batch)
    assert torch.allclose(logps, literal_vision_logps(model, batch), rtol=1e-9)
    batch.images.of_row[:] = -1
    batch.input_ids[batch.input_ids >= VOCAB] = 3  # what images say must matter at all
    assert not torch.allclose(logps, SequenceScorer(model).sequence_logps(batch), rtol=1e-3)


def test_parts_of_batches_keep_their_images():
    batch, text = vision_batch("gemma3"), vision_batch("gemma3", seed=1)
    text.images = None
    parts = [select(batch, slice(0, 5)), text, select(batch, slice(5, None))]
    whole = GroupBatch.concatenate(parts).images
    assert len(whole.sets) == 3
    for row in (*range(5), *range(17, 24)):
        ids = torch.zeros(1, 4, dtype=torch.long)
        at = row if row < 5 else row - 12
        want, got = batch.images.arguments([at], ids), whole.arguments([row], ids)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert whole.arguments(range(5, 17), torch.zeros(12, 4)) == {}
    assert Images.concatenate([None, None], [3, 4]) is None


def errors_of(rank, world, kind):
    """Errors of the gradient where rank 1 has some of the images, or text alone, or no rows."""
    errors = []
    batch = vision_batch(kind)
    textual = batch.images.of_row < 0
    for mine in (torch.arange(12) < 7, ~textual, torch.ones(12, dtype=torch.bool)):
        model = tiny_vision_model(kind)
        expected = literal(model, batch)
        step = GVPOStep(DistributedDataParallel(model), beta=BETA, token_budget=90)
        step(select(batch, mine if rank == 0 else ~mine))
        errors.append(relative_error(gradients(model), expected))
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_need_not_have_as_many_images(kind):
    for errors in run_ranks(errors_of, 2, kind):
        assert max(errors) < CLOSE, errors
