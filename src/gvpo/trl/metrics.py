"""What a step reports: each process's share, brought together in one place; and where its time went."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback

from gvpo.batch import GroupBatch, widest_float
from gvpo.step import StepReport


@dataclass(frozen=True)
class Share:
    """This process's share of a metric.

    Over all processes it is Σ total / Σ count; without a `count` Σ total; with `largest` the largest total.
    A metric whose counts add up to 0 is left out.
    """

    total: float
    count: float | None = None
    largest: bool = False


def gathered(
    shares: Mapping[str, Share], gather: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """The metrics over all processes, each of which gives the same names."""
    if not shares:
        return {}
    rows = [[share.total, 0.0 if share.count is None else share.count] for share in shares.values()]
    everyone = gather(torch.tensor([rows], dtype=widest_float(device), device=device))
    sums, most = everyone.sum(0).tolist(), everyone[:, :, 0].amax(0).tolist()
    found = {}
    for (name, share), (total, count), largest in zip(shares.items(), sums, most, strict=True):
        if share.count is None or count:
            found[name] = largest if share.largest else total if share.count is None else total / count
    return found


def shares_of(report: StepReport, batch: GroupBatch, *, with_trust: bool) -> dict[str, Share]:
    """What a step tells of this process's rows; `with_trust` also what the trust mask left out of them."""
    scored, beyond = report.scored_tokens, report.tokens_beyond_trust
    shares = {
        "gvpo/tokens": Share(float(batch.lengths.sum())),
        "entropy": Share(report.entropy * scored if scored else 0.0, scored),
        "gvpo/useful_token_fraction": Share(report.useful_tokens, report.tokens),
    }
    return shares | ({"gvpo/beyond_trust_fraction": Share(beyond, scored + beyond)} if with_trust else {})


PARTS = ("generation", "rewards", "reference", "scoring", "update", "other")
Method = TypeVar("Method", bound=Callable[..., Any])


class Timing(TrainerCallback):
    """Splits the wall time of optimizer steps among their parts, `profiling/…`, which add up to `step_time`.

    A step goes from its first rows to the optimizer's update. Time belongs to the innermost part; evaluation,
    checkpoints and loggers come between steps and do not count. Each process has its own times, in which it
    waits for others where it needs them; the main one's are logged.

    Args:
        metrics: where a step's numbers are appended, in seconds; `gvpo/tokens` is there by then.
        device: whose work is waited for where parts change.

    Attributes:
        total: seconds by part of all steps of this trainer.
    """

    def __init__(self, metrics: Mapping[str, list[float]], device: torch.device) -> None:
        self.metrics, self.device = metrics, device
        self.clock: Callable[[], float] = time.perf_counter
        self.seconds: dict[str, float] = {}
        self.total: Counter[str] = Counter()
        self._part: str | None = None  # None between steps
        self._since = 0.0

    def _turn(self, part: str | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.clock()
        if self._part is not None:
            self.seconds[self._part] += now - self._since
        self._part, self._since = part, now

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What is done inside belongs to `part`, if it is done in a step."""
        before = self._part
        if before is not None:
            self._turn(part)
        try:
            yield
        finally:
            if before is not None:
                self._turn(before)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds, self._part = dict.fromkeys(PARTS, 0.0), None
        self._turn("other")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._turn("update")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._turn("other")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turn(None)
        times, tokens = self.metrics["step_time"], self.metrics.get("gvpo/tokens", [])
        times.append(sum(self.seconds.values()))
        self.total.update(self.seconds)
        for part, seconds in self.seconds.items():
            self.metrics[f"profiling/{part}"].append(seconds)
        # Since the last log, of which the lists are: a mean of ratios would be another number.
        self.metrics["tokens_per_second"][:] = [sum(tokens) / sum(times)]


def timed(part: str) -> Callable[[Method], Method]:
    """A method of an object with a `timing: Timing`, whose time belongs to `part`."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.timing.during(part):
                return method(self, *args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
