"""A group: a prompt, its responses, and the one reference that all of them are measured against.

The normaliser Z(x) of the optimum cancels from the loss only if every response of a group has its S' from the
*same* reference policy (docs/theory.md, fact 6). So the reference is a property of the group here, not of
a response, and nothing in this package makes a group out of responses of two references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Response:
    """One completion, before it is in a group.

    Attributes:
        completion_ids: its tokens, end-of-turn included where there was one.
        reward: R, any finite number.
        reference: name of the policy that `reference_logp` is from, such as "initial"; None if not scored.
        reference_logp: S' in nats under that policy.
        counted: which tokens make up S (not a tool's output); None: all.
    """

    completion_ids: Sequence[int]
    reward: float
    reference: str | None = None
    reference_logp: float | None = None
    counted: Sequence[bool] | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """The k responses to one prompt, measured against one reference. Made by `Group.of`; never changed.

    Attributes:
        prompt_ids: the prompt's tokens.
        token_ids: the tokens of all completions, one after the other.
        lengths: how many of them each completion has.
        rewards: R.
        reference: name of the policy that all of `reference_logps` are from. None: not scored yet.
        reference_logps: S' in nats, of whole completions.
        counted: which of `token_ids` make up S; None: all.
        valid: False for a response that has no reward and takes no part; None: all take part.
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
    policy_step: int = 0
    components: Mapping[str, Float[np.ndarray, "k"]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """k, the number of responses."""
        return len(self.lengths)

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[int] | np.ndarray,
        completions: Sequence[Sequence[int]] | Sequence[np.ndarray],
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

        Raises:
            InputError: fewer than two responses; an empty prompt or completion; a reward of a response that
                takes part, or a log-probability, that is no finite number; log-probabilities without the name
                of their reference, or the name without them; or sizes that do not fit.
        """
        flat = None if counted is None else np.concatenate([np.asarray(c, dtype=bool) for c in counted])
        group = cls(
            np.asarray(prompt_ids, dtype=np.int32),
            np.concatenate([np.asarray(c, dtype=np.int32) for c in completions] or [np.zeros(0, np.int32)]),
            np.array([len(c) for c in completions], dtype=np.int32),
            np.asarray(rewards, dtype=np.float64),
            reference,
            None if reference_logps is None else np.asarray(reference_logps, dtype=np.float64),
            flat,
            None if valid is None else np.asarray(valid, dtype=bool),
            int(policy_step),
            {name: np.asarray(v, dtype=np.float64) for name, v in (components or {}).items()},
            dict(metadata or {}),
        )
        group.check()
        return group

    @classmethod
    def of_responses(cls, prompt_ids: Sequence[int], responses: Sequence[Response], **others: Any) -> Group:
        """A group of responses from anywhere: replayed, demonstrated, sampled.

        Raises:
            InputError: as `of`, and if the responses were not all scored under the same reference.
        """
        names = {response.reference for response in responses}
        if len(names) > 1:
            raise InputError(
                f"A group cannot mix references, but these responses were scored under "
                f"{' and '.join(sorted(repr(n) if n else 'none' for n in names))}: score all of them under "
                "one (Group.rescored)."
            )
        scored = next(iter(names), None) is not None
        masked = any(response.counted is not None for response in responses)
        return cls.of(
            prompt_ids,
            [r.completion_ids for r in responses],
            [r.reward for r in responses],
            reference=next(iter(names), None),
            reference_logps=[_given(r.reference_logp) for r in responses] if scored else None,
            counted=[r.counted or [True] * len(r.completion_ids) for r in responses] if masked else None,
            **others,
        )

    def joined(self, *responses: Response) -> Group:
        """This group and more responses, all scored under this group's reference.

        Raises:
            InputError: a response was scored under another reference, or as `of`.
        """
        whole = Group.of_responses(self.prompt_ids.tolist(), [*self.responses(), *responses])
        extra = len(responses)
        grown = {name: np.append(values, [np.nan] * extra) for name, values in self.components.items()}
        valid = None if self.valid is None else np.append(self.valid, [True] * extra)
        return replace(
            whole, valid=valid, policy_step=self.policy_step, components=grown, metadata=self.metadata
        )

    def rescored(self, reference: str, reference_logps: Sequence[float]) -> Group:
        """The same responses, all of them scored anew under one reference."""
        group = replace(
            self, reference=reference, reference_logps=np.asarray(reference_logps, dtype=np.float64)
        )
        group.check()
        return group

    def responses(self) -> list[Response]:
        """The responses one by one, each with the group's reference."""
        logps = [None] * len(self) if self.reference_logps is None else self.reference_logps.tolist()
        counted = [None] * len(self) if self.counted is None else self._cut(self.counted)
        return [
            Response(ids.tolist(), reward, self.reference, logp, None if c is None else c.tolist())
            for ids, reward, logp, c in zip(
                self.completions, self.rewards.tolist(), logps, counted, strict=True
            )
        ]

    @property
    def completions(self) -> list[Int[np.ndarray, "_"]]:
        """The completions' tokens."""
        return self._cut(self.token_ids)

    @property
    def reward_variance(self) -> float:
        """Unbiased variance of the rewards that take part; 0 for fewer than two."""
        rewards = self.rewards if self.valid is None else self.rewards[self.valid]
        return float(rewards.var(ddof=1)) if len(rewards) > 1 else 0.0

    @property
    def nbytes(self) -> int:
        """About how much memory the group takes."""
        return 4 * (len(self.prompt_ids) + len(self.token_ids)) + 32 * len(self) + 600

    def _cut(self, flat: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum(self.lengths).tolist()
        return [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def check(self) -> None:
        """Raise an InputError that says what is wrong with the group, if something is."""
        problem = self._problem()
        if problem:
            raise InputError(problem)

    def _problem(self) -> str | None:
        k = len(self.lengths)
        if k < 2:
            return f"A group needs two or more responses to compare, this one has {k}."
        if len(self.prompt_ids) == 0:
            return "The prompt of a group has no tokens."
        empty = self.lengths < 1 if self.valid is None else (self.lengths < 1) & self.valid
        if empty.any():
            return f"Completion {int(empty.argmax())} of a group is empty: leave it out."
        sizes = {"rewards": self.rewards, "reference_logps": self.reference_logps, "valid": self.valid}
        sizes |= {f"component {name}": values for name, values in self.components.items()}
        for name, values in sizes.items():
            if values is not None and values.shape != (k,):
                return f"{name} has shape {values.shape}, but the group has {k} completions: give one each."
        if self.counted is not None and self.counted.shape != self.token_ids.shape:
            return f"counted marks {len(self.counted)} tokens of {len(self.token_ids)}: mark every token."
        finite = np.isfinite(self.rewards)
        bad = ~finite if self.valid is None else ~finite & self.valid
        if bad.any():
            i = int(bad.argmax())
            return (
                f"The reward of completion {i} is {self.rewards[i]}: give a finite number, or set valid to "
                "False there."
            )
        if (self.reference is None) != (self.reference_logps is None):
            return (
                "reference and reference_logps belong together: name the one policy that all "
                "log-probabilities are from, or give neither."
            )
        if self.reference_logps is not None and not np.isfinite(self.reference_logps).all():
            i = int((~np.isfinite(self.reference_logps)).argmax())
            return (
                f"The reference log-probability of completion {i} is {self.reference_logps[i]}, not finite."
            )
        return None


def _given(logp: float | None) -> float:
    return float("nan") if logp is None else logp
