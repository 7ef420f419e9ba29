"""What is asked of the fused head before it is used: the model's own log-probs, now and later."""

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from gvpo.batch import GroupBatch
from gvpo.model.fused_head import LogitTransform
from gvpo.model.head import is_linear, probed
from gvpo.step import GVPOStep
from tests.models import (
    SHAPE,
    VOCAB,
    gradients,
    literal_gradient,
    literal_logps,
    random_batch,
    relative_error,
    tiny_model,
)

BETA = 0.4


def adapted(**changes):
    """A LoRA on layers and head, at the identity as PEFT makes it."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, **{"target_modules": ["q_proj", "lm_head"], **changes})
    return get_peft_model(tiny_model("untied"), config).double().train()


def assert_exact_for_some_steps(model, fused, steps=3):
    """Also after updates, when adapters are no longer the identity; `fused` is the way it must go."""
    batch = random_batch(groups=2, reference=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    step = GVPOStep(model, beta=BETA, token_budget=90)
    for _ in range(steps):
        expected, _ = literal_gradient(copy.deepcopy(model).eval(), batch, BETA)
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("error" if fused else "ignore", message="The fused head does not")
            step(batch)
        assert relative_error(gradients(model), expected) < 1e-10
        assert step.scorer.fused is fused
        optimizer.step()


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({"lora_dropout": 0.5}, True),
        ({"use_rslora": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, True),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else str(value),
)
def test_adapters_on_the_head_stay_exact_after_updates(changes, fused):
    assert_exact_for_some_steps(adapted(**changes), fused)


def test_other_kinds_of_adapters_and_merged_ones_are_no_linear_heads():
    model = get_peft_model(
        tiny_model("untied"), IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    )
    assert not is_linear(model.get_base_model().lm_head)
    model = adapted()
    head = model.get_base_model().lm_head
    assert is_linear(head)
    head.merge()
    assert not is_linear(head)


def test_an_adapter_put_on_the_head_after_the_check_is_seen():
    model = adapted(target_modules=["q_proj"])
    batch = random_batch(groups=2, reference=True)
    step = GVPOStep(model, beta=BETA)
    step(batch)
    model.add_adapter("dora", LoraConfig(r=4, use_dora=True, target_modules=["lm_head"]))
    model.set_adapter("dora")
    for name, parameter in model.named_parameters():
        if "lora_B.dora" in name:
            nn.init.normal_(parameter, std=0.2)
    expected, _ = literal_gradient(copy.deepcopy(model).double().eval(), batch, BETA)
    model.zero_grad()
    step(batch)
    assert relative_error(gradients(model), {n: expected[n] for n in gradients(model)}) < 1e-5


class WithoutVirtualTokens(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        out = self.model(input_ids=input_ids)
        out.logits = out.logits[:, -input_ids.shape[1] :]
        return out


def test_prompt_tuning_goes_through_the_model_s_own_logits():
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config).double()
    batch = random_batch(groups=2, reference=True)
    expected, _ = literal_gradient(WithoutVirtualTokens(copy.deepcopy(model).eval()), batch, BETA)
    with pytest.warns(UserWarning, match="The fused head does not"):
        GVPOStep(model, beta=BETA, token_budget=90)(batch)
    got = {f"model.{name}": gradient for name, gradient in gradients(model).items()}
    assert relative_error(got, expected) < 1e-12


@pytest.mark.filterwarnings("ignore:Prompts are not shared")  # RecurrentGemma has a state
def test_rows_without_chosen_tokens_do_not_blind_the_check():
    """RecurrentGemma's cap, which was once not known, with the two shortest rows truncated away."""
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            **{**SHAPE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16, logits_soft_cap=5.0
        )
    )
    batch = random_batch(groups=2, reference=True)
    for row in batch.lengths.argsort()[:2]:
        batch.completion_mask[row] = False
    step = GVPOStep(model, beta=BETA)
    report = step(batch)
    torch.testing.assert_close(
        report.policy_logps.float(), literal_logps(model.eval(), batch).float(), rtol=1e-4, atol=1e-4
    )
    assert step.scorer.fused


class Capped(LlamaForCausalLM):
    """A cap that no configuration tells of, far above the logits of an untrained model."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 30) * 30
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_nothing_tells_of_is_seen_while_logits_are_small(dtype):
    model = Capped(LlamaConfig(**{**SHAPE, "initializer_range": 0.02})).to(dtype)
    with pytest.warns(UserWarning, match="The fused head does not give .* differ by up to"):
        GVPOStep(model)(random_batch())


class Forbidding(LlamaForCausalLM):
    """Some tokens are never given out, as multimodal models do with the tokens of images."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.index_fill(-1, torch.tensor([7]), -torch.inf)
        return out


def test_forbidden_tokens_are_seen():
    with pytest.warns(UserWarning, match="The fused head does not give .* differ by up to inf"):
        GVPOStep(Forbidding(LlamaConfig(**SHAPE)))(
            GroupBatch.from_tokens([[3]] * 2, [[4], [5]], [1, 0], [0, 0])
        )


@pytest.mark.parametrize("name", ["final_logits_cap", "lm_head_scale", "output_logits_multiplier"])
def test_a_cap_or_scale_of_an_unknown_name_goes_through_the_model_s_own_logits(name):
    model = tiny_model()
    setattr(model.config, name, 2.5)
    with pytest.warns(UserWarning, match=f"does not know the configuration's {name}=2.5"):
        GVPOStep(model)(random_batch())


def test_settings_of_attention_and_routers_are_none_of_the_head():
    model = tiny_model("softcap")
    model.config.router_logit_scale = 3.0
    assert model.config.attn_logit_softcapping
    assert LogitTransform.unknown(model.config) is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_compared_in_float32_and_left_as_it_was(tied):
    model = tiny_model(tie_word_embeddings=tied).bfloat16()
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    with probed(model.lm_head, precise=True) as linear:
        logits = model(input_ids=torch.arange(3, 20)[None]).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, linear[0])
        largest = logits.abs().amax((1, 2)).tolist()
    assert largest[1:] == [pytest.approx(8, rel=0.01), pytest.approx(64, rel=0.01)]
    for name, parameter in model.named_parameters():
        held, pointer, value = before[name]
        assert held is parameter
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)


def test_a_model_of_few_positions_is_checked_with_as_many_tokens():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=20, n_embd=32, n_layer=1, n_head=2))
    batch = GroupBatch.from_tokens([[3, 4]] * 2, [[5], [6, 7]], [1.0, 0.0], [0, 0])
    step = GVPOStep(model)
    step(batch)
    assert step.scorer.fused


def test_weights_that_are_not_finite_are_left_to_the_step_to_report():
    model = tiny_model()
    model.model.norm.weight.data[0] = torch.nan
    batch = GroupBatch.from_tokens([[3, 4]] * 2, [[5], [6]], [1.0, 0.0], [0, 0])
    step = GVPOStep(model)
    step(batch)
    assert step.scorer.fused


def test_a_layer_with_a_forward_of_its_own_is_no_linear_head():
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    assert is_linear(nn.Linear(2, 3))
    assert not is_linear(Doubling(2, 3))
