"""SmolLM2-135M-Instruct under vLLM: engine and trainer through three updates, in two precisions."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from datasets import Dataset
from transformers import AutoTokenizer

from gvpo.errors import InputError
from gvpo.model.smollm2 import packaged_smollm2
from tests.vllm.engines import FLOAT32, learner
from tests.vllm.test_colocate import check_followed

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.real]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return packaged_smollm2()
    except InputError as why:
        pytest.skip(str(why))


def short_and_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(right in text) - len(text) / 100 for text, right in zip(texts, answer, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_engine_follows_a_real_model(dtype: str, smollm2: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
        for a in range(1, 7)
        for b in range(1, 5)
    ]
    with learner(
        smollm2,
        short_and_right,
        output_dir=str(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(smollm2),
        vllm_max_model_length=128,
        vllm_engine_kwargs=FLOAT32 | {"dtype": dtype},
        reference="rollout",
        optim="adamw_torch",
        learning_rate=1e-4,
        gradient_accumulation_steps=1,
        max_completion_length=16,
    ) as trainer:
        trainer.train()
    if dtype == "float32":
        check_followed(trainer.apart)
    else:  # bfloat16: rounding of a few tenths of a nat at most, which old weights exceed
        print("in half precision:", trainer.apart)
        assert all(now < 1 for now, _ in trainer.apart)
        assert trainer.apart[-1][1] > 3 * trainer.apart[-1][0]
