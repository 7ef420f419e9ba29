"""The second quickstart, with a chat model too small to learn; `tests/real` has the real one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gvpo.cli import main
from gvpo.errors import InputError
from gvpo.quickstart_llm import problems, quickstart_llm
from tests.test_quickstart import KEYS
from tests.trl.chat_model import save_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_chat_model(tmp_path_factory.mktemp("models") / "chat"))


def test_what_is_held_out_is_not_trained_on() -> None:
    training, held_out = problems(3)
    asked = [[row["prompt"][-1]["content"] for row in rows] for rows in (training, held_out)]
    assert [len(set(questions)) for questions in asked] == [96, 25]
    assert not set(asked[0]) & set(asked[1])
    for row in training + held_out:
        a, b = map(int, re.findall(r"\d+", row["prompt"][-1]["content"]))
        assert row["answer"] == str(a * b)
    assert problems(3) == (training, held_out)
    assert problems(4) != (training, held_out)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_another(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, whole, killed = torch.get_num_threads(), tmp_path / "whole", tmp_path / "killed"
    torch.set_num_threads(1)
    expected = quickstart_llm(model, output=whole, steps=6)
    said = capsys.readouterr().out
    for what in ("$ gvpo eval", "$ gvpo train --config", "$ gvpo report", "right answer", "Greedy accuracy"):
        assert what in said

    words = ["quickstart", "--llm", "--model", model, "--output", str(killed), "--steps", "6"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gvpo", *words],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while not any(killed.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (killed / "after").exists()
    summary = quickstart_llm(model, output=killed, steps=6)
    torch.set_num_threads(threads)

    a, b = (load_file(run / "model.safetensors") for run in (whole, killed))
    assert all(value.equal(b[name]) for name, value in a.items())
    assert summary is not None
    assert expected is not None
    assert summary.keys() == KEYS | {"intervals", "model"}
    timed = {"seconds_total", "seconds_generation", "seconds_update"}
    assert {k: v for k, v in summary.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
    for name in ("learning_curve.png", "report.html", "samples.json", "held_out.jsonl", "recipe.yaml"):
        assert (killed / name).stat().st_size > 0
    assert not list(killed.glob("checkpoint-*"))
    metrics = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "step_time" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if "reward" in line] == [1, 3, 5]  # of each rollout
    assert [line["step"] for line in metrics if "accuracy" in line] == [0, 6]

    # A finished run is shown again, and one with other settings is not mixed with it.
    made = (killed / "model.safetensors").stat().st_mtime_ns
    assert quickstart_llm(model, output=killed, steps=6) == summary
    assert (killed / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(InputError, match="holds a run of other settings: choose another --output"):
        quickstart_llm(model, 1, killed, steps=6)


def test_a_model_that_will_not_do_gets_one_sentence_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_chat_model(tmp_path / "plain", template=None)
    capsys.readouterr()
    for name, why in {
        str(tmp_path / "nowhere"): "there is no model at",
        str(plain): "has no chat template",
        "nobody/nothing": "has no tokenizer that can be loaded",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["quickstart", "--llm", "--model", name, "--output", str(tmp_path / "run")])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1
        assert not (tmp_path / "run").exists()
    model = str(save_chat_model(tmp_path / "chat"))
    with pytest.raises(InputError, match="GVPO needs a finite beta above 0"):
        quickstart_llm(model, output=tmp_path / "run", beta=0)
    assert not (tmp_path / "run").exists()


def test_options_of_the_other_quickstart_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--llm", "--task", "addition"], ["--model", "somewhere"]):
        with pytest.raises(SystemExit) as stopped:
            main(["quickstart", *words])
        assert stopped.value.code == 2
        assert "leave it out" in capsys.readouterr().err
