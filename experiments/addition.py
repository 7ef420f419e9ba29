"""Two-digit addition by the quickstart's small Llama, for what only a language model shows.

A policy and *another model* are warmed up on teachers who forget to carry, with different seeds and different
forgetfulness. Every prompt has one right answer, so that expected accuracy is exact: its probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.trainer_utils import set_seed

from experiments.losses import Loss
from experiments.responses import Responses
from gvpo.errors import InputError
from gvpo.sums import TASKS, make_model, make_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

PROMPTS, K = 16, 8  # of a step
LENGTH = 4  # three digits and the end
_TASK, _TOKENIZER = TASKS["addition"], make_tokenizer()
_TRAIN, _HELD_OUT = _TASK.pairs(0)
_END, _PAD = _TOKENIZER.eos_token_id, _TOKENIZER.pad_token_id


def _encode(texts: Sequence[str]) -> Int[Tensor, "rows tokens"]:
    return torch.tensor(_TOKENIZER(list(texts))["input_ids"])


_TRAIN_PROMPTS = _encode([_TASK.prompt(*p) for p in _TRAIN])
_TRAIN_ANSWERS = _encode([_TASK.right(*p) + "<eos>" for p in _TRAIN])
_TEST_PROMPTS = _encode([_TASK.prompt(*p) for p in _HELD_OUT[:500]])
_TEST_ANSWERS = _encode([_TASK.right(*p) + "<eos>" for p in _HELD_OUT[:500]])
_FORGETFUL_ANSWERS = _encode([_TASK.sloppy(*p) + "<eos>" for p in _TRAIN])


def warmed_up(seed: int, forgetful: float, steps: int) -> LlamaForCausalLM:
    """A Llama of 0.13 M parameters that has seen answers of which a share `forgetful` lacks the carries."""
    set_seed(seed)
    model = make_model(_TOKENIZER)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.05 + 0.95 * cosine)
        rows = torch.randint(len(_TRAIN_PROMPTS), (64,), generator=generator)
        forgets = torch.rand(len(rows), generator=generator) < forgetful
        answers = torch.where(forgets[:, None], _FORGETFUL_ANSWERS[rows], _TRAIN_ANSWERS[rows])
        loss = -token_logps(model, _TRAIN_PROMPTS[rows], answers, 1).sum(1).mean()
        _update(model, optimizer, loss)
    return model


def prepare(directory: Path, *, quick: bool) -> None:
    """Write the policy and the other model to begin with, unless an earlier run of this size did."""
    path, steps = directory / "models.pt", 150 if quick else 500
    if path.exists() and torch.load(path)["steps"] == steps:
        return
    policy, other = warmed_up(0, 0.62, steps), warmed_up(7, 0.75, steps)
    torch.save({"policy": policy.state_dict(), "other": other.state_dict(), "steps": steps}, path)


def load(directory: Path, which: str) -> LlamaForCausalLM:
    """The "policy" or the "other" model that `prepare` wrote.

    Raises:
        InputError: they are not there.
    """
    if not (path := directory / "models.pt").exists():
        raise InputError(f"{path} is missing: the models that the runs in {directory} started from.")
    model = make_model(_TOKENIZER)
    model.load_state_dict(torch.load(path)[which])
    return model


def token_logps(
    model: LlamaForCausalLM, prompts: Tensor, completions: Tensor, k: int
) -> Float[Tensor, "rows tokens"]:
    """Log-probabilities of k completions to each prompt, nats; 0 behind the end. Prompts are run once."""
    first = model(prompts, past_key_values=DynamicCache(config=model.config), use_cache=True)
    cache = first.past_key_values
    if k > 1:
        cache.batch_repeat_interleave(k)
    later = model(completions[:, :-1], past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first.logits[:, -1:].repeat_interleave(k, 0), later], 1)
    logps = logits.log_softmax(-1).gather(2, completions[:, :, None])[:, :, 0]
    return logps * not_ended(completions)


def first_values(model: LlamaForCausalLM, prompts: Tensor) -> Float[Tensor, "prompts"]:
    """Log-sum-exp of the logits of a completion's first token."""
    return model(prompts).logits[:, -1].logsumexp(1)


