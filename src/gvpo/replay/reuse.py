"""Replay over a run, whatever the engine: groups are kept as they come, and drawn again beside fresh ones."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo.errors import InputError
from gvpo.replay.buffer import ReplayBuffer
from gvpo.replay.group import Group
from gvpo.replay.options import OffPolicyConfig
from gvpo.replay.sampling import Weights
from gvpo.replay.tokens import Encoder, fingerprint
from gvpo.replay.view import rank_folder


class Reuse:
    """The groups of one process, of `world`.

    Args:
        home: the run's folder: its checkpoints are in it and, without `replay_directory`, its groups.
        group_size: k that every group must have; None allows any.
        reference: of the run: "rollout" re-anchors, if replayed groups are scored anew.

    Attributes:
        sampling: which groups are replayed: a name, or a function from `ReplayIndex` to weights.
        buffer: the groups.
        run: a name of this run, as steps of two runs are not the same policy.
        earlier: steps of earlier runs in the buffer, from which those of this one count on.
    """

    def __init__(
        self,
        options: OffPolicyConfig,
        home: str | Path,
        encoder: Encoder,
        *,
        group_size: int | None,
        seed: int,
        reference: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if options.replay_reference == "current" and reference == "rollout":
            warnings.warn(
                "replay_reference='current' with reference='rollout' re-anchors: each replayed group pulls "
                "away from the policy as it is, without end. With 15 replayed groups for each fresh "
                "one, accuracy ended between 65 % and 75 % where 'stored' reached 93 % to 97 %.",
                stacklevel=4,
            )
        self.options = options
        self.sampling: str | Weights = options.replay_sampling
        self.folder = Path(options.replay_directory or Path(home) / "replay")
        self.buffer = ReplayBuffer(
            rank_folder(self.folder, rank),
            tokenizer=fingerprint(encoder.tokenizer),
            vocabulary_size=encoder.vocabulary_size,
            group_size=group_size,
            capacity=-(-options.replay_capacity // world),
            max_age=options.replay_max_age,
            memory=options.replay_memory * 2**20,
            seed=seed + rank,
            checkpoints=home,
        )
        self._due = 0.0  # replayed groups owed, as a ratio need not come out even
        self._new_run()

    def begin(self) -> None:
        """A new run: groups of an earlier one leave its own folder."""
        self._due = 0.0
        if self.options.replay_directory is None:
            self.buffer.clear()
        self._new_run()

    def _new_run(self) -> None:
        self.run = uuid.uuid4().hex[:8]
        # Ages are steps over both runs.
        self.earlier = int(self.buffer.records["policy_step"].max(initial=0))

    def keep(self, groups: Sequence[Group], step: int) -> None:
        """Keep groups, with their reference log-probs and `policy_step`s that count from `earlier`."""
        self.buffer.append(groups)
        self.buffer.evict(self.earlier + step)

    def owed(self, fresh: float) -> int:
        """How many groups are to be replayed beside so many fresh ones."""
        self._due += self.options.replay_ratio * fresh
        count = int(self._due)
        self._due -= count
        return count

    def take(self, count: int, step: int, before_number: int | None = None) -> list[Group]:
        """So many groups at `step`, or what there is; for `before_number` see `ReplayBuffer.sample`.

        Raises:
            InputError: a group that was stored without its reference, which the options ask for.
        """
        groups = self.buffer.sample(
            count, sampling=self.sampling, step=self.earlier + step, before_number=before_number
        )
        if self.options.replay_reference == "stored" and any(g.reference is None for g in groups):
            raise InputError(
                f"A group in {self.folder} was stored without reference log-probabilities: use "
                "replay_reference='current'."
            )
        return groups

    def facts(self, groups: Sequence[Group], step: int) -> dict[str, tuple[float, float | None]]:
        """What is logged of replayed groups: totals, and what means are to be divided by."""
        stored = self.buffer.index(self.earlier + step).ages.clip(min=0)
        ages = [max(0, self.earlier + step - group.policy_step) for group in groups]
        return {
            "replay/size": (len(stored), None),
            "replay/size_age_mean": (float(stored.sum()), len(stored)),
            "replay/groups": (len(groups), None),
            "replay/age_mean": (sum(ages), len(ages)),
            "replay/age_max": (max(ages, default=0), len(ages)),
        }

    def save(self, folder: Path) -> dict[str, Any]:
        """Put the buffer into a folder of a checkpoint; what there is besides is returned."""
        self.buffer.save(folder)
        return {"run": self.run, "earlier": self.earlier, "due": self._due}

    def restore(self, state: dict[str, Any], *folders: Path) -> None:
        """Go on with what was in the buffers of these folders; or, if so wanted, with what is there now."""
        self.run, self._due = state.get("run", self.run), state.get("due", 0.0)
        self.earlier = state.get("earlier", 0)
        if self.options.replay_after_crash == "rollback" or not len(self.buffer):
            self.buffer.restore(*folders)
