"""`GVPOTrainer` with vLLM in its process: the engine follows the policy, whatever is trained and replayed.

What it takes on a CPU: docs/upstream/vllm-cpu-weights.md.
"""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from peft import LoraConfig

from gvpo.errors import InputError
from tests.trl.common import EOS, dataset
from tests.trl.test_offpolicy import demonstrated
from tests.vllm.engines import LENGTH, learner, save_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
ROUNDING = 1e-3  # nats a token, float32 on both sides: the promise. 1e-5 is what is measured.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tied")


def check_followed(apart: list[tuple[float, float]], generations: int = 4) -> None:
    """The engine has the weights of now, which are not those of the start."""
    print("nats a token at most, from the policy and from the initial one:", apart)
    assert len(apart) == generations
    assert max(now for now, _ in apart) < ROUNDING
    assert all(initial > 20 * ROUNDING for _, initial in apart[1:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_has_the_weights_of_every_update(tied: bool, model: Path, tmp_path: Path) -> None:
    folder = model if tied else save_model(tmp_path / "untied", tie_word_embeddings=False)
    with learner(folder, output_dir=str(tmp_path / "out")) as trainer:
        trainer.train()
        check_followed(trainer.apart)
        assert {len(row) for rows in trainer.sampled for row in rows} > {12}  # some are cut off, some end
        kinds = [entry.get("completions/clipped_ratio") for entry in trainer.state.log_history[:-1]]
        assert all(0 < share < 1 for share in kinds)


def test_adapters_are_merged_into_the_engine(model: Path, tmp_path: Path) -> None:
    adapters = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear")
    with learner(
        model, output_dir=str(tmp_path), peft_config=adapters, learning_rate=0.5, max_grad_norm=10.0
    ) as trainer:
        trainer.train()
        check_followed(trainer.apart)


def test_replay_and_demonstrations(model: Path, tmp_path: Path) -> None:
    with learner(
        model,
        output_dir=str(tmp_path),
        replay_ratio=1.0,
        demonstrations_per_group=2,
        train_dataset=demonstrated(),
        mask_truncated_completions=True,
    ) as trainer:
        trainer.train()
        check_followed(trainer.apart)
        log = trainer.state.log_history[:-1]
        assert [entry.get("replay/groups", 0) > 0 for entry in log] == [False, True, True, True]
        assert all(entry["demonstrations/rows"] > 0 for entry in log)


def test_completions_without_text(model: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(i % 2 + len(text)) for i, text in enumerate(completions)]

    kwargs = {"logit_bias": {EOS: 8.0}}
    with learner(model, reward, output_dir=str(tmp_path), max_steps=2, generation_kwargs=kwargs) as trainer:
        trainer.train()
        assert seen.count("") > len(seen) / 4
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:-1])


def test_a_prompt_that_does_not_fit_the_engine_is_one_sentence(model: Path, tmp_path: Path) -> None:
    long = dataset().map(lambda row: {"prompt": "a" * (LENGTH + 1)})
    with (
        learner(model, output_dir=str(tmp_path), train_dataset=long) as trainer,
        pytest.raises(InputError, match=r"vLLM does not take .*vllm_max_model_length"),
    ):
        trainer.train()


def test_arguments_that_vllm_does_not_know(model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"vllm_engine_kwargs=.*colour"),
        learner(model, output_dir=str(tmp_path), vllm_engine_kwargs={"colour": "red"}),
    ):
        pass
