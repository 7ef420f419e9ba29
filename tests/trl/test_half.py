"""float16: accelerate scales losses on GPUs only, so the scaler that it would make is put in by hand here."""

import itertools
import warnings
from typing import Any

import pytest
import torch

from gvpo.errors import NonFiniteError
from gvpo.trl import GVPOTrainer
from tests.trl.common import CannedTrainer, digit_reward, distance, parameters, trainer


class HalfTrainer(CannedTrainer):
    """Autocast and a loss scaler as on a GPU; remembers parameters and scales before and after each step."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        assert self.accelerator.mixed_precision == "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler(self.accelerator.device.type, init_scale=2.0**10)
        self.seen: list[dict[str, torch.Tensor]] = []
        self.scales: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.accelerator.sync_gradients:
            self.seen.append(parameters(self))
            self.scales.append(self.accelerator.scaler.get_scale())
        return super().training_step(*args, **kwargs)

    def moved(self) -> list[bool]:
        states = [*self.seen, parameters(self)]
        return [
            not all(v.equal(after[n]) for n, v in before.items())
            for before, after in itertools.pairwise(states)
        ]


def half(**changes: Any) -> HalfTrainer:
    made = trainer(HalfTrainer, fp16=True, optim="adamw_torch", learning_rate=0.01, **changes)
    assert isinstance(made, HalfTrainer)
    return made


def test_updates_are_near_those_of_float32() -> None:
    made = half(reference="initial", max_steps=3)
    made.train()
    single = trainer(optim="adamw_torch", learning_rate=0.01, reference="initial", max_steps=3)
    single.train()
    assert made.moved() == [True] * 3
    assert 0 < distance(parameters(made), parameters(single)) < 0.2


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_without_a_usable_group_is_no_step(clip: float, fused: bool) -> None:
    def rewards(completions: list[str], **_: Any) -> list[float | None]:
        if made.state.global_step == 1:
            return [1.0 if i % 8 == 0 else None for i in range(len(completions))]
        return digit_reward(completions)  # type: ignore[return-value]

    made = half(rewards=rewards, max_grad_norm=clip)
    if fused:
        made.args.optim = "adamw_torch_fused"  # the scaler asks such optimizers to look for infinities
    with pytest.warns(UserWarning, match="makes no update"):
        made.train()
    assert made.moved() == [True, False, True]
    assert made.scales == [2.0**10] * 3
    assert {float(state["step"]) for state in made.optimizer.state.values()} == {2.0}


def fail_at(made: GVPOTrainer, steps: set[int]) -> None:
    """Log-probabilities that are not finite."""
    original = made._gvpo_step.weigh

    def weigh(batch: Any) -> Any:
        if made.state.global_step in steps:
            raise NonFiniteError("policy_logps is nan in row 0.")
        return original(batch)

    made._gvpo_step.weigh = weigh  # type: ignore[method-assign]


def test_a_bad_step_is_skipped() -> None:
    made = half()
    fail_at(made, {1})
    with pytest.warns(UserWarning, match="Step 1 is skipped: policy_logps is nan"):
        made.train()
    assert made.moved() == [True, False, True]
    assert made.scales == [2.0**10] * 3


def test_bad_gradients_are_the_scaler_s() -> None:
    made = half()
    weight = list(made.model.parameters())[1]
    weight.register_hook(lambda g: g * torch.inf if made.state.global_step == 1 else g)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Step 1 is skipped")
        made.train()
    assert made.moved() == [True, False, True]
    assert made.scales == [2.0**10, 2.0**10, 2.0**9]
