"""Completions that the policy did not give, or gave long ago: what the runs off policy are trained on.

policy          its own, two updates to a rollout
stale           its own, twelve updates to a rollout
logs            of another model, `Logs`: fixed before the training, none generated in it
demonstrations  its own, but for two of eight, which are right answers that no model gave
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.language.measure import log_probabilities, sample, sample_all
from experiments.language.tasks import Task

# As TRL calls it: prompts, each as often as it is to be answered, and the trainer.
Rollout = Callable[[list[str], Any], dict[str, Any]]
Logs = Mapping[str, Sequence[Mapping[str, Any]]]  # completions of every key: "ids" and their "logps"

UPDATES_PER_ROLLOUT = {"policy": 2, "stale": 12, "logs": 2, "demonstrations": 2}
_LOGGED, _LOG_TEMPERATURE = 32, 1.5
_DEMONSTRATED = 4  # one completion in so many


@torch.no_grad()
def logged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Logs:
    """32 completions of every question that is trained on, at temperature 1.5, as JSON can hold them."""
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in task.trained}
    answered = iter(key for key in task.trained for _ in range(_LOGGED))
    model.eval()
    for part in sample_all(model, tokenizer, task, task.trained, _LOGGED, _LOG_TEMPERATURE):
        logps = log_probabilities(model, part, _LOG_TEMPERATURE)
        for ids, these, there in zip(
            part.ids[:, -part.width :], logps, part.mask[:, -part.width :], strict=True
        ):
            completion = {"ids": ids[there].tolist(), "logps": [round(x, 5) for x in these[there].tolist()]}
            found[next(answered)].append(completion)
    return found


def rollout(source: str, task: Task, tokenizer: PreTrainedTokenizerBase, logs: Logs | None) -> Rollout | None:
    """What gives the trainer its completions; None: the trainer samples, as it does by itself."""
    keys = {task.prompt(tokenizer, key): key for key in task.trained}
    if source == "logs":
        assert logs is not None
        return _Replayed(logs, keys, tokenizer)
    if source == "demonstrations":
        assert task.demonstrations is not None
        answers = {prompt: task.demonstrations(tokenizer, key) for prompt, key in keys.items()}
        return _Demonstrated(answers, task, tokenizer)
    return None


class _Replayed:
    """Logged completions, each of a question's once before any comes twice."""

    def __init__(self, logs: Logs, keys: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.logs, self.keys, self.tokenizer = logs, keys, tokenizer
        self.left: dict[str, list[Mapping[str, Any]]] = {}

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        drawn = [self._draw(self.keys[prompt]) for prompt in prompts]
        return {
            "prompt_ids": self.tokenizer(prompts)["input_ids"],
            "completion_ids": [list(one["ids"]) for one in drawn],
            "logprobs": [list(one["logps"]) for one in drawn],
        }

    def _draw(self, key: str) -> Mapping[str, Any]:
        if not self.left.get(key):
            self.left[key] = random.sample(self.logs[key], len(self.logs[key]))
        return self.left[key].pop()


class _Demonstrated:
    """The policy's completions, but for every fourth, which is a demonstration."""

    def __init__(
        self, answers: Mapping[str, Sequence[str]], task: Task, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.answers, self.task, self.tokenizer = answers, task, tokenizer

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        model.eval()
        part = sample(model, self.tokenizer, prompts, 1, self.task.tokens)
        model.train(training)
        completions = [
            ids[there].tolist()
            for ids, there in zip(part.ids[:, -part.width :], part.mask[:, -part.width :], strict=True)
        ]
        for row in range(0, len(prompts), _DEMONSTRATED):
            shown = random.choice(self.answers[prompts[row]])
            completions[row] = self.tokenizer.encode(shown, add_special_tokens=False)
        return {
            "prompt_ids": self.tokenizer(prompts)["input_ids"],
            "completion_ids": completions,
            "logprobs": None,
        }
