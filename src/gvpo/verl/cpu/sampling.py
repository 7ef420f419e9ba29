"""Batched sampling with Hugging Face `generate`, the same whatever the batch."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """How to sample: temperature 0 is the likeliest token, top_k 0 and top_p 1 are all tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_verl(cls, params: dict[str, Any], response_length: int) -> Sampling:
        """From verl's `sampling_params`, whose top_k is −1 for all tokens."""
        return cls(
            max_tokens=int(params.get("max_tokens") or params.get("max_new_tokens") or response_length),
            temperature=float(params.get("temperature", 1.0)),
            top_k=max(0, int(params.get("top_k", -1))),
            top_p=float(params.get("top_p", 1.0)),
            repetition_penalty=float(params.get("repetition_penalty", 1.0)),
        )

    def processors(self, seeds: Sequence[int]) -> LogitsProcessorList:
        """What makes the largest score the token to take, for rows with these seeds."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0:
            return processors
        processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(_GumbelNoise(seeds))
        return processors


class Response(NamedTuple):
    """A sampled response."""

    tokens: list[int]  # with the end-of-sequence token, if that was sampled
    logps: list[float]  # of each token at the temperature, in nats
    reason: str  # "completed" by itself, at the "length" that was asked for, or "aborted"


class Request(NamedTuple):
    """A response that is waited for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    answer: asyncio.Future[Response]


def next_batch(waiting: Sequence[Request], most: int) -> list[Request]:
    """The oldest request and others that sample alike, `most` in all."""
    return [request for request in waiting if request.sampling == waiting[0].sampling][:most]


class _GumbelNoise(LogitsProcessor):
    """Adds each row's own Gumbel noise, so that the largest score is a sample of the softmax."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Tensor:
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores - noise.log()


class _Stop(StoppingCriteria):
    """Ends all rows once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Int[Tensor, "rows tokens"], scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set())


def row_seed(*parts: object) -> int:
    """A seed that depends on all of `parts` and nothing else, also in another process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    stop: threading.Event | None = None,
) -> list[Response]:
    """One response to each prompt, all in one batch, by a model in evaluation mode; `stop` ends it at once.

    A row depends on its prompt and its seed, not on its companions, up to rounding.
    """
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    pad = next(iter(ends)) if pad is None else pad
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    attention = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        ids,
        attention_mask=attention,
        max_new_tokens=sampling.max_tokens,
        do_sample=False,  # the noise makes a sample of the largest score
        temperature=None,
        top_k=None,
        top_p=None,
        pad_token_id=pad,
        logits_processor=sampling.processors(seeds),
        stopping_criteria=StoppingCriteriaList([_Stop(stop or threading.Event())]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, width:]
    logits = torch.stack(out.logits, dim=1).float() / (sampling.temperature or 1.0)
    logps = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    responses = []
    for row, row_logps in zip(tokens.tolist(), logps.tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in ends), None)
        length = len(row) if end is None else end + 1
        cut = "length" if length == sampling.max_tokens else "aborted"
        responses.append(Response(row[:length], row_logps[:length], cut if end is None else "completed"))
    return responses
