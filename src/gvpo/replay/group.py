"""A group: responses to a prompt, and the one reference that all of them are measured against.

The normaliser Z(x) of the optimum cancels from the loss only if every response of a group has its S' from the
*same* reference policy (docs/theory.md, fact 6). So the reference is a property of the group here, not of
a response, and nothing in this package makes a group out of responses of two references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gvpo.errors import InputError

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Response:
    """One completion, before it is in a group.

    Attributes:
        completion_ids: its tokens, end-of-turn included where there was one.
        reward: R, any finite number.
        reference: name of the policy that `reference_logp` is from, such as "initial"; None if not scored.
        reference_logp: S' in nats under that policy.
        counted: which tokens make up S (not a tool's output); None: all.
        prompt_ids: what it answers, where that is not the group's prompt (an environment's own observation).
    """

    completion_ids: Sequence[int]
    reward: float
    reference: str | None = None
    reference_logp: float | None = None
    counted: Sequence[bool] | None = None
    prompt_ids: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """The k responses to one prompt, measured against one reference. Made by `Group.of`; never changed.

    Attributes:
        prompt_ids: the tokens of the prompt; of all prompts, one after the other, with `prompt_lengths`.
        token_ids: the tokens of all completions, one after the other.
        lengths: how many of them each completion has.
        rewards: R.
        reference: name of the policy that all of `reference_logps` are from. None: not scored yet.
        reference_logps: S' in nats, of whole completions.
        counted: which of `token_ids` make up S; None: all.
        valid: False for a response that has no reward and takes no part; None: all take part.
        prompt_lengths: of each response's own prompt, where they differ; None: all share one.
        policy_step: optimizer step of the policy that the group is from.
        components: rewards by reward function, NaN where one gave none.
        metadata: anything that JSON can hold.
    """

    prompt_ids: Int[np.ndarray, "prompt"]
    token_ids: Int[np.ndarray, "tokens"]
    lengths: Int[np.ndarray, "k"]
    rewards: Float[np.ndarray, "k"]
    reference: str | None = None
    reference_logps: Float[np.ndarray, "k"] | None = None
    counted: Bool[np.ndarray, "tokens"] | None = None
    valid: Bool[np.ndarray, "k"] | None = None
    prompt_lengths: Int[np.ndarray, "k"] | None = None
    policy_step: int = 0
    components: Mapping[str, Float[np.ndarray, "k"]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """k, the number of responses."""
        return len(self.lengths)

    @classmethod
    def of(
        cls,
        prompt_ids: Ids | Sequence[Ids],
        completions: Sequence[Ids],
        rewards: Sequence[float] | np.ndarray,
        *,
        reference: str | None = None,
        reference_logps: Sequence[float] | None = None,
        counted: Sequence[Sequence[bool]] | Sequence[np.ndarray] | None = None,
        valid: Sequence[bool] | None = None,
        policy_step: int = 0,
        components: Mapping[str, Sequence[float]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Group:
        """A group of `completions` that were all scored under the one policy called `reference`.

        `prompt_ids` is the prompt of all, or a prompt for each. All else is as in the attributes, with one
        entry a response.

        Raises:
            InputError: fewer than two responses; an empty prompt or completion; a reward of a response that
                takes part, or a log-probability, that is no finite number; log-probabilities without the name
                of their reference, or the name without them; or sizes that do not fit.
        """
        shared = not (len(prompt_ids) and np.ndim(prompt_ids[0]))
        prompts = [_ids(ids) for ids in ([prompt_ids] if shared else prompt_ids)]
        alike = all(np.array_equal(prompt, prompts[0]) for prompt in prompts)
        group = cls(
            prompts[0] if alike else np.concatenate(prompts),  # what all share is kept once
            np.concatenate([_ids(c) for c in completions] or [_ids([])]),
            _lengths(completions),
            np.asarray(rewards, dtype=np.float64),
            reference,
            None if reference_logps is None else np.asarray(reference_logps, dtype=np.float64),
            None if counted is None else np.concatenate([np.asarray(c, dtype=bool) for c in counted]),
            None if valid is None else np.asarray(valid, dtype=bool),
            None if alike else _lengths(prompts),
            int(policy_step),
            {name: np.asarray(v, dtype=np.float64) for name, v in (components or {}).items()},
            dict(metadata or {}),
        )
        group.check()
        full: dict[str, Any] = {name: None for name in ("counted", "valid") if np.all(getattr(group, name))}
        return replace(group, **full)  # None says the same

    @classmethod
    def of_responses(
        cls, prompt_ids: Sequence[int] | None, responses: Sequence[Response], **others: Any
    ) -> Group:
        """A group of responses from anywhere: replayed, demonstrated, sampled.

        Raises:
            InputError: as `of`, and if the responses were not all scored under the same reference, or one has
                no prompt (neither its own nor `prompt_ids`).
        """
        names = {response.reference for response in responses}
        if len(names) > 1:
            raise InputError(
                f"A group cannot mix references, but these responses were scored under "
                f"{' and '.join(sorted(repr(n) if n else 'none' for n in names))}: score all of them under "
                "one (Group.rescored)."
            )
        (reference,) = names or {None}
        prompts: list[Any] = [prompt_ids if r.prompt_ids is None else r.prompt_ids for r in responses]
        if any(p is None for p in prompts):
            raise InputError("The responses of the group have prompts of their own: give each new one its.")
        logps = [np.nan if r.reference_logp is None else r.reference_logp for r in responses]
        return cls.of(
            prompts,
            [r.completion_ids for r in responses],
            [r.reward for r in responses],
            reference=reference,
            reference_logps=None if reference is None else logps,
            counted=[[True] * len(r.completion_ids) if r.counted is None else r.counted for r in responses],
            **others,
        )

    def joined(self, *responses: Response) -> Group:
        """This group and more responses, all scored under this group's reference.

        Raises:
            InputError: a response was scored under another reference, or as `of`.
        """
        extra = len(responses)
        return Group.of_responses(
            None if self.own_prompts else self.prompt_ids.tolist(),
            [*self.responses(), *responses],
            valid=None if self.valid is None else np.append(self.valid, [True] * extra),
            policy_step=self.policy_step,
            components={name: np.append(v, [np.nan] * extra) for name, v in self.components.items()},
            metadata=self.metadata,
        )

    def rescored(self, reference: str, reference_logps: Sequence[float]) -> Group:
        """The same responses, all of them scored anew under one reference."""
        logps = np.asarray(reference_logps, dtype=np.float64)
        group = replace(self, reference=reference, reference_logps=logps)
        group.check()
        return group

    def responses(self) -> list[Response]:
        """The responses one by one, each with the group's reference."""
        nothing = [None] * len(self)
        columns: Any = (
            self.completions,
            self.rewards,
            [self.reference] * len(self),
            nothing if self.reference_logps is None else self.reference_logps,
            self.counted_of_each or nothing,
            self.own_prompts or nothing,
        )
        plain = [[x.tolist() if hasattr(x, "tolist") else x for x in column] for column in columns]
        return [Response(*row) for row in zip(*plain, strict=True)]

    @property
    def completions(self) -> list[Int[np.ndarray, "_"]]:
        """The completions' tokens."""
        return _cut(self.token_ids, self.lengths)

    @property
    def own_prompts(self) -> list[Int[np.ndarray, "_"]] | None:
        """The prompt of each response, where they differ; None: all share `prompt_ids`."""
        return None if self.prompt_lengths is None else _cut(self.prompt_ids, self.prompt_lengths)

    @property
    def prompts(self) -> list[Int[np.ndarray, "_"]]:
        """The prompt of each response."""
        return self.own_prompts or [self.prompt_ids] * len(self)

    @property
    def counted_of_each(self) -> list[Bool[np.ndarray, "_"]] | None:
        """`counted`, one array a completion."""
        return None if self.counted is None else _cut(self.counted, self.lengths)

    @property
    def masks(self) -> list[Bool[np.ndarray, "_"]]:
        """Which tokens of each completion make up S."""
        return self.counted_of_each or [np.ones(n, dtype=bool) for n in self.lengths]

    @property
    def takes_part(self) -> Bool[np.ndarray, "k"]:
        """`valid`, one entry a response."""
        return np.ones(len(self), dtype=bool) if self.valid is None else self.valid

    @property
    def reward_variance(self) -> float:
        """Unbiased variance of the rewards that take part; 0 for fewer than two."""
        rewards = self.rewards[self.takes_part]
        return float(rewards.var(ddof=1)) if len(rewards) > 1 else 0.0

    def check(self) -> None:
        """Raise an InputError that says what is wrong with the group, if something is."""
        k = len(self)
        if k < 2:
            raise InputError(f"A group needs two or more responses to compare, this one has {k}.")
        sizes = {"rewards": self.rewards, "reference_logps": self.reference_logps, "valid": self.valid}
        sizes |= {"prompt_ids": self.prompt_lengths}
        sizes |= {f"component {name}": values for name, values in self.components.items()}
        for name, values in sizes.items():
            if values is not None and values.shape != (k,):
                raise InputError(
                    f"{name} has shape {values.shape}, but the group has {k} completions: give one each."
                )
        if len(self.prompt_ids) == 0 or (self.prompt_lengths is not None and self.prompt_lengths.min() < 1):
            raise InputError("The prompt of a group has no tokens.")
        for i in np.flatnonzero((self.lengths < 1) & self.takes_part):
            raise InputError(f"Completion {i} of a group is empty: leave it out.")
        if self.counted is not None and self.counted.shape != self.token_ids.shape:
            raise InputError(
                f"counted marks {len(self.counted)} tokens of {len(self.token_ids)}: mark every token."
            )
        for i in np.flatnonzero(~np.isfinite(self.rewards) & self.takes_part):
            raise InputError(
                f"The reward of completion {i} is {self.rewards[i]}: give a finite number, or set valid to "
                "False there."
            )
        if (self.reference is None) != (self.reference_logps is None):
            raise InputError(
                "reference and reference_logps belong together: name the one policy that all "
                "log-probabilities are from, or give neither."
            )
        logps = np.zeros(k) if self.reference_logps is None else self.reference_logps
        for i in np.flatnonzero(~np.isfinite(logps)):
            raise InputError(f"The reference log-probability of completion {i} is {logps[i]}, not finite.")


def worth_keeping(rewards: Sequence[float], valid: Sequence[bool], logps: Sequence[float]) -> bool:
    """Whether two or more responses take part, with numbers that are finite: others teach nothing."""
    numbers = [*logps, *(reward for reward, part in zip(rewards, valid, strict=True) if part)]
    return sum(valid) > 1 and bool(np.isfinite(numbers).all())


def _ids(tokens: Any) -> Int[np.ndarray, "_"]:
    return np.asarray(tokens, dtype=np.int32)


def _lengths(sequences: Sequence[Ids]) -> Int[np.ndarray, "_"]:
    return np.array([len(sequence) for sequence in sequences], dtype=np.int32)


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(lengths).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
