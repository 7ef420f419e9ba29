"""The laptop run learns, through the command."""

import json
import subprocess
import sys

import pytest

from gvpo.samples import read_samples
from gvpo.verl import TRAINERS

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", TRAINERS)
def test_the_laptop_run_gains_forty_points(tmp_path, mode):
    output = tmp_path / "run"
    # Old responses take longer, and which are old is the machine's pace.
    steps = 10 if mode == "sync" else 16
    words = ["verl", "quickstart", "--output", str(output), "--trainer-mode", mode, "--steps", str(steps)]
    subprocess.run([sys.executable, "-m", "gvpo", *words], check=True)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.4
    # The quickstart's keys, and how many workers there were.
    assert summary.keys() == {
        "accuracy_before",
        "accuracy_after",
        "sampled_accuracy_after",
        "seconds_total",
        "seconds_generation",
        "seconds_update",
        "steps",
        "parameters",
        "beta",
        "seed",
        "workers",
    }
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # The initial reference needs no old policy, however stale the responses are.
    seconds = {
        name: sum(entry.get(f"timing_s/{name}", 0) for entry in logged) for name in ("old_log_prob", "ref")
    }
    assert seconds["old_log_prob"] < seconds["ref"] / 3
    assert [entry["step"] for entry in logged if "critic/score/mean" in entry] == list(
        range(1, summary["steps"] + 1)
    )
    assert [line["step"] for line in read_samples(output)] == list(range(summary["steps"]))
    for name in (
        "config.yaml",
        "held_out.jsonl",
        "samples.json",
        "learning_curve.png",
        "model/model.safetensors",
    ):
        assert (output / name).stat().st_size > 0
