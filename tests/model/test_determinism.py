"""Noise of training is off in scoring and updating, and what is random anyway is refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from gvpo.errors import InputError
from gvpo.model.determinism import without_noise
from gvpo.step import GVPOStep
from tests.models import SHAPE, VOCAB, gradients, literal_gradient, random_batch, relative_error, tiny_model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def noisy_opt():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    noise = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}
    config = OPTConfig(**sizes, **noise, num_hidden_layers=2, num_attention_heads=4, init_std=0.2)
    return OPTForCausalLM(config).train()


@pytest.mark.filterwarnings("ignore:Prompts are not shared, .* is reentrant")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_noise_is_off_with_and_without_gradient_checkpointing(reentrant):
    """Layers that checkpoint stay in train mode: their own dropout and layerdrop are zeroed instead."""
    model, batch = noisy_opt(), random_batch(groups=2, reference=True)
    expected, _ = literal_gradient(copy.deepcopy(model).double().eval(), batch, 0.4)
    calls = 0
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        layer = model.model.decoder.layers[0]
        checkpoint = layer._gradient_checkpointing_func

        def counting(*args, **kwargs):
            nonlocal calls
            calls += 1
            return checkpoint(*args, **kwargs)

        layer._gradient_checkpointing_func = counting
    before = modes(model)
    GVPOStep(model, beta=0.4, token_budget=90)(batch)
    assert relative_error(gradients(model), expected) < 1e-5
    assert bool(calls) == (reentrant is not None)
    assert modes(model) == before
    assert (model.config.layerdrop, model.model.decoder.layers[0].dropout) == (0.5, 0.3)


def test_modes_and_settings_come_back_after_a_failure():
    model = noisy_opt()
    settings = model.model.decoder.layers[0].config = {"jitter": 0.2}  # as models of others keep them
    model.gradient_checkpointing_enable()
    model.model.decoder.layers[1].eval()  # a user's own choice
    before = modes(model)

    def interrupted():
        with without_noise(model):
            assert not any(isinstance(m, nn.Dropout) and m.training for m in model.modules())
            assert model.config.dropout == model.config.layerdrop == 0
            assert model.model.decoder.layers[0].dropout == settings["jitter"] == 0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert modes(model) == before
    assert (model.config.dropout, model.model.decoder.layers[0].dropout) == (0.3, 0.3)
    assert settings == {"jitter": 0.2}


class AlwaysNoisy(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.dropout(self.inner(x), 0.1)  # and not: training=self.training


class Plain(nn.Module):
    """Not a transformers model: only `.logits`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.filterwarnings("error:The fused head")
@pytest.mark.parametrize("wrap", [lambda m: m, Plain])
@pytest.mark.parametrize("mode", [True, False])
def test_what_is_random_in_evaluation_mode_too_is_refused_by_name(wrap, mode):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = AlwaysNoisy(model.model.layers[1].mlp.up_proj)
    model = wrap(model).train(mode)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj \(AlwaysNoisy\) is random"):
        GVPOStep(model)(random_batch())
    assert not gradients(model)


class Looking(LlamaForCausalLM):
    """Each token's logits know of all tokens of the row."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.logits.mean(1, keepdim=True)
        return out


@pytest.mark.filterwarnings("error:The fused head")
def test_models_that_see_later_tokens_are_refused():
    model = Looking(LlamaConfig(**SHAPE))
    with pytest.raises(InputError, match="depend on what pads a row on the right"):
        GVPOStep(model)(random_batch())
