"""Prompts prefilled once: the same tokens as `model.generate` makes, and the model's distribution."""

from contextlib import nullcontext

import pytest
import torch
from transformers import GenerationConfig

from gvpo.model.generation import prefill, shared_prompts
from tests.models import VOCAB, tiny_model


def prompts(k=3):
    """Four left-padded prompts of different lengths, one of which holds the padding token; k rows each."""
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (4, 7))
    mask = torch.arange(7) >= torch.tensor([0, 2, 3, 5])[:, None]
    ids = ids * mask
    ids[0, 2] = 0
    order = torch.randperm(4 * k)
    return ids.repeat_interleave(k, 0)[order], mask.long().repeat_interleave(k, 0)[order]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "softcap"])
def test_tokens_are_those_of_generate(kind, sample):
    model = tiny_model(kind)
    model.generation_config.eos_token_id = None
    ids, mask = prompts()
    runs, passes = [], []
    for way in (nullcontext(), shared_prompts(model)):
        seen = []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda m, i, o, s=seen: s.append(i[0].shape)
        )
        config = GenerationConfig(do_sample=sample, max_new_tokens=9, top_k=20, pad_token_id=0)
        torch.manual_seed(11)
        with way:
            runs.append(model.generate(input_ids=ids, attention_mask=mask, generation_config=config))
        handle.remove()
        passes.append([tuple(s) for s in seen])
    assert "generate" not in vars(model)
    assert torch.equal(*runs)
    assert passes[0][0] == (12, 7)
    assert passes[1][:2] == [(4, 6), (12, 1)]


def test_the_distribution_of_two_tokens_is_the_model_s():
    model = tiny_model("untied", vocab_size=5)
    model.generation_config.eos_token_id = None
    prompt, n = torch.tensor([[3, 4, 1, 3]]), 20_000
    with torch.no_grad():
        first = model(input_ids=prompt).logits[0, -1].softmax(-1)
        longer = torch.cat([prompt.expand(5, -1), torch.arange(5)[:, None]], 1)
        expected = first[:, None] * model(input_ids=longer).logits[:, -1].softmax(-1)
    config = GenerationConfig(do_sample=True, max_new_tokens=2, top_k=0, pad_token_id=0)
    torch.manual_seed(0)
    ids = prompt.expand(n, -1)
    with shared_prompts(model):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    counts = torch.bincount(out[:, 4] * 5 + out[:, 5], minlength=25).view(5, 5)
    chi_square = ((counts - n * expected) ** 2 / (n * expected)).sum()
    assert chi_square < 51.2  # 24 degrees of freedom, one in a thousand


def test_nothing_is_shared_where_nothing_would_be_saved():
    model = tiny_model()
    ids, mask = prompts(k=1)
    assert prefill(model, ids, mask) is None
    ids, mask = prompts()
    assert prefill(model, ids[:, -1:], mask[:, -1:]) is None


def test_other_calls_are_left_alone():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    ids, mask = prompts()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    beams = GenerationConfig(num_beams=2, **settings)
    before = model.generate(ids, attention_mask=mask, **settings)
    before_beams = model.generate(input_ids=ids, attention_mask=mask, generation_config=beams)
    with shared_prompts(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings), before)
        after_beams = model.generate(input_ids=ids, attention_mask=mask, generation_config=beams)
    assert torch.equal(after_beams, before_beams)


@pytest.mark.slow
def test_the_trainer_s_rollouts_share_prompts():
    from gvpo.trl import GVPOTrainer
    from tests.trl.common import trainer

    run = trainer(GVPOTrainer, max_steps=1)
    widths = []
    handle = run.model.get_input_embeddings().register_forward_hook(
        lambda m, inputs, out: widths.append(tuple(inputs[0].shape))
    )
    run.train()
    handle.remove()
    # 8 prompts × 4 responses: the prompts once, then a token of each row at a time.
    assert widths[0][0] == 8
    assert widths[1] == (32, 1)


def test_modules_that_were_in_evaluation_mode_stay_in_it():
    model = tiny_model().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    ids = torch.tensor([[3, 4, 5]] * 2)
    assert prefill(model, ids, torch.ones_like(ids)) is not None
    assert [module.training for module in model.modules()] == before
