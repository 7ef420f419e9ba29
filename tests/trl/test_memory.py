"""Running out of memory in generation, and how much was taken."""

from pathlib import Path

import pytest
import torch

from gvpo.trl import GVPOTrainer
from gvpo.trl.memory import Portions, memory_shares
from gvpo.trl.metrics import gathered
from tests.trl.common import trainer


def sampler(limit: int, calls: list[int]):
    def sample(rows, *, suffix):
        calls.append(len(rows))
        if len(rows) > limit:
            raise torch.OutOfMemoryError("injected")
        return [[*row, suffix] for row in rows], None

    return sample


def test_portions_halve_until_they_fit_keep_the_order_and_creep_back() -> None:
    portions, calls, prompts = Portions(), [], [[i] for i in range(20)]
    with pytest.warns(UserWarning, match="goes on with 5 responses at a time"):
        got, logps = portions(sampler(7, calls), prompts, suffix=9)
    assert (got, logps) == ([[i, 9] for i in range(20)], None)
    assert calls == [20, 10, 5, 5, 5, 5]
    calls.clear()
    for _ in range(40):  # 5 · 1.01⁴⁰ > 7
        portions(sampler(20, calls), prompts, suffix=9)
    assert calls[0] == 5
    assert calls[-1] in (6, 7)


@pytest.mark.filterwarnings("ignore:Out of memory in generation")
def test_a_single_row_that_does_not_fit_and_other_errors_pass_through() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Portions()(sampler(0, []), [[1], [2], [3]], suffix=9)

    def broken(rows):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        Portions()(broken, [[1], [2]])


def test_the_trainer_generates_in_portions_after_resuming_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    made = trainer(GVPOTrainer, max_steps=1, **settings)
    original, calls = made.model.generate, []

    def generate(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] > 16:
            raise torch.OutOfMemoryError("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(made.model, "generate", generate)
    with pytest.warns(UserWarning, match="Out of memory in generation"):
        made.train()
    assert calls == [32, 16, 16]
    assert made.state.log_history[0]["gvpo/groups"] == 8
    again = trainer(GVPOTrainer, max_steps=2, **settings)
    again.train(resume_from_checkpoint=True)  # which random numbers are drawn depends on the portions
    assert again._portions.most == pytest.approx(16 * 1.01)


def test_the_update_keeps_to_what_memory_allowed_and_creeps_back() -> None:
    made = trainer(max_steps=3, micro_batch_tokens=200)
    backward, budgets = made._gvpo_step.backend.backward, []

    def fails_once(loss: torch.Tensor, *, last: bool) -> None:
        budgets.append(made._gvpo_step.token_budget)
        if len(budgets) == 1:
            raise torch.OutOfMemoryError("injected")
        backward(loss, last=last)

    made._gvpo_step.backend.backward = fails_once  # type: ignore[method-assign]
    made.train()
    assert list(dict.fromkeys(budgets)) == [200, 100, 101]  # 100 and then 100 · 1.01


def test_memory_is_that_of_the_fullest_gpu_or_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 30 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 40 * 2**30))
    monkeypatch.setattr("gvpo.trl.memory.memory", lambda: (6 * 2**30, 24 * 2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def of_two_processes(kind: str, other: tuple[float, float]) -> list[float]:
        rest = torch.tensor([[[other[0], 0.0], [other[1], 0.0 if kind == "cuda" else 12 * 2**30]]])
        shares = memory_shares(torch.device(kind))
        return list(gathered(shares, lambda mine: torch.cat([mine, rest]), torch.device("cpu")).values())

    assert of_two_processes("cuda", (20.0, 0.5)) == [30.0, 0.75]
    assert of_two_processes("cpu", (3.0, 3 * 2**30)) == [9.0, 9 / 24]
