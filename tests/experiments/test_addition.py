"""The small language model's log-probabilities and samples; foreign and reuse on it, very shortly."""

from pathlib import Path

import pytest
import torch

from experiments import addition, foreign, reuse
from experiments.comparison import TUNING_SEED, Scale
from gvpo.errors import InputError
from gvpo.sums import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model(make_tokenizer()).double()


def prompts_and_answers(texts: list[str], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = make_tokenizer()
    return torch.tensor(tokenizer(texts)["input_ids"]), torch.tensor(tokenizer(answers)["input_ids"])


def test_log_probs_of_a_shared_prompt_are_those_of_whole_rows(model) -> None:
    prompts, answers = prompts_and_answers(
        ["<bos>12+34=", "<bos>55+66="], ["640<eos>", "11<eos><pad>", "121<eos>", "0000"]
    )
    logps = addition.token_logps(model, prompts, answers, 2)
    rows = torch.cat([prompts.repeat_interleave(2, 0), answers], 1)
    whole = model(rows).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    expected = whole.gather(2, answers[:, :, None])[:, :, 0]
    expected[1, 3] = 0  # behind the end
    torch.testing.assert_close(logps, expected)
    (got,) = torch.autograd.grad(logps.sum(), model.lm_head.weight)
    (want,) = torch.autograd.grad(expected.sum(), model.lm_head.weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)  # the norms are in float32


def test_samples_follow_the_model_and_stop_at_the_end(model) -> None:
    prompts, _ = prompts_and_answers(["<bos>12+34="], ["640<eos>"])
    generator = torch.Generator().manual_seed(0)
    drawn = addition.sample(model, prompts, 4000, generator)
    p = model(prompts).logits[0, -1].softmax(-1)
    frequency = drawn[:, 0].bincount(minlength=len(p)) / len(drawn)
    torch.testing.assert_close(frequency.double(), p.detach(), atol=0.03, rtol=0)
    inside = addition.not_ended(drawn)
    assert inside[:, 0].all()
    assert (drawn[~inside] == make_tokenizer().pad_token_id).all()
    greedy = addition.sample(model, prompts, 1, generator, greedy=True)
    assert greedy[0, 0] == p.argmax()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [foreign, reuse])
def test_an_experiment_runs_from_models_to_picture(
    experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hardly any updates: that all arms run, and that a seed repeats itself."""
    scale = Scale.of(2, quick=True)
    policy, other = addition.warmed_up(0, 0.6, 5), addition.warmed_up(1, 0.6, 5)
    models = {"policy": policy.state_dict(), "other": other.state_dict(), "steps": 150}
    torch.save(models, tmp_path / "models.pt")
    monkeypatch.setattr(foreign, "steps", lambda scale: 1)
    monkeypatch.setattr(reuse, "rollouts", lambda scale: 1)
    experiment.prepare(scale, tmp_path)
    records = [r for job in experiment.jobs(scale) for r in experiment.run_job(job, scale, tmp_path)]
    found = experiment.summary(records, scale, tmp_path)
    assert {row["arm"] for row in found["rows"]} == {arm.name for arm in experiment.arms(scale)}
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in found["rows"])
    again = experiment.run_job(experiment.jobs(scale)[0], scale, tmp_path)
    assert again == records[: len(again)]
    assert again[0].seed == TUNING_SEED
    experiment.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert experiment.tables(found)


def test_runs_without_the_models_that_they_started_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"models\.pt is missing"):
        addition.load(tmp_path, "policy")
