"""`gvpo eval --backend vllm`: the completions that transformers gives, and an engine that is killed.

That engine is in our process: docs/upstream/vllm-killed-engine.md.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import vllm

from gvpo.evaluate.evaluation import _PARTS
from tests.trl.test_train import fails, run
from tests.vllm.engines import save_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

KILLED = """
import os, signal, sys
from gvpo.cli import main
from gvpo.evaluate.sampling import VLLMSampler

sample = VLLMSampler.sample
def fatal(self, texts, seed):
    return os.kill(os.getpid(), signal.SIGKILL) if seed else sample(self, texts, seed)
VLLMSampler.sample = fatal
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tied", initializer_range=0.4)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a:02d}+07", "answer": f"{a + 7}"} for a in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def own_engine() -> Iterator[None]:
    yield
    gc.collect()
    vllm.distributed.cleanup_dist_env_and_memory()


def command(model: Path, problems: Path, output: Path, *others: str) -> list[str]:
    return [
        "eval", "--model", str(model), "--data", str(problems), "--plain", "--reward", "exact",
        "--max-tokens", "16", "--dtype", "float32", "--output", str(output), *others,
    ]  # fmt: skip


def evaluate(*arguments: Any) -> list[dict[str, Any]]:
    run(command(*arguments))
    return pq.read_table(arguments[2] / "samples.parquet").to_pylist()


def test_greedy_completions_are_those_of_transformers(model: Path, problems: Path, tmp_path: Path) -> None:
    ours = evaluate(model, problems, tmp_path / "vllm", "--backend", "vllm")
    theirs = evaluate(model, problems, tmp_path / "transformers")
    assert ours == theirs
    assert {row["truncated"] for row in ours} == {True, False}


def test_a_killed_evaluation_goes_on(model: Path, problems: Path, tmp_path: Path) -> None:
    options = ("--backend", "vllm", "--batch-size", "8", "--samples", "2", "--temperature", "1")
    script = [sys.executable, "-c", KILLED, *command(model, problems, tmp_path / "cut", *options)]
    killed = subprocess.run(script, env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    parts = list((tmp_path / "cut" / _PARTS).iterdir())
    assert len(parts) == 1
    rows = evaluate(model, problems, tmp_path / "cut", *options)
    assert len(rows) == 24


def test_a_prompt_longer_than_the_model_is_one_sentence(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "7" * 200, "answer": "1"}))
    words = command(model, tmp_path / "long.jsonl", tmp_path / "out", "--backend", "vllm")
    assert "vLLM gives no completions (" in (line := fails(words, capfd))
    assert line.endswith("the same command goes on.")
