"""The main job in a minute."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo import quickstart, sums
from gvpo.cli import main
from gvpo.errors import InputError

KEYS = {
    "accuracy_before", "accuracy_after", "sampled_accuracy_after", "seconds_total", "seconds_generation",
    "seconds_update", "steps", "parameters", "beta", "seed",
}  # fmt: skip


@pytest.mark.slow
def test_quickstart_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--seed", "1"])
    assert stopped.value.code == 0
    run = tmp_path / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == KEYS
    assert summary["accuracy_before"] < 0.5
    assert summary["accuracy_after"] >= 0.97
    assert summary["seed"] == 1
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")

    # The figures are the saved models', not somebody's word.
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    for folder, key in (("warmed-up-model", "accuracy_before"), ("model", "accuracy_after")):
        model = AutoModelForCausalLM.from_pretrained(run / folder)
        tokenizer = AutoTokenizer.from_pretrained(run / folder, padding_side="left")
        given = sums.answers(model, tokenizer, [row["prompt"] for row in held_out])
        right = sum(a == row["answer"] for a, row in zip(given, held_out, strict=True))
        assert right / len(held_out) == summary[key]

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [entry["accuracy"] for entry in metrics if "accuracy" in entry]
    assert accuracies[0] == summary["accuracy_before"]
    assert accuracies[-1] == summary["accuracy_after"]
    assert all({"gvpo/explained_variance", "gvpo/kl"} <= entry.keys() for entry in metrics if "loss" in entry)


@pytest.mark.slow
def test_same_seed_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "WARMUP_STEPS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ends = []
    for name in ("a", "b"):
        quickstart.quickstart("subtraction", 5, tmp_path / name, steps=2)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        ends.append(model.state_dict())
    torch.set_num_threads(threads)
    assert all(value.equal(ends[1][name]) for name, value in ends[0].items())


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another"):
        quickstart.quickstart(output=tmp_path / "file" / "run")
