"""A process that dies takes the others along, in bounded time and by name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from tests.trl.common import digit_reward, trainer
def reward(completions, trainer_state, **_):
    if trainer_state.global_step == 2:
        open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
        if os.environ["RANK"] == "1":
            import time; time.sleep(600)
    return digit_reward(completions)
trainer(rewards=reward, output_dir=sys.argv[1], per_device_train_batch_size=4, max_steps=50).train()
"""


@pytest.mark.slow
def test_death_of_one_rank_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    run = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29763",
            str(script), str(tmp_path / "out"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    victim = tmp_path / "pid-1"
    deadline = time.monotonic() + 240
    while not (victim.exists() and victim.read_text()):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(int(victim.read_text()), signal.SIGKILL)
    _, errors = run.communicate(timeout=90)
    assert run.returncode != 0
    assert "rank      : 1" in errors
    assert "SIGKILL" in errors
    for pid in tmp_path.glob("pid-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