def not_ended(completions: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "rows tokens"]:
    """True up to and with the end token."""
    ended = completions == _END
    return (ended.cumsum(1) - ended.long()) == 0


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, prompts: Tensor, k: int, generator: torch.Generator, *, greedy: bool = False
) -> Int[Tensor, "rows tokens"]:
    """k completions to each prompt, at temperature 1 or greedy."""
    out = model(prompts, past_key_values=DynamicCache(config=model.config), use_cache=True)
    logits, cache = out.logits[:, -1].repeat_interleave(k, 0), out.past_key_values
    if k > 1:
        cache.batch_repeat_interleave(k)
    tokens: list[Tensor] = []
    ended = torch.zeros(len(logits), dtype=torch.bool)
    for _ in range(LENGTH):
        if tokens:
            logits = model(tokens[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        drawn = (
            logits.argmax(1) if greedy else torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        )
        tokens.append(torch.where(ended, _PAD, drawn))
        ended = ended | (tokens[-1] == _END)
    return torch.stack(tokens, 1)


@dataclass
class Rollout:
    """Groups of completions with their rewards (1 for the right answer), and what is known about them."""

    prompts: Int[Tensor, "prompts tokens"]
    answers: Int[Tensor, "prompts tokens"]  # the right ones
    completions: Int[Tensor, "rows tokens"]
    rewards: Float[Tensor, "rows"]
    behaviour: Float[Tensor, "rows"]
    reference: Float[Tensor, "rows tokens"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, sampler: LlamaForCausalLM, reference: LlamaForCausalLM, generator: torch.Generator
    ) -> Rollout:
        rows = torch.randint(len(_TRAIN_PROMPTS), (PROMPTS,), generator=generator)
        prompts, answers = _TRAIN_PROMPTS[rows], _TRAIN_ANSWERS[rows]
        completions = sample(sampler, prompts, K, generator)
        right = (completions == answers.repeat_interleave(K, 0)).all(1)
        return cls(
            prompts,
            answers,
            completions,
            right.float(),
            token_logps(sampler, prompts, completions, K).sum(1),
            token_logps(reference, prompts, completions, K),
        )

    @torch.no_grad()
    def rewards_of(
        self, model: LlamaForCausalLM, n: int, generator: torch.Generator
    ) -> Float[Tensor, "prompts n"]:
        """Rewards of n responses of `model` to each prompt: 1 with the probability of the right answer."""
        right = token_logps(model, self.prompts, self.answers, 1).sum(1).exp()
        return torch.bernoulli(right[:, None].expand(-1, n), generator=generator)

    def responses(self, model: LlamaForCausalLM, rollout: Tensor | None = None) -> Responses:
        """As a loss takes them, under the policy as it is; `rollout`: its log-probabilities back then."""
        logps = token_logps(model, self.prompts, self.completions, K)
        return Responses(
            policy=logps,
            rollout=logps.detach() if rollout is None else rollout,
            reference=self.reference,
            behaviour=self.behaviour,
            rewards=self.rewards,
            mask=not_ended(self.completions),
            k=K,
        )


class Learner:
    """A policy in training: AdamW, a rate that rises over ten updates and falls linearly to 0 at the last."""

    def __init__(self, model: LlamaForCausalLM, rate: float, updates: int) -> None:
        self.model, self.rate, self.updates, self.done = model, rate, updates, 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def update(self, responses: Responses, loss: Loss) -> None:
        schedule = min(1, (self.done + 1) / 10) * (1 - self.done / self.updates)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * schedule
        _update(self.model, self.optimizer, loss(responses))


def _update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, initial: LlamaForCausalLM) -> dict[str, float]:
    """On 500 held-out prompts: expected accuracy (exact), greedy accuracy, estimated KL(π‖initial), nats."""
    right = token_logps(model, _TEST_PROMPTS, _TEST_ANSWERS, 1).sum(1).exp().mean()
    generator = torch.Generator().manual_seed(1)
    greedy = sample(model, _TEST_PROMPTS, 1, generator, greedy=True)
    drawn = sample(model, _TEST_PROMPTS, 2, generator)
    moved = token_logps(model, _TEST_PROMPTS, drawn, 2) - token_logps(initial, _TEST_PROMPTS, drawn, 2)
    return {
        "accuracy": float(right),
        "greedy_accuracy": (greedy == _TEST_ANSWERS).all(1).float().mean().item(),
        "kl_initial": moved.sum(1).mean().item(),
    }
