"""Kill a run with SIGKILL at random moments and resume it, many times; it must end as if never killed.

    make torture        # 200 kills, some minutes

The run samples, replays, saves a checkpoint after every step and uses AdamW with a schedule; what must agree
bitwise with a run that was never killed is its parameters, optimizer state and metrics. The kills come at
random moments of a run, so that some hit the start, some a step, some the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.measure import record
from tests.trl.test_checkpoints import assert_same_end, in_child, kill


def torture(world: int, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs of `world` processes `kills` times; raises AssertionError if one ends differently."""
    folder = Path(tempfile.mkdtemp(prefix="gvpo-torture-"))
    started = time.monotonic()
    child = in_child(folder / "whole", world)
    child.join()
    assert child.exitcode == 0
    seconds = time.monotonic() - started
    rng = random.Random(seed)
    compared = torn = 0
    for _ in track(range(kills), description=f"kills, {world} process(es)"):
        while True:
            child = in_child(folder / "killed", world)
            child.join(rng.uniform(0, 0.5 * seconds))
            if child.exitcode is None:
                break
            assert child.exitcode == 0
            assert_same_end(folder / "whole", folder / "killed")
            compared += 1
            shutil.rmtree(folder / "killed")
        kill(child)
        torn += (folder / "killed" / ".checkpoint-in-progress").exists()
    child = in_child(folder / "killed", world)
    child.join()
    assert child.exitcode == 0
    assert_same_end(folder / "whole", folder / "killed")
    shutil.rmtree(folder)
    return {
        "processes": world,
        "kills": kills,
        "kills_while_a_checkpoint_was_written": torn,
        "runs_that_came_to_their_end": compared + 1,
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-of-two", type=int, default=50, help="of runs of two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/torture.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [torture(1, options.kills, options.seed), torture(2, options.kills_of_two, options.seed)]
    record(options.output, {"seed": options.seed, "runs": runs})
    print(runs)


if __name__ == "__main__":
    main()
