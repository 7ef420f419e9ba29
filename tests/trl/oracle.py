"""An oracle for `GVPOTrainer`: the whole run again, literally and in float64, from outside the trainer.

It knows the canned tokens, what the reward functions were asked and answered, and the settings; it takes
nothing from the trainer. The formula, the reference, the tool mask, the temperature, the windows, replay and
the optimizer (SGD with clipping) are written down here once more, row by row.
"""

import copy
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, TrainerCallback

from tests.models import VOCAB, literal_trusted_loss, tiny_model
from tests.test_objective import literal_loss
from tests.trl.common import EOS, dataset, tokenizer

LONGEST = 12
TOKENS = list[int]


@dataclass
class Row:
    """A response as the outside saw it, and which of its tokens count."""

    asked: TOKENS  # the prompt of the data set
    prompt: TOKENS  # what the model was given
    completion: TOKENS
    counts: list[bool]
    demonstration: bool = False
    demonstrations: int = 0  # of its prompt
    rewards: list[float | None] = field(default_factory=list)  # one of each reward function

    @property
    def truncated(self) -> bool:
        return self.completion[-1] != EOS


@dataclass
class Records:
    """What happened on one process: completions that were handed out, and generations that were rewarded."""

    rank: int = 0
    at_once: int = 10**6
    temperature: float = 1.0
    times: Counter = field(default_factory=Counter)
    handed_out: list[Row] = field(default_factory=list)
    generations: list[list[Row]] = field(default_factory=list)
    portions: list[int] = field(default_factory=list)

    def hand_out(self, prompt: TOKENS, *, with_tools: bool = False) -> Row:
        """The next completion of a prompt, a function of the process and of how often it was asked for."""
        self.times[tuple(prompt)] += 1
        rng = random.Random(f"{prompt} {self.rank} {self.times[tuple(prompt)]}")
        ends = rng.random() < 0.8
        n = rng.randint(0, LONGEST - 1) if ends else LONGEST
        completion = [rng.randrange(4, VOCAB) for _ in range(n)] + [EOS] * ends
        counts = [not with_tools or rng.random() < 0.6 for _ in completion]
        alone = with_tools and prompt[0] % 2  # half of the groups have a prompt in common
        own = [rng.randrange(4, VOCAB) for _ in range(rng.randint(0, 2))] if alone else []
        self.handed_out.append(Row(prompt, prompt + own, completion, counts))
        return self.handed_out[-1]

    def tools(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: an environment's tokens stand among the model's, and before them."""
        rows = [self.hand_out(tokenizer()(text)["input_ids"], with_tools=True) for text in prompts]
        return {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.completion for row in rows],
            "logprobs": [[0.0] * len(row.completion) for row in rows],
            "env_mask": [[int(c) for c in row.counts] for row in rows],
        }

    def digits(self, prompts: list[str], completions: list[str], completion_ids: list, **others: Any) -> list:
        """A dense reward, the same for all that start with a capital: equal groups happen."""
        given = others.get("demonstrations", [[]] * len(prompts))
        self.generations.append(
            [self.recognised(*row) for row in zip(prompts, completion_ids, given, strict=True)]
        )
        values = [0.5 if c[:1].isupper() else sum(ch.isdigit() for ch in c) / 4 for c in completions]
        return self.answered([None if "7" in c else v for c, v in zip(completions, values, strict=True)])

    def lengths(self, completions: list[str], **_: Any) -> list[float | None]:
        """Another, which has no opinion of some rows, either."""
        return self.answered([None if "a" in c or "7" in c else len(c) / 8 for c in completions])

    def answered(self, values: list[float | None]) -> list[float | None]:
        for row, value in zip(self.generations[-1], values, strict=True):
            row.rewards.append(value)
        return values

    def recognised(self, text: str, ids: TOKENS, demonstrations: list[str]) -> Row:
        """The row that was handed out, or a demonstration of its prompt; each once."""
        asked = tokenizer()(text)["input_ids"]
        for row in self.handed_out:
            if row.asked == asked and row.completion == ids and not row.rewards:
                self.handed_out.remove(row)
                row.demonstrations = len(demonstrations)
                return row
        answers = [[*tokenizer()(answer)["input_ids"], EOS] for answer in demonstrations]
        assert ids in answers, f"{text!r} was never answered by {ids}"
        return Row(asked, asked, ids, [True] * len(ids), True, len(demonstrations))


class CannedModel(LlamaForCausalLM):
    """The tiny model, whose `generate` hands out what the records say, until memory runs out."""

    records: Records

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any, **_: Any) -> torch.Tensor:
        records = self.records
        if len(input_ids) > records.at_once:
            raise torch.OutOfMemoryError("too many rows")
        assert generation_config.temperature == records.temperature
        records.portions.append(len(input_ids))
        prompts = [ids[seen == 1].tolist() for ids, seen in zip(input_ids, attention_mask, strict=True)]
        out = torch.zeros(len(prompts), LONGEST, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            completion = records.hand_out(prompt).completion
            out[i, : len(completion)] = torch.tensor(completion)
        return torch.cat([input_ids, out.to(input_ids)], 1)


def canned_model(records: Records) -> CannedModel:
    model = tiny_model().double()
    model.__class__ = CannedModel
    model.records = records
    return model


def demonstrated(n: int = 64) -> Dataset:
    """Prompts of which most have one or two demonstrations, which are rewarded."""
    prompts = dataset(n)["prompt"]
    answers = [
        [] if i % 4 == 0 or "7" in text else [text[::-1], text[:1] * 3][: 1 + i % 2]
        for i, text in enumerate(prompts)
    ]
    return Dataset.from_dict({"prompt": prompts, "demonstrations": answers})


class Snapshots(TrainerCallback):
    """The parameters after each optimizer step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.before = trained(model)

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.after.append(trained(model))


def trained(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the parameters that training changes."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class Step:
    """What an optimizer step should have done."""

    loss: float
    parameters: dict[str, torch.Tensor]
    beyond_trust: float
    kl: float  # mean |S − S'| of the rows in it
    replayed: int  # groups


Group = tuple[list[Row], torch.nn.Module, torch.nn.Module]  # with its sampler and its reference


class Oracle:
    """The run, from the generations of all ranks (`generations[rank][number]`) and the settings.

    Replay is drawn at random by the trainer; here the settings must be such that every stored group that may
    be drawn is drawn.
    """

    def __init__(
        self, generations: list[list[list[Row]]], args: Any, policy: torch.nn.Module | None = None
    ) -> None:
        self.generations, self.args = generations, args
        self.policy = policy or tiny_model().double()
        self.initial = self.reference = copy.deepcopy(self.policy)
        self.takes: list[tuple[int, torch.nn.Module]] = []  # the policies when generations were begun with
        # Of each generation the step at which it was sampled, the policy of then, and its reference.
        self.samplers: list[tuple[int, torch.nn.Module, torch.nn.Module]] = []
        self.owed = 0.0

    def run(self) -> list[Step]:
        return [self.step(number) for number in range(self.args.max_steps)]

    def step(self, step: int) -> Step:
        args, uses, used, groups = self.args, Counter(), [], []
        if args.reference == "moving" and step % args.reference_every == 0:
            self.reference = copy.deepcopy(self.policy)
        for call in range(
            step * args.gradient_accumulation_steps, (step + 1) * args.gradient_accumulation_steps
        ):
            number, part = divmod(call, args.steps_per_generation * args.num_iterations)
            part %= args.steps_per_generation
            if number == len(self.samplers):
                self.takes.append((step, copy.deepcopy(self.policy)))
                sampled, sampler = self.takes[max(0, number - args.generate_ahead)]
                reference = sampler if args.reference == "rollout" else self.reference
                self.samplers.append((sampled, sampler, reference))
            used.append((number, part, uses[number, part]))
            uses[number, part] += 1
        for number in sorted({number for number, _, _ in used}):
            for use in sorted({use for n, _, use in used if n == number}):
                parts = {part for n, part, u in used if (n, u) == (number, use)}
                groups += [(rows, *self.samplers[number][1:]) for rows in self.groups(number, parts)]
        replayed = self.replayed(step, min(number for number, _, _ in used), len(groups))
        return self.update(groups, replayed)

    def groups(self, number: int, parts: set[int]) -> list[list[Row]]:
        """The rows of some slices of a generation, by group. Each rank cuts its own rows into slices."""
        n, found = self.args.per_device_train_batch_size, {}
        everyone = [(row, i // n) for rank in self.generations for i, row in enumerate(rank[number])]
        for place, (row, part) in enumerate(everyone):
            if part in parts:
                found.setdefault(place // self.args.num_generations, []).append(row)
        for rows in found.values():
            assert len(rows) == self.args.num_generations
            assert all(row.asked == rows[0].asked for row in rows)
            # Slots are filled in order, as far as there are demonstrations.
            k, wanted = len(rows), self.args.demonstrations_per_group
            slots = (self.args.demonstration_slots or range(k - wanted, k))[: rows[0].demonstrations]
            assert [row.demonstration for row in rows] == [slot in slots for slot in range(k)]
        return list(found.values())

    def replayed(self, step: int, oldest: int, fresh: int) -> list[Group]:
        """All groups of earlier generations that have not become too old, nor too many."""
        args = self.args
        if not args.replay_ratio:
            return []
        every = set(range(args.steps_per_generation))
        stored = [
            (number, rows) for number in range(len(self.samplers)) for rows in self.groups(number, every)
        ]
        first = self.samplers[oldest][0]
        limit = math.inf if args.replay_max_age is None else args.replay_max_age
        # Looked at when the last generation came, and then again.
        kept = [(n, rows) for n, rows in stored if step - self.samplers[n][0] <= limit]
        kept = [(n, rows) for n, rows in kept[-args.replay_capacity :] if self.samplers[n][0] < first]
        self.owed += args.replay_ratio * fresh
        assert len(kept) <= int(self.owed), "not all of them are drawn"
        self.owed -= int(self.owed)
        return [(rows, *self.samplers[n][1:]) for n, rows in kept]

    def update(self, fresh: list[Group], replayed: list[Group]) -> Step:
        args, groups = self.args, fresh + replayed
        rows = [row for group, *_ in groups for row in group]
        tokens = [self.tokens(self.policy, row) for row in rows]
        policy = torch.stack([row.sum() for row in tokens])
        with torch.no_grad():
            rollout = [self.tokens(sampler, row) for group, sampler, _ in groups for row in group]
            current = replayed if args.replay_reference == "current" else []
            now = self.policy if args.reference == "rollout" else self.reference
            stored = groups[: len(groups) - len(current)]
            measured = [(row, model) for group, _, model in stored for row in group]
            measured += [(row, now) for group, *_ in current for row in group]
            reference = torch.stack([self.tokens(model, row).sum() for row, model in measured])
        values = {
            "rewards": torch.tensor([self.reward(row) or 0.0 for row in rows], dtype=torch.float64),
            "group_ids": torch.tensor([i for i, group in enumerate(groups) for _ in group[0]]),
            "mask": torch.tensor([self.reward(row) is not None for row in rows]),
        }
        loss = gradient = literal_loss(policy, reference, **values, beta=args.beta)
        kept = scored = 1
        if args.trust is not None:
            sums = policy.detach().requires_grad_()
            literal_loss(sums, reference, **values, beta=args.beta).backward()
            weights = -sums.grad
            gradient, kept, scored = literal_trusted_loss(tokens, rollout, weights, args.trust)
        self.policy.zero_grad()
        gradient.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm)
        with torch.no_grad():
            for value in self.policy.parameters():
                if value.requires_grad:
                    value -= args.learning_rate * value.grad
        return Step(
            loss.item(),
            trained(self.policy),
            1 - kept / scored,
            (policy - reference).abs().mean().item(),
            len(replayed),
        )

    def tokens(self, model: torch.nn.Module, row: Row) -> torch.Tensor:
        """log p of the tokens of a completion that count, at the sampling temperature."""
        ids = torch.tensor([row.prompt + row.completion])
        logps = (model(input_ids=ids).logits[0, :-1] / self.args.temperature).log_softmax(-1)
        picked = logps.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :, 0]
        return picked[torch.tensor(row.counts)]

    def reward(self, row: Row) -> float | None:
        """The weighted sum of what the reward functions said; None where the row takes no part."""
        if row.truncated and self.args.mask_truncated_completions:
            return None
        if row.demonstration and self.args.demonstration_reward is not None:
            return self.args.demonstration_reward
        weights = self.args.reward_weights or [1.0] * len(row.rewards)
        said = [(w, r) for w, r in zip(weights, row.rewards, strict=True) if r is not None]
        return sum(w * r for w, r in said) if said else None
