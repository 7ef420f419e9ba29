"""What of vLLM's settings and failures can be told without it; with it, see tests/vllm."""

from pathlib import Path
from typing import Any

import pytest
import requests
from trl.generation import vllm_generation

from gvpo.errors import InputError
from gvpo.trl.vllm import engine_errors, engine_of
from tests.trl.common import config

COLOCATED: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate"}


@pytest.mark.parametrize("others", [{}, {"use_vllm": True, "vllm_mode": "server"}])
def test_engine_arguments_are_for_an_engine_of_ours(others: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vllm_engine_kwargs are for use_vllm"):
        config(output_dir=str(tmp_path), vllm_engine_kwargs={"dtype": "float32"}, **others)


def test_engine_arguments_come_before_trl_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(model: str, seed: int = 0, dtype: str = "auto") -> tuple[str, int, str]:
        return model, seed, dtype

    monkeypatch.setattr(vllm_generation, "LLM", engine, raising=False)
    own = '{"dtype": "float32", "seed": 7}'  # as on the command line
    with engine_of(config(output_dir=str(tmp_path), vllm_engine_kwargs=own, **COLOCATED)):
        assert vllm_generation.LLM(model="m", seed=1) == ("m", 7, "float32")
        with pytest.raises(InputError, match=r"does not suit vLLM .*colour"):
            vllm_generation.LLM(model="m", colour="red")
    assert vllm_generation.LLM is engine


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (requests.ConnectionError("refused"), r"server is gone \(refused\): .* there is no checkpoint yet"),
        (Exception("Request failed: 400, prompt too long"), "vLLM does not take the prompts"),
    ],
)
def test_failures_of_a_server_are_one_sentence(error: Exception, sentence: str, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=sentence),
        engine_errors(config(output_dir=str(tmp_path), **COLOCATED)),
    ):
        raise error


def test_other_failures_are_shown_as_they_are(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="ours"),
        engine_errors(config(output_dir=str(tmp_path), **COLOCATED)),
    ):
        raise RuntimeError("ours")
