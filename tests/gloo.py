"""Run a function on several gloo processes, as a test needs it: real ranks, bounded time, errors shown."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def start_rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Run `function(rank, world, *args)` as a rank; `folder` is where the ranks meet."""
    torch.set_num_threads(1)
    # What torchrun would set, for accelerate.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = function(rank, world, *args)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world: int, *args: Any, seconds: float = 120) -> list[Any]:
    """What `function(rank, world, *args)` returned on each rank. `function` must be importable."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        # Ranks start from a server that has imported what most of them need.
        mp.set_forkserver_preload(["gvpo.trl", "tests.trl.common"])
        context: Any = mp.start_processes(
            start_rank, (world, folder, function, args), nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + seconds
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{world} ranks did not end within {seconds} s")
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]
