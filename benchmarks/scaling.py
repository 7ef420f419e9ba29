"""How a free step grows with rows, lengths, vocabulary and ranks."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Row, laps_of, minima
from benchmarks.workloads import PER_DEVICE, Workload
from gvpo.batch import GroupBatch
from gvpo.step import GVPOStep

ABOUT = (
    "CPU seconds of GVPOStep on a free step, one thread a rank, DDP over gloo for several ranks (then the "
    "slowest rank's; the ranks share the machine's cores)."
)

BASE = Workload(vocabulary=8_000, hidden=128, layers=2)
SCALES = {
    "rows": [replace(BASE, rows=n) for n in (32, 64, 128, 256, 512)],
    "mean length": [replace(BASE, mean_length=n, max_length=4 * n) for n in (16, 32, 64, 128, 256)],
    "vocabulary": [replace(BASE, vocabulary=n) for n in (2_000, 8_000, 32_000, 128_000)],
}


def _seconds(step: GVPOStep, batch: GroupBatch, repeats: int) -> tuple[float, int]:
    useful = 0

    def job() -> list[float]:
        nonlocal useful
        step.model.zero_grad(set_to_none=True)
        laps = laps_of(step)
        useful = step(batch).useful_tokens
        laps()
        return laps.seconds

    return minima({"step": job}, repeats)["step"], useful


def measure(scale: str, value: int, work: Workload, repeats: int) -> Row:
    step = GVPOStep(work.model(), token_budget=PER_DEVICE * (work.max_length + 32))
    seconds, useful = _seconds(step, work.batch(), repeats)
    return {
        "scale": scale,
        "value": value,
        "s": seconds,
        "useful tokens": useful,
        "µs per useful token": 1e6 * seconds / useful,
    }


def _rank(rank: int, world: int, folder: str, work: Workload, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    # In a function of its own: DDP must be gone before the group that it talks through.
    torch.save(_seconds_of_rank(rank, world, work, repeats), Path(folder) / str(rank))
    dist.destroy_process_group()


def _seconds_of_rank(rank: int, world: int, work: Workload, repeats: int) -> tuple[float, int]:
    whole = work.batch()
    mine = slice(rank * len(whole) // world, (rank + 1) * len(whole) // world)
    names = ("input_ids", "lengths", "completion_mask", "rewards", "group_ids")
    batch = GroupBatch(*(getattr(whole, name)[mine] for name in names))
    model = DistributedDataParallel(work.model())
    step = GVPOStep(model, token_budget=PER_DEVICE * (work.max_length + 32))
    return _seconds(step, batch, repeats)


def measure_ranks(world: int, work: Workload, repeats: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, work, repeats), nprocs=world)
        ranks = [torch.load(Path(folder) / str(rank)) for rank in range(world)]
    seconds, useful = max(s for s, _ in ranks), sum(tokens for _, tokens in ranks)
    return {
        "scale": "ranks",
        "value": world,
        "s": seconds,
        "useful tokens": useful,
        "µs per useful token": 1e6 * seconds / useful,
    }


def run(small: bool, repeats: int = 5) -> list[Row]:
    if small:
        work = replace(BASE, vocabulary=97, hidden=16, layers=1, rows=16, mean_length=8, max_length=24)
        return [measure("rows", 16, work, 1), measure_ranks(2, work, 1)]
    field = {"rows": "rows", "mean length": "mean_length", "vocabulary": "vocabulary"}
    rows = [
        measure(scale, getattr(work, field[scale]), work, repeats)
        for scale, works in SCALES.items()
        for work in works
    ]
    return rows + [measure_ranks(world, replace(BASE, rows=128), repeats) for world in (1, 2)]
