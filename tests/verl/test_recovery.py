"""A run that loses a process ends soon and says so; the next one goes on where the checkpoint was."""

import itertools
import json
import os
import re
import signal
import time
from collections import Counter

import psutil
import pytest

from tests.verl.harness import arguments, make_assets, replay, run, start, stop
from tests.verl.records import updates

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS, BATCH, PROMPTS = 6, 4, 24


def steps(metrics):
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        time.sleep(0.1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mode", "victim"),
    [
        ("sync", "AgentLoopWorkerTQ"),
        ("colocate_async", "WorkerDict"),
        ("separate_async", "HFServer"),
        ("separate_async", "TaskRunnerV1"),  # verl's trainer itself
    ],
)
def test_kill_9_of_a_ray_process_ends_the_run_and_the_next_one_resumes(tmp_path, mode, victim):
    assets = make_assets(tmp_path / "assets")
    metrics = tmp_path / "metrics.jsonl"
    settings = [
        "trainer.logger=[file]",
        "trainer.save_freq=1",
        "trainer.resume_mode=auto",
        f"data.shuffle={mode == 'sync'}",
        "data.seed=3",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.v1.trainer_mode={mode}",
        "trainer.v1.separate_async.parameter_sync_step=2",
    ]
    words = arguments(assets, tmp_path, *settings)
    process = start(words, tmp_path, VERL_FILE_LOGGER_PATH=str(metrics))
    try:
        wait_for(lambda: len(steps(metrics)) >= 2, 300, "two steps")
        family = psutil.Process(process.pid).children(recursive=True)
        found = [child for child in family if victim in _name(child)]
        os.kill(found[0].pid, signal.SIGKILL)
        assert process.wait(90) != 0
    finally:
        stop(process)
    printed = (tmp_path / "log.txt").read_text(errors="replace")
    assert re.search(r"gvpo: .* died", printed), printed[-4000:]
    assert re.search(r"gvpo: .*resume_mode=auto", printed), printed[-4000:]

    saved = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 2
    for file in (tmp_path / "updates").iterdir():
        if int(file.name.split("_")[1]) > saved:
            file.unlink()  # made after the checkpoint, and lost with the run
    metrics.unlink()
    printed = run(words, tmp_path, VERL_FILE_LOGGER_PATH=str(metrics))
    assert steps(metrics) == list(range(saved + 1, STEPS + 1))
    # Both halves together are one run of the formula: weights, optimizer and data went on where they were.
    done = replay(assets, updates(tmp_path / "updates"), beta=0.3, lr=0.05)
    assert [update.dump["step"] for update in done] == [s for s in range(1, STEPS + 1) for _ in range(2)]
    for update in done:
        assert update.dump["metrics"]["actor/grad_norm"] == pytest.approx(update.gradient_norm, rel=1e-3)
    if mode != "sync":
        assert_no_group_is_lost_or_trained_twice(printed, saved, [update.dump for update in done])


def assert_no_group_is_lost_or_trained_twice(printed, saved, dumps):
    (said,) = re.findall(rf"gvpo: resumed after step {saved} with (\d+) groups in flight", printed)
    assert int(said) == BATCH  # one batch is under way all the time
    prompts = [dict(zip(d["prompts"], d["input_ids"], strict=True)) for d in dumps]
    trained = [item for found in prompts for item in found.items()]
    assert len({prompt for prompt, _ in trained}) == len(trained) == STEPS * BATCH
    # All but the batch that is under way at the end, in the order of the data.
    submitted = Counter(i % PROMPTS for i in range((STEPS + 1) * BATCH))
    assert Counter(number(ids) for _, ids in trained) <= submitted


def number(ids):
    """The number that a prompt of `make_assets` begins with; its digits are the tokens from 4 on."""
    digits = itertools.takewhile(lambda token: 4 <= token < 14, ids[1:].tolist())
    return int("".join(str(token - 4) for token in digits))


def _name(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
