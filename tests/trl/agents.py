"""Episodes with tools: a model whose sampling is written down, and what happened as seen from outside TRL."""

import asyncio
import copy
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from tests.models import tiny_model
from tests.trl.chat_model import TOOL_SCHEMA, TOOL_TEMPLATE, chat_tokenizer
from tests.trl.oracle import TOKENS, Row

LONGEST = 300
TOKENIZER = chat_tokenizer(TOOL_TEMPLATE)
TOKENIZER.response_schema = TOOL_SCHEMA


def call(name: str, **arguments: int) -> str:
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{text}</tool_call>"


@dataclass
class Episode:
    """What a model read and wrote, and which of it it wrote."""

    prompt: TOKENS
    tokens: TOKENS = field(default_factory=list)
    own: list[bool] = field(default_factory=list)

    def goes_on_with(self, ids: TOKENS) -> bool:
        before = self.prompt + self.tokens
        return len(ids) > len(before) and ids[: len(before)] == before


@dataclass
class Episodes:
    """What happened on one process."""

    rank: int = 0
    names: tuple[str, ...] = ("add", "double", "divide", "sleep", "unknown")
    temperature: float = 1.0
    times: Counter = field(default_factory=Counter)
    open: list[Episode] = field(default_factory=list)
    generations: list[list[Row]] = field(default_factory=list)
    messages: list[list[list[dict]]] = field(default_factory=list)  # as TRL has parsed them
    heard: set[str] = field(default_factory=set)  # from tools

    def say(self, ids: TOKENS) -> TOKENS:
        """The model's next turn: calls, or an answer, which mostly has an end."""
        self.times[tuple(ids)] += 1
        rng = random.Random(f"{ids} {self.rank} {self.times[tuple(ids)]}")
        answer = "".join(rng.choices("0123456789 abc", k=rng.randint(0, 9)))
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                answer += call(rng.choice(self.names), a=rng.randrange(9), b=rng.randrange(9))
            case 4:  # at the same time
                answer += "".join(call(n, a=rng.randrange(9), b=3) for n in rng.choices(self.names, k=2))
            case 5:
                answer += "<tool_call>{</tool_call>"
        said = TOKENIZER(answer)["input_ids"]
        if rng.random() < 0.9:
            return [*said, TOKENIZER.eos_token_id]
        return said + TOKENIZER("a" * (LONGEST - len(said)))["input_ids"]  # and no end is in sight

    def go_on(self, ids: TOKENS) -> TOKENS:
        going = [episode for episode in self.open if episode.goes_on_with(ids)]
        episode = max(going, key=lambda e: len(e.tokens), default=None)
        if episode is None:
            self.open.append(episode := Episode(ids))
        read = ids[len(episode.prompt) + len(episode.tokens) :]
        said = self.say(ids)
        episode.tokens += read + said
        episode.own += [False] * len(read) + [True] * len(said)
        return said

    def length(
        self, prompts: list, completions: list, completion_ids: list, task: list, **others: Any
    ) -> list:
        """A reward function. What an environment thinks of the episode is noted, too."""
        self.generations.append([])
        self.messages.append(copy.deepcopy(completions))
        values = []
        environments = others.get("environments") or [None] * len(prompts)
        for i, messages in enumerate(prompts):
            prompt = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            ids = completion_ids[i]
            episode = next(e for e in self.open if e.prompt == prompt and e.tokens[: len(ids)] == ids)
            self.open.remove(episode)
            row = Row([task[i]], prompt, ids, episode.own[: len(ids)])
            last = str(completions[i][-1]["content"])
            digits = sum(c.isdigit() for c in last)
            values.append(None if "77" in last else (digits + len(completions[i])) / 8)  # exact in float32
            row.rewards = [values[-1]]
            if environments[i] is not None:
                row.rewards.append(environments[i].score)
            self.generations[-1].append(row)
            self.heard |= {message["content"] for message in completions[i] if message["role"] == "tool"}
        self.open.clear()
        return values


class AgentModel(LlamaForCausalLM):
    """The tiny model, whose `generate` says what the episodes do."""

    episodes: Episodes

    def generate(self, input_ids: Any, attention_mask: Any, generation_config: Any, **_: Any) -> torch.Tensor:
        assert generation_config.temperature == self.episodes.temperature
        prompts = [ids[seen == 1].tolist() for ids, seen in zip(input_ids, attention_mask, strict=True)]
        said = [self.episodes.go_on(prompt) for prompt in prompts]
        out = torch.zeros(len(said), max(map(len, said)), dtype=torch.long)
        for row, tokens in zip(out, said, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return torch.cat([input_ids, out.to(input_ids)], 1)


def agent_policy() -> LlamaForCausalLM:
    return tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=2048).double()


def agent_model(episodes: Episodes) -> AgentModel:
    model = copy.deepcopy(agent_policy())
    model.__class__ = AgentModel
    model.episodes = episodes
    return model


def tasks(n: int = 32, **columns: Any) -> Dataset:
    rng = random.Random(0)
    prompts = [[{"role": "user", "content": f"{rng.randrange(99)}+{rng.randrange(99)}"}] for _ in range(n)]
    return Dataset.from_dict({"prompt": prompts, "task": list(range(n)), **columns})


# ------------------------------------------------------------------------------------------------- tools


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: One.
        b: Other.
    """
    return a + b


async def double(a: int, b: int) -> int:
    """Double, at leisure.

    Args:
        a: One.
        b: Other.
    """
    await asyncio.sleep(0.001 * b)
    return 2 * a


def divide(a: int, b: int) -> int:
    """Divide, mostly by nothing.

    Args:
        a: One.
        b: Other.
    """
    return a // (b // 8)


def sleep(a: int, b: int) -> int:
    """Sometimes for ever.

    Args:
        a: One.
        b: Other.
    """
    while b > 4:
        time.sleep(60)
    return a


TOOLS = [add, double, divide, sleep]


class Room:
    """In every other task each episode has an observation of its own; it is over after one look."""

    made = 0

    def __init__(self) -> None:
        Room.made += 1
        self.number = Room.made
        self.looks: list[int] = []
        self.asked = 0

    def reset(self, task: int, **_: Any) -> str | None:
        self.looks, self.asked = [], 0
        return f" in room {self.number}" if task % 2 else None

    def look(self, a: int, b: int) -> str:
        """Look at a place.

        Args:
            a: The place.
            b: How closely.
        """
        if self.looks:
            raise ValueError("It is over.")
        self.looks.append(a)
        return "x" * (a % 5)

    async def listen(self, a: int, b: int) -> str:
        """Listen.

        Args:
            a: To what.
            b: How closely.
        """
        return "silence"

    @property
    def score(self) -> float | None:
        return None if self.looks == [5] else sum(self.looks) / 8

    def get_reward(self) -> float | None:
        self.asked += 1
        assert self.asked == 1
        return self.score


class SilentRoom(Room):
    """Another, that is rewarded from outside only."""

    get_reward = None
    score = None

    def ring(self, a: int, b: int) -> str:
        """Ring a bell.

        Args:
            a: How often.
            b: How loudly.
        """
        return "ding" * (a % 3)
