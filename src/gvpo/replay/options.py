"""The options for responses that the current policy did not sample: the same names on TRL and on verl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from gvpo.errors import InputError
from gvpo.replay.demonstrations import check_slots


@dataclass
class OffPolicyConfig:
    """Replay, demonstrations and logged completions; see docs/guide/off-policy.md.

    Args:
        replay_ratio: replayed groups per fresh group in each optimizer step, such as 0.5; 0 for no replay.
        replay_capacity: groups kept, over all processes; the oldest leave first.
        replay_max_age: groups older than this many optimizer steps leave.
        replay_reference: what a replayed group is measured against. "stored": the reference of its time.
            "current": the whole group is scored anew under `reference`; with reference="rollout" that is the
            policy as it is now (re-anchoring).
        replay_sampling: "uniform", "recent" (half the chance for every 8 steps of age) or "reward_variance".
            For a function of your own, set `trainer.replay.sampling`.
        replay_directory: where the groups are kept: a folder for each process. Groups that are already there
            are used. Default: a folder of its own in `output_dir`, emptied when training starts anew.
        replay_memory: MB of its replay file that each process keeps in memory.
        replay_after_crash: which groups a resumed run goes on with: "rollback", those of the checkpoint, or
            "keep", also those that were written after it. Either way each has one fixed reference.
        demonstrations_per_group: slots of each group that demonstrations take, where a prompt has so many.
        demonstration_slots: which slots, 0 … num_generations − 1. Default: the last ones.
        demonstration_column: column of the data set with a prompt's demonstration, or a list of them: texts,
            messages, or answers with ratings as `gvpo data logs` writes them into `logged`.
        demonstration_reward: of demonstrations without a rating. Default: the reward functions are asked.
        offline: logged completions with rewards to train on instead of prompts: a .parquet or .jsonl file
            (`gvpo.replay.offline` says which columns; what `gvpo data logs` writes will do), or the folder of
            a replay buffer. Nothing is generated.

    Raises:
        InputError: options out of range, or that exclude each other.
    """

    replay_ratio: float = 0.0
    replay_capacity: int = 10_000
    replay_max_age: int | None = None
    replay_reference: Literal["stored", "current"] = "stored"
    replay_sampling: Literal["uniform", "recent", "reward_variance"] = "uniform"
    replay_directory: str | None = None
    replay_memory: int = 256
    replay_after_crash: Literal["rollback", "keep"] = "rollback"
    demonstrations_per_group: int = 0
    demonstration_slots: list[int] | None = None
    demonstration_column: str = "demonstrations"
    demonstration_reward: float | None = None
    offline: str | None = None

    def check_off_policy(self, group_size: int) -> None:
        """Raise an InputError for options out of range, or that exclude each other."""
        if not (isinstance(self.replay_ratio, int | float) and 0 <= self.replay_ratio < float("inf")):
            raise InputError(f"replay_ratio={self.replay_ratio!r} must be a number of at least 0.")
        for name, least in (("replay_capacity", 1), ("replay_memory", 0), ("replay_max_age", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(f"{name}={value} must be at least {least}.")
        for name, kind in get_type_hints(OffPolicyConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise InputError(f"{name}={getattr(self, name)!r} is unknown: use one of {known}.")
        check_slots(self.demonstrations_per_group, group_size, self.demonstration_slots)
        if self.offline is not None and (self.replay_ratio or self.demonstrations_per_group):
            raise InputError(
                "offline trains on logged groups only: leave out replay_ratio and demonstrations_per_group "
                "(logged groups come again each epoch, and may have demonstrations among their completions)."
            )
