"""Shared prompts against literal autograd of the formula, whatever the model, the cut and the switches."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gvpo.batch import Beginnings, GroupBatch
from gvpo.model.sharing_check import obstacle
from gvpo.step import GVPOStep, SequenceScorer
from tests.failures import OutOfMemory
from tests.models import (
    SHAPE,
    gradients,
    literal_gradient,
    literal_logps,
    random_batch,
    relative_error,
    tiny_model,
)

BETA = 0.4


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """As under a large model: calls cost nothing against work."""
    monkeypatch.setattr("gvpo.scoring.prompt_cost", lambda model: 0.0)


LONG = (30, 50)


def model_of(kind, **changes):
    torch.manual_seed(0)
    shape = {**SHAPE, "head_dim": 8, **changes}
    match kind:
        case "gemma3":  # a window of 16 tokens in all layers but the last, which sees everything
            layers = ["sliding_attention", "full_attention"]
            return Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=16, layer_types=layers, **shape))
        case "mistral":
            return MistralForCausalLM(MistralConfig(sliding_window=16, **shape))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, **shape))
        case "gpt-oss":  # attention sinks, experts, a window
            sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 16}
            config = GptOssConfig(**sizes, **shape, attn_implementation="eager")
            config._experts_implementation = "eager"  # the others have no float64
            return GptOssForCausalLM(config)
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 67}
            return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
        case "eager":
            model = tiny_model("llama")
            model.set_attn_implementation("eager")
            return model
    return tiny_model(kind, **changes)


def step_of(model, budget=300, **others):
    return GVPOStep(model, beta=BETA, token_budget=budget, **others)


def error_of(model, batch, step, temperature=1.0):
    """Relative error of the step's gradient; no warning, and prompts were shared."""
    expected, loss = literal_gradient(copy.deepcopy(model).double(), batch, BETA, temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = step(batch)
    assert report.shared_prompts
    assert report.loss.item() == pytest.approx(loss, rel=1e-5)
    return relative_error(gradients(model), expected)


@pytest.mark.parametrize("way", ["merged", "copied"])
@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "untied",
        "bias",
        "scaled",
        "softcap",
        "gemma3",
        "mistral",
        "qwen3",
        "gpt-oss",
        "gpt2",
        "eager",
    ],
)
def test_every_kind_of_model(kind, way):
    """Grouped queries, tied heads, windows, soft caps, sinks, learnt positions."""
    model, batch = model_of(kind), random_batch(reference=True, prompt=LONG)
    step = step_of(model, temperature=0.7)
    step.sequence_logps(batch)  # decides
    assert step._way == "merged"  # what this model allows
    step._way = way
    assert error_of(model, batch, step, temperature=0.7) < 1e-5


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_any_token_budget_gives_the_gradient_of_the_formula(budget, reference):
    model, batch = tiny_model(), random_batch(groups=4, k=6, reference=reference, prompt=LONG, equal_groups=1)
    expected, _ = literal_gradient(copy.deepcopy(model).double(), batch, BETA)
    report = step_of(model, budget)(batch)
    assert report.shared_prompts >= 3
    assert relative_error(gradients(model), expected) < 1e-5


def _lora(model):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def _checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _checkpointed_lora(model):
    model.enable_input_require_grads()
    return _checkpointed(_lora(model))


def _upper_half(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    return model


@pytest.mark.parametrize("way", ["merged", "copied"])
@pytest.mark.parametrize(
    "change", [_lora, _checkpointed, _checkpointed_lora, _upper_half, torch.nn.Module.double]
)
def test_what_is_done_to_models(change, way):
    model, batch = change(tiny_model("untied")), random_batch(reference=True, prompt=LONG)
    step = step_of(model)
    step.sequence_logps(batch)
    step._way = way
    assert error_of(model, batch, step) < (
        1e-7 if change is torch.nn.Module.double else 1e-5
    )  # RMSNorm is float32


@pytest.mark.parametrize("way", ["merged", "copied"])
def test_bfloat16_is_no_further_from_the_formula_than_whole_rows(way):
    batch, errors = random_batch(reference=True, prompt=LONG), {}
    for mode in (way, "whole"):
        model = tiny_model("untied")
        expected, _ = literal_gradient(copy.deepcopy(model).double(), batch, BETA)
        step = step_of(model)
        step._way = mode
        with torch.autocast("cpu", torch.bfloat16):
            step(batch)
        errors[mode] = relative_error(gradients(model), expected)
    assert errors[way] < 0.05
    assert errors[way] < 1.5 * errors["whole"]


def test_rows_and_tokens_that_stay_out():
    """Invalid rows, tool output, groups of equal rewards, empty completions, a prompt of one token."""
    model, batch = tiny_model(), random_batch(groups=6, reference=True, prompt=LONG, equal_groups=2)
    batch.valid = torch.arange(len(batch)) % 5 != 0
    batch.completion_mask[:, 52:55] = False
    batch.completion_mask[3] = False
    batch.completion_mask[7, :] = torch.arange(batch.input_ids.shape[1]) == 1
    assert error_of(model, batch, step_of(model)) < 1e-5


@pytest.mark.parametrize("free", [False, True])
def test_trust_and_free_rows_change_nothing_of_it(free):
    models = [tiny_model(), tiny_model()]
    batch = random_batch(reference=True, prompt=LONG)
    noise = 0.3 * torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(1))
    batch.rollout_logps = SequenceScorer(models[0]).token_logps(batch) + noise
    batch.on_policy = batch.group_ids < 2 if free else None
    reports = [
        step_of(model, share_prompts=share, trust=0.2)(batch)
        for model, share in zip(models, (True, False), strict=True)
    ]
    assert [bool(r.shared_prompts) for r in reports] == [True, False]
    assert reports[0].tokens_beyond_trust == reports[1].tokens_beyond_trust > 0
    assert reports[0].entropy == pytest.approx(reports[1].entropy, rel=1e-5)
    assert relative_error(*map(gradients, models)) < 1e-5


