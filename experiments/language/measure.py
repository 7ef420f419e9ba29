"""What a policy has learnt and kept: reward, KL to the start, entropy and different right answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from experiments.language.tasks import Task, canonical
from gvpo.evaluate.statistics import pass_at_k
from gvpo.model.generation import shared_prompts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SAMPLES = 64  # of each held-out prompt
_EVERY = 4  # sample of a line is scored: KL and entropy vary less than rewards
_SAMPLED, _SCORED = 768, 128  # rows at once: few launches, and yet a tenth of a large device


@dataclass
class Samples:
    """Completions of one prompt after another, `each` of each.

    Attributes:
        ids: prompt and completion, both padded to one length.
        mask: of the prompt's and the completion's tokens.
        width: of the completions.
    """

    ids: Int[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows tokens"]
    width: int
    texts: list[str]

    def every(self, step: int) -> Samples:
        return Samples(self.ids[::step], self.mask[::step], self.width, self.texts[::step])


def sample_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    keys: Sequence[str],
    each: int,
    temperature: float = 1.0,
) -> Iterator[Samples]:
    """`each` answers to the question of every key, a few questions at once."""
    many = max(_SAMPLED // each, 1)
    for first in range(0, len(keys), many):
        prompts = [task.prompt(tokenizer, key) for key in keys[first : first + many]]
        yield sample(model, tokenizer, prompts, each, task.tokens, temperature)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    each: int,
    tokens: int,
    temperature: float = 1.0,
) -> Samples:
    """`each` completions of every prompt, from the global random state."""
    end = tokenizer.eos_token_id
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(
        model.device
    )
    with shared_prompts(model):
        out = model.generate(
            input_ids=encoded["input_ids"].repeat_interleave(each, 0),
            attention_mask=encoded["attention_mask"].repeat_interleave(each, 0),
            generation_config=GenerationConfig(
                max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, temperature=temperature,
                eos_token_id=end, pad_token_id=tokenizer.pad_token_id, disable_compile=True,
            ),
        )  # fmt: skip
    width = out.shape[1] - encoded["input_ids"].shape[1]
    completions = out[:, -width:]
    ended = completions == end
    there = (ended.cumsum(1) - ended.long()) == 0  # up to and with the end
    prompt_mask = encoded["attention_mask"].bool().repeat_interleave(each, 0)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Samples(out, torch.cat([prompt_mask, there], 1), width, texts)


def _token_logps(model: PreTrainedModel, part: Samples) -> Float[Tensor, "rows tokens vocabulary"]:
    positions = (part.mask.long().cumsum(1) - 1).clamp(min=0)
    states = model.base_model(
        input_ids=part.ids, attention_mask=part.mask.long(), position_ids=positions, use_cache=False
    ).last_hidden_state[:, -part.width - 1 : -1]
    return model.get_output_embeddings()(states).float().log_softmax(-1)


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, samples: Samples, temperature: float
) -> Float[Tensor, "rows tokens"]:
    """Of the completions' tokens, in nats, as they were sampled."""
    logits = _token_logps(model, samples) / temperature
    ids = samples.ids[:, -samples.width :, None]
    return logits.log_softmax(-1).gather(-1, ids)[..., 0]


@torch.no_grad()
def divergence(
    policy: PreTrainedModel, start: PreTrainedModel, samples: Samples
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """KL(π‖start) and entropy of sequences, nats: over the whole vocabulary at each sampled token, summed."""
    kl, entropy = [], []
    for first in range(0, len(samples.ids), _SCORED):
        rows = slice(first, first + _SCORED)
        part = Samples(samples.ids[rows], samples.mask[rows], samples.width, [])
        p, q = _token_logps(policy, part), _token_logps(start, part)
        there, weights = part.mask[:, -part.width :], p.exp()
        entropy.append((-(weights * p).sum(-1) * there).sum(1))
        kl.append((weights.mul_(p.sub_(q)).sum(-1) * there).sum(1))
    return torch.cat(kl), torch.cat(entropy)


def evaluate(
    policy: PreTrainedModel,
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    each: int = SAMPLES,
) -> dict[str, float]:
    """On held-out prompts, means over them.

    Returns:
        reward; kl (to the start) and entropy, nats a sequence; distinct, different right answers among
        `each`; pass@8, pass@64 (as far as `each` goes); length in tokens.
    """
    training = policy.training
    policy.eval()
    keys = task.keys[: task.held_out]
    texts: list[str] = []
    kl: list[Tensor] = []
    entropy: list[Tensor] = []
    lengths: list[Tensor] = []
    for samples in sample_all(policy, tokenizer, task, keys, each):
        texts += samples.texts
        scored = samples.every(_EVERY) if task.line else samples
        for into, found in zip((kl, entropy), divergence(policy, start, scored), strict=True):
            into.append(found)
        lengths.append(samples.mask[:, -samples.width :].sum(1).float())
    policy.train(training)
    right = [right_answers(task, key, texts[i * each : (i + 1) * each]) for i, key in enumerate(keys)]
    passed = {
        f"pass@{k}": sum(pass_at_k(each, len(answers), k) for answers in right) / len(right)
        for k in (8, 64)
        if k <= each
    }
    return {
        "reward": sum(map(len, right)) / len(texts),
        "kl": float(torch.cat(kl).mean()),
        "entropy": float(torch.cat(entropy).mean()),
        "distinct": sum(len(set(answers)) for answers in right) / len(right),
        **passed,
        "length": float(torch.cat(lengths).mean()),
    }


def right_answers(task: Task, key: str, texts: Sequence[str]) -> list[str]:
    """The right ones, so written that equal answers are equal."""
    return [canonical(text) for text in texts if task.right(text, key)]
