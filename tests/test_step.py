"""The step against literal autograd of the formula, whatever the micro-batches."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gvpo.batch import GroupBatch
from gvpo.model.vocabulary import VocabularyGradients
from gvpo.objective import gvpo_weights
from gvpo.step import Backend, GVPOStep
from tests.failures import OutOfMemory
from tests.models import (
    gradients,
    literal_gradient,
    literal_logps,
    literal_tokens,
    literal_trusted_loss,
    random_batch,
    relative_error,
    tiny_model,
)

BETA = 0.4


def double_gradient(model, batch, temperature=1.0):
    """The reference: literal autograd in float64."""
    twin = copy.deepcopy(model).double()
    return literal_gradient(twin, batch, BETA, temperature)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_any_token_budget_gives_the_gradient_of_the_formula(budget, reference):
    model, batch = tiny_model(), random_batch(reference=reference)
    expected, loss = double_gradient(model, batch)
    report = GVPOStep(model, beta=BETA, token_budget=budget)(batch)
    assert relative_error(gradients(model), expected) < 1e-5
    assert report.loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "untied", "bias", "qwen2", "softcap", "scaled"])
def test_every_kind_of_head(kind, fused):
    model, batch = tiny_model(kind), random_batch(reference=True)
    expected, _ = double_gradient(model, batch, temperature=0.7)
    step = GVPOStep(model, beta=BETA, temperature=0.7, token_budget=120)
    step.scorer.tile_bytes = 4 * 67 * 16  # several tiles
    if not fused:
        step.scorer.fused = False
    step(batch)
    assert step.scorer.fused is fused
    assert relative_error(gradients(model), expected) < 1e-5


def test_float64_models_stay_float64():
    model, batch = tiny_model().double(), random_batch(reference=True)
    expected, _ = literal_gradient(model, batch, BETA)
    GVPOStep(model, beta=BETA, token_budget=60)(batch)
    assert relative_error(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora_adapters_on_layers_and_on_the_head(targets):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("untied"), LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch(reference=True)
    expected, _ = double_gradient(model, batch)
    step = GVPOStep(model, beta=BETA, token_budget=100)
    step(batch)
    assert step.scorer.fused
    assert relative_error(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "untied", "softcap"])
def test_gradients_of_head_and_embedding_are_handed_over_once(kind):
    """With the padding token inside a row, a scaled loss, and whatever else reads the embedding."""
    model = tiny_model(kind)
    batch = random_batch(reference=True)
    batch.input_ids[:, 1] = batch.input_ids[3, 4] = model.config.pad_token_id
    expected, _ = double_gradient(model, batch)
    seen = []
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight

    class Scaling(Backend):
        def backward(self, loss, *, last):
            (loss * 8).backward()
            seen.append([p.grad is not None for p in (embedding, head)])

    GVPOStep(model, beta=BETA, token_budget=60, backend=Scaling())(batch)
    assert relative_error({n: g / 8 for n, g in gradients(model).items()}, expected) < 1e-5
    assert len(seen) > 2
    if kind != "softcap":  # Gemma's embedding, which scales itself, is left to autograd
        assert seen[-2] == [False, False]
    assert seen[-1] == [True, True]


def test_frequent_tokens_are_not_lost_in_half_precision():
    """In bfloat16 a sum of ones ends at 256."""
    sums, weight = VocabularyGradients(), torch.zeros(3, 2, dtype=torch.bfloat16)
    ids, ones = torch.tensor([1, 1]), torch.ones(2, 2, dtype=torch.bfloat16)
    for _ in range(499):
        assert sums.add_embedding(weight, ids, ones, last=False) is None
    total = sums.add_embedding(weight, ids, ones, last=True)
    assert total.dtype == torch.bfloat16
    assert total.tolist() == [[0, 0], [1000, 1000], [0, 0]]


@pytest.mark.parametrize("frozen", ["embed_tokens", "lm_head", "nothing, LoRA on a tied head"])
def test_partly_frozen_vocabularies(frozen):
    model = tiny_model("llama" if "tied" in frozen else "untied")
    if "tied" in frozen:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    else:
        model.get_submodule("model.embed_tokens" if frozen == "embed_tokens" else frozen).requires_grad_(
            False
        )
    batch = random_batch(reference=True)
    expected, _ = double_gradient(model, batch)
    GVPOStep(model, beta=BETA, token_budget=60)(batch)
    assert relative_error(gradients(model), expected) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    model, batch = tiny_model(), random_batch(reference=True)
    expected, _ = double_gradient(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    GVPOStep(model, beta=BETA, token_budget=100)(batch)
    assert relative_error(gradients(model), expected) < 1e-5


def test_bfloat16_autocast_stays_near_the_formula():
    model, batch = tiny_model("untied"), random_batch(reference=True)
    expected, _ = double_gradient(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        GVPOStep(model, beta=BETA, token_budget=100)(batch)
    assert relative_error(gradients(model), expected) < 0.1


def test_masked_rows_and_tool_tokens_stay_out():
    model, batch = tiny_model(), random_batch(reference=True)
    batch.valid = torch.arange(len(batch)) % 3 != 0
    batch.completion_mask[:, 12:15] = False  # say, output of a tool
    expected, _ = double_gradient(model, batch)
    GVPOStep(model, beta=BETA, token_budget=100)(batch)
    assert relative_error(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_a_trust_mask_drops_tokens_beyond_it_and_nothing_else(budget):
    """Against literal autograd of −Σ w log p over the tokens that the definition keeps, in float64."""
    model, batch = tiny_model(), random_batch(reference=True)  # tiny_model() seeds torch
    twin = copy.deepcopy(model).double()
    tokens = literal_tokens(twin, batch)
    rollout = [row.detach() + 0.3 * torch.randn(len(row)) for row in tokens]
    rollout[2].fill_(float("nan"))  # a row whose rollout is not known stays whole
    batch.rollout_logps = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    batch.rollout_logps[batch.completion_mask] = torch.cat(rollout)
    policy = literal_logps(twin, batch).detach()
    weights = gvpo_weights(policy, batch.reference_logps, batch.rewards, batch.group_ids, beta=BETA)
    total, kept, scored = literal_trusted_loss(tokens, rollout, weights, 0.2)
    total.backward()
    report = GVPOStep(model, beta=BETA, token_budget=budget, trust=0.2)(batch)
    assert relative_error(gradients(model), gradients(twin)) < 1e-5
    assert (report.scored_tokens, report.tokens_beyond_trust) == (kept, scored - kept)
    assert 0.2 < kept / scored < 0.8


def test_trust_never_masks_rows_of_the_policy_that_is_trained():
    model, batch = tiny_model(), random_batch()
    expected, _ = double_gradient(model, batch)
    step = GVPOStep(model, beta=BETA, trust=0.01, token_budget=100)
    step(batch)
    assert relative_error(gradients(model), expected) < 1e-5
    with pytest.raises(ValueError, match="trust needs the batch's rollout_logps"):
        step(random_batch(reference=True))


def test_rows_of_weight_zero_cost_nothing():
    model, batch = tiny_model(), random_batch(groups=6, k=4, equal_groups=4)
    report = GVPOStep(model, beta=BETA, token_budget=10_000)(batch)
    useful = batch.lengths[report.weights != 0].sum().item()
    assert int((report.weights != 0).sum()) == 8
    assert report.useful_tokens == useful
    assert report.policy_logps is None


def test_equal_rewards_everywhere_make_a_gradient_of_zero():
    model, batch = tiny_model(), random_batch(equal_groups=5)
    report = GVPOStep(model, beta=BETA)(batch)
    assert report.loss.item() == 0
    assert all(g.eq(0).all() for g in gradients(model).values())


def test_no_valid_group_makes_no_gradient():
    model, batch = tiny_model(), random_batch()
    batch.valid = torch.zeros(len(batch), dtype=torch.bool)
    report = GVPOStep(model, beta=BETA)(batch)
    assert report.metrics["groups"].item() == 0
    assert not gradients(model)


def test_sequence_logps_and_entropy():
    model, batch = tiny_model("bias"), random_batch(equal_groups=0)
    step = GVPOStep(model, beta=BETA, token_budget=90)
    torch.testing.assert_close(
        step.sequence_logps(batch), literal_logps(model, batch).detach().double(), rtol=1e-5, atol=1e-4
    )
    report = step(batch)
    total, count = 0.0, 0
    for i, length in enumerate(batch.lengths.tolist()):
        logps = model(input_ids=batch.input_ids[i : i + 1, :length]).logits[0, :-1].log_softmax(-1)
        chosen = batch.completion_mask[i, 1:length]
        total += -(logps.exp() * logps).sum(-1)[chosen].sum().item()
        count += int(chosen.sum())
    assert report.entropy == pytest.approx(total / count, rel=1e-5)


def test_a_completion_without_tokens_is_a_sequence_of_probability_one():
    model = tiny_model()
    batch = GroupBatch.from_tokens([[5, 6], [5, 6], [5]], [[7, 2], [], []], [1.0, 0.0, 0.5], [0, 0, 0])
    step = GVPOStep(model, beta=BETA)
    assert step.sequence_logps(batch)[1:].tolist() == [0, 0]
    expected, _ = double_gradient(model, batch)
    step(batch)
    assert relative_error(gradients(model), expected) < 1e-5


def test_a_vocabulary_of_one_token_has_nothing_to_learn():
    model = tiny_model(vocab_size=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    batch = GroupBatch.from_tokens([[0], [0, 0]], [[0, 0, 0], [0]], [1.0, 0.0], [0, 0])
    for batch.reference_logps in (None, torch.zeros(2, dtype=torch.float64)):
        model.zero_grad()
        report = GVPOStep(model, beta=BETA)(batch)
        assert report.loss.item() == pytest.approx(0.25)
        assert report.entropy == pytest.approx(0, abs=1e-6)
        assert all(g.isfinite().all() and g.abs().max() < 1e-6 for g in gradients(model).values())


def test_padding_on_any_side_is_removed():
    batch = random_batch()
    width = batch.input_ids.shape[1]
    rolled = GroupBatch.from_padded(
        *(
            torch.stack([row.roll(width - n) for row, n in zip(x, batch.lengths.tolist(), strict=True)])
            for x in (
                batch.input_ids,
                torch.arange(width) < batch.lengths[:, None],
                batch.completion_mask,
            )
        ),
        batch.rewards,
        batch.group_ids,
    )
    for name in ("input_ids", "lengths", "completion_mask"):
        assert torch.equal(getattr(rolled, name), getattr(batch, name))


def test_a_model_whose_head_cannot_be_fused_falls_back_and_says_so():
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = tiny_model("untied")
    head = Doubling(32, 67, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    batch = random_batch(reference=True)
    expected, _ = double_gradient(model, batch)
    step = GVPOStep(model, beta=BETA, token_budget=100)
    with pytest.warns(UserWarning, match="does not give this model's log-probabilities"):
        step(batch)
    assert relative_error(gradients(model), expected) < 1e-5


def test_a_copy_of_a_prepared_model_runs_its_own_weights():
    model, batch = tiny_model(), random_batch()
    step = GVPOStep(model, beta=BETA)
    before = step.sequence_logps(batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    twin_logps = GVPOStep(twin, beta=BETA).sequence_logps(batch)
    torch.testing.assert_close(twin_logps, literal_logps(twin, batch).detach().double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(step.sequence_logps(batch), before)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("fails_at", [[0], [2], [1, 1]])
def test_out_of_memory_makes_the_same_step_again(fails_at, reference):
    batch = random_batch(groups=8, reference=reference)
    plain = tiny_model()
    GVPOStep(plain, beta=BETA, token_budget=128)(batch)
    model = tiny_model()
    step = GVPOStep(model, beta=BETA, token_budget=128, backend=OutOfMemory(list(fails_at)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = step(batch)
    assert report.retries == len(fails_at)
    assert step.token_budget == 128 // 2 ** len(fails_at)
    assert relative_error(gradients(model), gradients(plain)) < 1e-6


def test_out_of_memory_with_gradients_of_others_is_not_hidden():
    model, batch = tiny_model(), random_batch()
    literal_gradient(model, batch, BETA)
    next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    step = GVPOStep(model, beta=BETA, token_budget=128, backend=OutOfMemory([0]))
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        step(batch)


def test_other_errors_pass_through():
    model, batch = tiny_model(), random_batch(reference=True)
    batch.reference_logps[3] = float("nan")
    with pytest.raises(ValueError, match="reference_logps is nan in row 3"):
        GVPOStep(model, beta=BETA)(batch)
    assert not gradients(model)


def test_a_model_that_is_not_finite_does_not_turn_the_fused_head_off():
    model, batch = tiny_model(), random_batch()
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    step = GVPOStep(model, beta=BETA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step.sequence_logps(batch).isnan().all()
    model.load_state_dict(good)
    assert step.scorer.fused
    torch.testing.assert_close(
        step.sequence_logps(batch), literal_logps(model, batch).detach().double(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["bias", "softcap", "scaled"])
def test_entropy_is_that_of_the_distribution_sampled_from(kind):
    model, batch = tiny_model(kind), random_batch(equal_groups=0)
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        logits = model(input_ids=batch.input_ids[i : i + 1, :length]).logits[0, :-1] / 0.7
        rows.append(
            torch.distributions.Categorical(logits=logits[batch.completion_mask[i, 1:length]]).entropy()
        )
    report = GVPOStep(model, beta=BETA, temperature=0.7, token_budget=90)(batch)
    assert report.entropy == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)


def test_a_trust_mask_spares_free_rows_and_drops_rows_that_are_wholly_beyond_it():
    """Free rows are as they were sampled, whatever is known of their rollout."""
    model, twin = tiny_model(), tiny_model().double()
    free, other = random_batch(groups=2, equal_groups=0).as_on_policy(), random_batch(seed=1, reference=True)
    other.group_ids = other.group_ids + 2
    for part in (free, other):
        part.rollout_logps = torch.zeros(part.input_ids.shape, dtype=torch.float64)
    batch = GroupBatch.concatenate([free, other])
    tokens = literal_tokens(twin, batch)
    rollout = [row.detach().clone() for row in tokens]
    sums = literal_logps(twin, batch).detach()
    reference = torch.where(batch.on_policy, sums, batch.reference_logps)
    weights = gvpo_weights(sums, reference, batch.rewards, batch.group_ids, beta=BETA)
    for i in range(len(batch)):
        if batch.on_policy[i] or i % 3 == 0:  # each token of these has moved far along the row's weight
            rollout[i] -= 2 * weights[i].sign()
    batch.rollout_logps[batch.completion_mask] = torch.cat(rollout)
    known = [
        r if i >= len(free) else t.detach() for i, (r, t) in enumerate(zip(rollout, tokens, strict=True))
    ]
    total, kept, scored = literal_trusted_loss(tokens, known, weights, 0.2)
    total.backward()
    report = GVPOStep(model, beta=BETA, token_budget=60, trust=0.2)(batch)
    assert relative_error(gradients(model), gradients(twin)) < 1e-5
    assert report.tokens_beyond_trust == scored - kept > 0
    left = [w != 0 and (i < len(free) or i % 3 != 0) for i, w in enumerate(weights.tolist())]
    assert (report.weights != 0).tolist() == left
    assert report.useful_tokens == sum(
        n for n, is_left in zip(batch.lengths.tolist(), left, strict=True) if is_left
    )


def test_a_float32_head_multiplies_in_float32():
    model, batch = tiny_model("untied").bfloat16(), random_batch()
    expected = []
    with torch.no_grad():
        for i, length in enumerate(batch.lengths.tolist()):
            hidden = model.base_model(input_ids=batch.input_ids[i : i + 1, : length - 1]).last_hidden_state[0]
            logps = (hidden.float() @ model.lm_head.weight.float().t()).log_softmax(-1)
            picked = logps.gather(1, batch.input_ids[i, 1:length, None])[:, 0]
            expected.append(picked[batch.completion_mask[i, 1:length]].sum().double())
    errors = {}
    for precise in (True, False):
        step = GVPOStep(model, token_budget=1, float32_head=precise)
        errors[precise] = (step.sequence_logps(batch) - torch.stack(expected)).abs().max().item()
    assert errors[True] < 1e-4 < 1e-2 < errors[False]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_equal_responses_are_run_once(reference, share_prompts):
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(3, 60, (3, 6), generator=generator).tolist()
    completions = [answers[i % 3] for i in range(16)]  # three answers of eight, with noisy rewards
    batch = GroupBatch.from_tokens(
        [[5, 6, 7]] * 8 + [[8, 9]] * 8,
        completions,
        torch.rand(16, generator=generator, dtype=torch.float64),
        [0] * 8 + [1] * 8,
    )
    batch.completion_mask[3, -2] = False  # equal tokens, another mask: another row
    if reference:
        batch.reference_logps = literal_logps(model, batch).detach() + torch.rand(16, generator=generator)
    expected, loss = double_gradient(model, batch)
    report = GVPOStep(model, beta=BETA, share_prompts=share_prompts)(batch)
    assert relative_error(gradients(model), expected) < 1e-5
    assert report.loss.item() == pytest.approx(loss, rel=1e-5)
    assert report.useful_tokens <= 4 * 9 + 3 * 8
    assert report.scored_tokens == int(batch.completion_mask.sum())
