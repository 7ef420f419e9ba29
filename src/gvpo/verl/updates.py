"""All updates for one rollout, the same whatever verl: score, weigh, update, for each mini-batch of prompts.

A version of verl brings the calls that reach its workers (`Workers`). The driver decides everything else, so
that all workers make an update or none does.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Float
from omegaconf import DictConfig, open_dict
from torch import Tensor

from gvpo.errors import InputError, NonFiniteError
from gvpo.run import replaced
from gvpo.verl.rollouts import Rollouts, weigh
from gvpo.verl.settings import Settings

REPLAYED = "replay"  # how the names of prompts begin whose groups are replayed

# Values of the workers' surrogate −Σ w S and of the KL term with coefficient 0: they mean nothing here.
_SURROGATES = ("actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/kl_coef")


class Workers(Protocol):
    """A rollout in the hands of verl's workers; `rows` are numbers of rows of its `Rollouts`."""

    rollouts: Rollouts

    def score(self, rows: Sequence[int]) -> Float[Tensor, "rows"]:
        """S of these rows under the current policy, in nats."""

    def update(self, rows: Sequence[int], weights: Float[Tensor, "rows"]) -> dict[str, float]:
        """One optimizer update with the gradient of −Σ w S; verl's metrics of it."""

    def record(self, rows: Sequence[int]) -> dict[str, list[Tensor]]:
        """What else is kept of each row: `input_ids`, `responses`, `response_mask` without padding."""