def test_prompts_are_found_from_tokens_not_from_groups():
    """A group with two prompts, and two groups with one."""
    model, batch = tiny_model(), random_batch(groups=3, k=6, reference=True, prompt=LONG, equal_groups=0)
    batch.group_ids = torch.arange(len(batch)) % 2
    found = Beginnings.of(batch)
    assert len(found.rows) == 3
    for row, (start, beginning) in enumerate(zip(found.starts, found.of_row, strict=True)):
        assert batch.completion_mask[row, start : start + 2].tolist() == [False, True]
        assert torch.equal(batch.input_ids[row, :start], batch.input_ids[found.rows[beginning], :start])
    assert error_of(model, batch, step_of(model)) < 1e-5


def test_each_prompt_is_read_once_a_pass_however_its_rows_are_cut():
    model, batch = tiny_model(), random_batch(reference=True, prompt=LONG, equal_groups=0)
    step, seen = step_of(model, 120), []
    step._decide(batch)
    model.get_input_embeddings().register_forward_hook(lambda _, ids, rows: seen.append(ids[0]))
    report = step(batch)
    found = Beginnings.of(batch)
    first = [batch.input_ids[row, :8].tolist() for row in found.rows]
    read = [row[:8].tolist() for ids in seen for row in ids]
    assert [read.count(tokens) for tokens in first] == [2] * len(first)  # to score, and to learn
    assert report.micro_batches > 3
    assert report.shared_prompts == len(first) == 5


def test_sequence_logps_of_two_models_share_prompts_too():
    model, batch = tiny_model("bias"), random_batch(prompt=LONG)
    scorer = SequenceScorer(model, token_budget=90)
    expected = literal_logps(model, batch).detach().double()
    torch.testing.assert_close(scorer.sequence_logps(batch), expected, rtol=1e-5, atol=1e-4)
    assert scorer._way == "merged"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fails_at", [[0], [2], [1, 1]])
def test_out_of_memory_makes_the_same_step_again(fails_at):
    batch = random_batch(groups=8, reference=True, prompt=LONG)
    plain, model = tiny_model(), tiny_model()
    step_of(plain, 400)(batch)
    step = step_of(model, 400, backend=OutOfMemory(list(fails_at)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = step(batch)
    assert report.retries == len(fails_at)
    assert report.shared_prompts
    assert model.config._attn_implementation == "sdpa"
    assert relative_error(gradients(model), gradients(plain)) < 1e-6


def test_parameters_after_five_steps_do_not_depend_on_the_budget_or_on_sharing():
    batches = [random_batch(seed=seed, reference=True, prompt=LONG) for seed in range(5)]
    ends = []
    for budget, share in ((10_000, True), (300, True), (150, True), (150, False)):
        model = tiny_model().double()
        step = step_of(model, budget, share_prompts=share)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in batches:
            optimizer.zero_grad()
            assert bool(step(batch).shared_prompts) == share
            optimizer.step()
        ends.append(dict(model.state_dict()))
    for end in ends[1:]:
        assert relative_error(end, ends[0]) < 1e-7


def _hybrid(_):
    config = Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    return Lfm2ForCausalLM(config)


def _recurrent(model):
    model._is_stateful = True
    return model


def _dynamic(_):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return tiny_model(rope_parameters=rope)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_hybrid, "Lfm2ForCausalLM has layers whose state is not keys and values"),
        (_recurrent, "LlamaForCausalLM has layers whose state"),
        (_dynamic, "rotary embedding"),
    ],
)
def test_where_prompts_cannot_be_shared_rows_are_whole_and_it_says_so_once(change, why):
    torch.manual_seed(0)
    model, batch = change(tiny_model()), random_batch(reference=True, prompt=LONG)
    step = step_of(model)
    with pytest.warns(UserWarning, match=f"Prompts are not shared.*{why}") as caught:
        step(batch)
    assert step(batch).shared_prompts == 0
    assert len([w for w in caught if "not shared" in str(w.message)]) == 1
    model.zero_grad()
    expected, _ = literal_gradient(copy.deepcopy(model).double(), batch, BETA)
    step(batch)
    assert relative_error(gradients(model), expected) < 1e-5


def test_kinds_of_attention_and_checkpointing_that_are_refused_by_name():
    model = tiny_model()
    assert obstacle(model) is None
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert "reentrant" in obstacle(model)
    model.config._attn_implementation = "flex_attention"
    assert "attn_implementation='flex_attention' is not one of" in obstacle(model)


def test_a_model_that_attends_otherwise_is_found_out():
    """Attention that looks at the first token that is run."""
    model, batch = tiny_model(), random_batch(reference=True, prompt=LONG)
    attention = model.model.layers[0].self_attn
    before = attention.forward
    attention.forward = lambda hidden_states, **kwargs: before(hidden_states - hidden_states[:, :1], **kwargs)
    with pytest.warns(UserWarning, match="Prompts are not shared.*log-probabilities differ"):
        assert step_of(model)(batch).shared_prompts == 0


def test_no_prompts_to_share_is_no_reason_to():
    model = tiny_model()
    batch = GroupBatch.from_tokens([[5], [5], [6]], [[7, 2], [8], [9, 4]], [1.0, 0.0, 0.5], [0, 0, 0])
    assert step_of(model)(batch).shared_prompts == 0
