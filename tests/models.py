"""Tiny causal language models and the literal formula on them."""

import math

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gvpo.batch import GroupBatch
from tests.test_objective import literal_loss

VOCAB = 67
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(kind: str = "llama", **changes: object) -> PreTrainedModel:
    """A randomly initialised model, the same at each call."""
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    match kind:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": True, **shape}))
        case "untied":
            return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **shape}))
        case "bias":
            model = LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **shape}))
            model.lm_head = torch.nn.Linear(32, VOCAB)
            return model
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**{"tie_word_embeddings": False, **shape}))
        case "softcap":
            return Gemma2ForCausalLM(
                Gemma2Config(**{"final_logit_softcapping": 5.0, "head_dim": 8, "sliding_window": 16, **shape})
            )
        case "scaled":
            return GraniteForCausalLM(GraniteConfig(**{"logits_scaling": 3.0, **shape}))
    raise ValueError(kind)


def random_batch(
    groups: int = 5,
    k: int = 4,
    seed: int = 0,
    *,
    reference: bool = False,
    equal_groups: int = 1,
    prompt: tuple[int, int] = (2, 9),
) -> GroupBatch:
    """Groups of ragged rows in random order; `equal_groups` of them have equal rewards.

    `prompt`: tokens of the prompts, from and below. From about 30 they are worth being shared.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    prompts = [shared for _ in range(groups) for shared in [tokens(*prompt)] * k]
    n = groups * k
    order = torch.randperm(n, generator=generator).tolist()
    rewards = torch.rand(n, generator=generator, dtype=torch.float64)
    rewards[: equal_groups * k] = 0.3
    ids = torch.arange(n) // k
    batch = GroupBatch.from_tokens(
        [prompts[i] for i in order], [tokens(1, 24) for _ in order], rewards[order], ids[order]
    )
    if reference:
        batch.reference_logps = torch.randn(n, generator=generator, dtype=torch.float64) * 3 - 60
    return batch


def literal_tokens(model: torch.nn.Module, batch: GroupBatch, temperature: float = 1.0) -> list[torch.Tensor]:
    """log p of each row's completion tokens, each row on its own, from the model's own logits."""
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[i : i + 1, :length]
        logps = (model(input_ids=ids).logits[0, :-1] / temperature).log_softmax(-1)
        picked = logps.gather(1, ids[0, 1:, None])[:, 0]
        rows.append(picked[batch.completion_mask[i, 1:length]])
    return rows


def literal_logps(model: torch.nn.Module, batch: GroupBatch, temperature: float = 1.0) -> torch.Tensor:
    """S of each row."""
    return torch.stack([row.sum() for row in literal_tokens(model, batch, temperature)])


def literal_trusted_loss(
    policy: list[torch.Tensor], rollout: list[torch.Tensor], weights: torch.Tensor, trust: float
) -> tuple[torch.Tensor, int, int]:
    """−Σ w log p over the tokens that have not moved beyond `trust`; how many those are, and of how many."""
    loss, kept, scored = torch.zeros((), dtype=weights.dtype), 0, 0
    for weight, now, before in zip(weights.tolist(), policy, rollout, strict=True):
        for logp, old in zip(now, before.tolist(), strict=True):
            ratio = math.exp(logp.item() - old)
            far = (weight > 0 and ratio > 1 + trust) or (weight < 0 and ratio < 1 - trust)
            loss = loss if far else loss - weight * logp
            kept += weight != 0 and not far
            scored += weight != 0
    return loss, kept, scored


def literal_gradient(
    model: torch.nn.Module, batch: GroupBatch, beta: float, temperature: float = 1.0
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and value of the formula by autograd, in the model's dtype."""
    model.zero_grad()
    policy = literal_logps(model, batch, temperature)
    reference = policy.detach() if batch.reference_logps is None else batch.reference_logps
    mask = torch.ones_like(batch.lengths, dtype=torch.bool) if batch.valid is None else batch.valid
    loss = literal_loss(policy, reference, batch.rewards.to(policy), batch.group_ids, beta, mask)
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradient, loss.item()


def relative_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """‖got − want‖ / ‖want‖ over all parameters together."""
    assert got.keys() == want.keys()
    difference = sum((got[n].double() - want[n].double()).pow(2).sum() for n in want)
    return float((difference / sum(w.double().pow(2).sum() for w in want.values())) ** 0.5)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