class Updates:
    """Makes the updates of a run.

    Attributes:
        bad_in_a_row: updates skipped since the last that was made.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bad_in_a_row = 0
        self._recorded = 0

    def mini_batches(self, prompts: Mapping[str, list[int]], step: int) -> Iterator[list[int]]:
        """The rows of each mini-batch of a step, epoch after epoch; the last of an epoch holds what remains.

        Prompts come in the order of the data, or in a random one for each `step` and epoch. Those whose names
        begin with `REPLAYED` are shared out, so that a step has as many updates with and without them.
        """
        size, shuffle = self.settings.mini_batch, self.settings.shuffle
        replayed = [name for name in prompts if name.startswith(REPLAYED)]
        names = [name for name in prompts if not name.startswith(REPLAYED)]
        generator, parts = torch.Generator().manual_seed(self.settings.seed + step), -(-len(names) // size)
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(names), generator=generator).tolist() if shuffle else range(len(names))
            for part in range(parts):
                mine = [names[i] for i in order[part * size : (part + 1) * size]]
                mine += replayed[part * len(replayed) // parts : (part + 1) * len(replayed) // parts]
                yield [row for name in mine for row in prompts[name]]

    def run(self, step: int, prompts: Mapping[str, list[int]], workers: Workers) -> dict[str, float]:
        """Make all updates of a step, but skip those with numbers that are not finite.

        Returns means of their metrics, of the learning rate the last.

        Raises:
            InputError: `max_bad_steps` updates in a row had to be skipped.
        """
        done: list[dict[str, float]] = []
        passes = skipped = 0
        moved = False  # since the step began
        for rows in self.mini_batches(prompts, step):
            mini = workers.rollouts.take(rows)
            policy = torch.full_like(mini.start, math.nan) if moved else mini.start.clone()
            if len(unknown := policy.isnan().nonzero()[:, 0]):
                policy[unknown] = workers.score([rows[i] for i in unknown])
                passes += 1
            try:
                weights, result = weigh(mini, policy, self.settings.beta)
                moved = True
                metrics = workers.update(rows, weights * self.settings.scale)
                if not math.isfinite(norm := metrics.get("actor/grad_norm", 0.0)):
                    raise NonFiniteError(f"the gradient's norm is {norm}")
            except NonFiniteError as error:
                skipped += 1
                why = str(error).partition(":")[0]  # what, without advice for other callers
                self._skip(step, why, mini, {"policy_logp": policy, **workers.record(rows)})
                continue
            self.bad_in_a_row = 0
            metrics = {name: value for name, value in metrics.items() if name not in _SURROGATES}
            metrics |= {f"gvpo/{name}": value.item() for name, value in result.metrics.items()}
            metrics |= by_age(mini, policy, self.settings.beta)
            metrics["actor/loss"] = metrics["gvpo/loss"]
            if self.settings.dump_dir:
                columns = {"policy_logp": policy, "weight": weights, **workers.record(rows)}
                self._record(self.settings.dump_dir, step, mini, columns, metrics=metrics)
            done.append(metrics)
        counts = {"updates": len(done), "scoring_passes": passes, "steps_skipped": skipped}
        return _summarise(done) | {f"gvpo/{name}": float(count) for name, count in counts.items()}

    def _skip(self, step: int, why: str, mini: Rollouts, columns: Mapping[str, Any]) -> None:
        """Keep what the update would have been made of, and raise an InputError if it is one too many."""
        self.bad_in_a_row += 1
        try:
            path = self._record(self.settings.incidents_dir, step, mini, columns, why=why)
            kept = f"its inputs are kept in {path}"
        except OSError as error:  # of two evils the smaller
            kept = f"its inputs cannot be kept ({error})"
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            raise InputError(
                f"{self.bad_in_a_row} updates in a row, the last at step {step}, had numbers that are not "
                f"finite ({why}): lower actor_rollout_ref.actor.optim.lr or raise gvpo.beta, and look at "
                f"gvpo/kl and actor/entropy before that; {kept}."
            )
        warnings.warn(f"An update of step {step} is skipped: {why}; {kept}.", stacklevel=2)

    def _record(
        self, folder: str, step: int, mini: Rollouts, columns: Mapping[str, Any], **facts: Any
    ) -> Path:
        """Write what an update was made of, a row each, as Parquet whose metadata holds the facts."""
        table = pyarrow.table(
            {
                "prompt": mini.prompts,
                "session": [session for _, session in mini.sessions],
                "reward": mini.rewards.tolist(),
                "reference_logp": mini.reference.tolist(),
                **{name: [value.tolist() for value in values] for name, values in columns.items()},
            }
        ).replace_schema_metadata({"facts": json.dumps({"step": step, **facts})})
        self._recorded += 1
        path = Path(folder) / f"update_{step:06d}_{self._recorded:04d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as aside:
            pyarrow.parquet.write_table(table, aside)
        return path


def by_age(mini: Rollouts, policy: Float[Tensor, "rows"], beta: float) -> dict[str, float]:
    """KL and explained variance of the groups 0, 1, 2–3, 4–7, … updates old, where not all are fresh."""
    found: dict[str, float] = {}
    classes = torch.where(mini.ages > 0, 2 ** mini.ages.clamp(min=1).log2().floor().long(), 0)
    for age in classes.unique().tolist() if mini.ages.any() else []:
        rows = (classes == age).nonzero()[:, 0].tolist()
        metrics = weigh(mini.take(rows), policy[rows], beta)[1].metrics
        found |= {f"gvpo/{name}/age_{age}": metrics[name].item() for name in ("kl", "explained_variance")}
    return found


def _summarise(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean over the updates, of the learning rate the last; NaN says that an update has no value."""
    summary = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [value for update in updates if not math.isnan(value := update.get(name, math.nan))]
        if values:
            summary[name] = values[-1] if name == "actor/lr" else sum(values) / len(values)
    return summary


def count_updates(config: DictConfig, settings: Settings, rollouts: int) -> None:
    """Tell verl's scheduler, in place, that it is stepped at each update and not at each of the rollouts."""
    updates = settings.updates_per_step(config.data.train_batch_size)
    optim = config.actor_rollout_ref.actor.optim
    with open_dict(config):
        optim.total_training_steps = rollouts * updates
        for name in ("lr_warmup_steps", "lr_decay_steps", "lr_wsd_decay_steps"):  # the latter are Megatron's
            if (optim.get(name, None) or -1) > 0:
                optim[name] *= updates
