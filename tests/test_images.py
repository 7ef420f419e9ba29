"""Images in prompts: the formula's gradient through the vision tower too, against autograd of single rows."""

import copy
import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gvpo import scoring
from gvpo.batch import GroupBatch
from gvpo.step import GVPOStep
from gvpo.trl.rollouts import select
from tests.gloo import run_ranks
from tests.models import gradients, relative_error
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_the_gradient_is_the_formula_s(kind, share, budget, monkeypatch):
    monkeypatch.setattr(scoring, "prompt_cost", lambda model: 0.0)  # as under a large model
    model, batch = tiny_vision_model(kind), vision_batch(kind)
    expected = literal(model, batch)
    step = GVPOStep(model, beta=BETA, token_budget=budget, share_prompts=share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = step(batch)
    assert step.scorer.fused
    assert (report.shared_prompts > 0) is (share and budget > 1)
    assert relative_error(gradients(model), expected) < CLOSE
