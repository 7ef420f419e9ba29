"""`router_aux_loss_coef` in a trainer: the whole window's balance, whatever micro-batches and processes."""

import copy
from typing import Any

import pytest
import torch

from gvpo.errors import InputError
from tests.gloo import run_ranks
from tests.models import relative_error
from tests.test_balance import BETA, COEFFICIENT, literal, tiny_mixture
from tests.trl.common import config, parameters, trainer

SETTINGS: dict[str, Any] = {"beta": BETA, "router_aux_loss_coef": COEFFICIENT, "max_grad_norm": 0.0}


def moved(*_: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """How far two steps with the same rollouts take each parameter; the first has a free reference."""
    model = tiny_mixture()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run = trainer(model=model, max_steps=2, num_iterations=2, **SETTINGS, **changes)
    run.train()
    return {name: value - before[name] for name, value in parameters(run).items()}


def test_a_step_is_that_of_the_formula_and_the_window_s_balance() -> None:
    model = tiny_mixture()
    before, seen = copy.deepcopy(model), []
    run = trainer(model=model, max_steps=1, micro_batch_tokens=50, **SETTINGS)
    window = run._gvpo_step.weigh
    run._gvpo_step.weigh = lambda batch: (seen.append(batch), window(batch))[1]  # type: ignore[method-assign]
    run.train()
    gradient, balance = literal(before, seen[0])
    start = dict(before.named_parameters())
    got = {name: (start[name].detach() - value) / 0.05 for name, value in parameters(run).items()}
    assert relative_error(got, gradient) < 1e-5
    assert run.state.log_history[0]["gvpo/aux_loss"] == pytest.approx(balance, rel=1e-6)


@pytest.mark.slow
def test_micro_batches_and_processes_change_nothing() -> None:
    expected = moved()
    for changes in (
        {"micro_batch_tokens": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16},
    ):
        assert relative_error(moved(**changes), expected) < 1e-5
    for got in run_ranks(of_rank, 2):
        assert relative_error(got, expected) < 1e-5


def of_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    return moved(per_device_train_batch_size=4)


def test_a_model_without_experts_and_a_coefficient_below_0_are_refused() -> None:
    with pytest.raises(InputError, match="has no router logits"):
        trainer(router_aux_loss_coef=0.1)
    with pytest.raises(InputError, match="must be a finite number of 0 or more"):
        config(router_aux_loss_coef=-0.1)
