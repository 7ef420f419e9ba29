"""Trainer and rollout pools in simulated time (SimPy): how fast they are, and how stale what is trained on.

An *engine* decodes up to `slots` rows side by side and takes the next one when one ends. Rows come in groups
of k; a complete group waits for the trainer, which takes `groups` of them an update, oldest first.
Groups that are under way or wait are `(ahead + 1) × groups` at most: with `ahead` 0 that is synchronous
training, else how many updates generation may run ahead (AReaL's η, arXiv 2505.24298). After an update an
engine loads the new weights at its next stop, fills its cache again, and goes on with the rows that it has.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import simpy

STOP = 64  # tokens after which an engine looks for new rows and weights, at the latest


@dataclass(frozen=True)
class Pools:
    """What the pools are and how long their work takes.

    Attributes:
        engines, slots: rollout engines, and rows that one decodes side by side.
        groups, k: groups of an update, rows of a group.
        ahead: updates that generation may run ahead of training.
        decode: seconds to decode one token of each of n rows that have so many tokens of context together.
        prefill: seconds in which an engine reads so many tokens.
        train: seconds of an update on rows that have so many tokens together.
        load: seconds that new weights take, of an engine and of the trainer.
        prompt: tokens of each prompt.
        shared: engines and trainer have the same GPUs, and engines stand still while it works.
    """

    engines: int
    slots: int
    groups: int
    k: int
    ahead: int
    decode: Callable[[int, float], float]
    prefill: Callable[[float], float]
    train: Callable[[float], float]
    load: float = 0.0
    prompt: int = 0
    shared: bool = False


@dataclass
class Row:
    length: int
    group: Group
    first: int = -1  # the version that sampled its first token
    last: int = -1


@dataclass
class Group:
    rows: list[Row] = field(default_factory=list)
    missing: int = 0


@dataclass(frozen=True)
class Outcome:
    """Means over the updates that count.

    Attributes:
        seconds: from one update to the next.
        tokens: generated tokens of an update.
        trainer, rollout: share of the time in which they work.
        lag, lag_max: updates between the weights of a row's first token and those that it is trained on.
        spanning: share of rows whose tokens come from more than one version.
        mixed: share of groups with more than one version.
    """

    seconds: float
    tokens: float
    trainer: float
    rollout: float
    lag: float
    lag_max: int
    spanning: float
    mixed: float


def simulate(
    pools: Pools, draw: Callable[[], list[int]], *, updates: int = 20, warm_up: int | None = None
) -> Outcome:
    """Run `warm_up` updates (twice `ahead`, and 3, by default), then the `updates` that count.

    Args:
        pools: as above.
        draw: the lengths in tokens of the next group's k rows; what it draws makes the run random.
    """
    warm_up = 2 * pools.ahead + 3 if warm_up is None else warm_up
    run = _Run(pools, draw)
    run.environment.run(run.environment.process(run.trainer(warm_up)))
    started, work, trained = run.environment.now, run.generating, run.training
    run.consumed.clear()
    run.environment.run(run.environment.process(run.trainer(updates)))
    seconds = run.environment.now - started
    lags = [version - row.first for version, group in run.consumed for row in group.rows]
    rows = [row for _, group in run.consumed for row in group.rows]
    versions = [{v for row in group.rows for v in (row.first, row.last)} for _, group in run.consumed]
    return Outcome(
        seconds=seconds / updates,
        tokens=sum(row.length for row in rows) / updates,
        trainer=(run.training - trained) / seconds,
        rollout=(run.generating - work) / (seconds * pools.engines),
        lag=sum(lags) / len(lags),
        lag_max=max(lags),
        spanning=sum(row.first != row.last for row in rows) / len(rows),
        mixed=sum(len(seen) > 1 for seen in versions) / len(versions),
    )


class _Engine:
    def __init__(self, run: _Run) -> None:
        self.run, self.waiting = run, deque[Row]()
        self.version = 0
        self.decoding: list[
            tuple[float, int, Row]
        ] = []  # a heap by where a row ends, in tokens since the start
        self.wake = run.environment.event()
        self.gpu = simpy.Resource(run.environment)  # the trainer's, too, where all GPUs are shared

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.decoding)

    def give(self, row: Row) -> None:
        self.waiting.append(row)
        if not self.wake.triggered:
            self.wake.succeed()

    def work(self) -> Generator[simpy.Event, None, None]:
        run, pools, clock = self.run, self.run.pools, self.run.environment
        decoded, context, admitted = 0.0, 0.0, 0
        while True:
            if not self.load:
                self.wake = clock.event()
                yield self.wake
            turn = self.gpu.request()
            yield turn
            stall = 0.0
            if self.version != run.version:
                self.version, stall = run.version, pools.load + pools.prefill(context)
            while self.waiting and len(self.decoding) < pools.slots:
                row = self.waiting.popleft()
                row.first, admitted = self.version, admitted + 1
                heapq.heappush(self.decoding, (decoded + row.length, admitted, row))
                context += pools.prompt
                stall += pools.prefill(pools.prompt)
            n = len(self.decoding)
            tokens = min(self.decoding[0][0] - decoded, STOP)
            seconds = stall + tokens * pools.decode(n, context + n * tokens / 2)
            yield clock.timeout(seconds)
            self.gpu.release(turn)
            run.generating += seconds
            decoded, context = decoded + tokens, context + n * tokens
            while self.decoding and self.decoding[0][0] <= decoded:
                row = heapq.heappop(self.decoding)[2]
                row.last, context = self.version, context - pools.prompt - row.length
                run.end(row)


class _Run:
    def __init__(self, pools: Pools, draw: Callable[[], list[int]]) -> None:
        self.pools, self.draw = pools, draw
        self.environment = simpy.Environment()
        self.version, self.generating, self.training = 0, 0.0, 0.0
        self.consumed: list[tuple[int, Group]] = []  # with the version that was trained on it
        self.complete = simpy.Store(self.environment)
        self.engines = [_Engine(self) for _ in range(pools.engines)]
        for engine in self.engines:
            self.environment.process(engine.work())
        self.submit((pools.ahead + 1) * pools.groups)

    def submit(self, groups: int) -> None:
        """Each row goes to the engine that has least to do."""
        for _ in range(groups):
            group = Group()
            group.rows = [Row(length, group) for length in self.draw()]
            group.missing = len(group.rows)
            for row in group.rows:
                min(self.engines, key=lambda engine: engine.load).give(row)

    def end(self, row: Row) -> None:
        row.group.missing -= 1
        if not row.group.missing:
            self.complete.put(row.group)

    def trainer(self, updates: int) -> Generator[simpy.Event, simpy.Event, None]:
        for _ in range(updates):
            batch: list[Group] = []
            for _ in range(self.pools.groups):
                batch.append((yield self.complete.get()))  # type: ignore[arg-type]
            self.consumed += [(self.version, group) for group in batch]
            tokens = sum(row.length + self.pools.prompt for group in batch for row in group.rows)
            seconds = self.pools.train(tokens) + self.pools.load
            gpus = [engine.gpu for engine in self.engines] if self.pools.shared else []
            turns = [gpu.request() for gpu in gpus]
            yield self.environment.all_of(turns)
            yield self.environment.timeout(seconds)
            self.training += seconds
            self.version += 1
            for gpu, turn in zip(gpus, turns, strict=True):
                gpu.release(turn)
            self.submit(self.pools.groups)
