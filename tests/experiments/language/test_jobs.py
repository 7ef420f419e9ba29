"""Every method trains from the same start with as many samples, and a run that was cut goes on."""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from experiments.language import jobs, methods
from experiments.language.jobs import Job, Options, Worker, plan, result, tuned_rate
from experiments.language.methods import METHODS, Method, make_trainer
from experiments.language.report import SOURCES
from experiments.language.run import collect, run
from experiments.language.tasks import TASKS, Task
from gvpo.cli import main as cli
from gvpo.errors import InputError
from tests.models import tiny_model
from tests.trl.common import CHARACTERS, tokenizer

LETTERS = Task(
    "letters",
    tuple(CHARACTERS[:56]),
    4,
    lambda key: [key],
    lambda text, key: text[:1].isdigit() or text[:1].isupper(),
    tokens=4,
    demonstrations=lambda _, key: ["7", "B"],
)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """A tiny model whose task is to begin with a digit or a capital, which half of its answers do."""
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tiny_model().save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(TASKS, "letters", LETTERS)
    (tmp_path / "out" / "jobs").mkdir(parents=True)
    return Options(
        str(tmp_path / "model"), tmp_path / "out", updates=16, rows=32, samples=32, start_rounds=4, seeds=2,
        tasks=("letters",), rates=(3e-3,),
    )  # fmt: skip


@pytest.mark.slow
def test_every_method_learns_from_the_same_number_of_samples(options: Options) -> None:
    worker = Worker(options, time.time() + 600)
    start = worker.evaluate(worker.start, "letters")["reward"]
    before = [parameter.clone() for parameter in worker.start.parameters()]
    logger = next(job for job in plan(options) if job.method == "logger")
    worker._write(logger, worker.run(logger))
    arms = [(name, method, source) for name, method in METHODS.items() for source in method.sources]
    for name, method, source in arms:
        found = worker.run(Job("letters", name, method.strengths[0], 3, 1e-2, source))
        assert [point["updates"] for point in found["points"]] == ([8, 16] if source == "policy" else [16])
        # Of a stale rollout's second dozen, four updates are left out.
        samples, rollouts = (768, 2) if source == "stale" else (512, 8)
        assert (found["samples"], len(found["rewards"])) == (samples, rollouts)
        better = 0.1 if source == "policy" else 0.0
        assert found["points"][-1]["reward"] > start + better, (name, source)
        assert found["points"][-1]["kl"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, worker.start.parameters(), strict=True))
    assert [path.name for path in (options.output / "jobs").iterdir()] == [f"{logger.name}.json"]


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_and_is_reported(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "METHODS", {name: METHODS[name] for name in ("gvpo", "rft")})
    options = replace(options, methods=("gvpo", "rft"), updates=2)
    everything = plan(options)
    assert len({job.name for job in everything}) == len(everything) == 2 + 3 * (3 + 1 + 6)
    Worker(options, 0.0).work()  # no time at all
    assert all(result(options, job) is None for job in everything)
    Worker(options, time.time() + 600).work()
    assert all("error" not in (result(options, job) or {"error": "none"}) for job in everything)
    monkeypatch.setattr("experiments.language.run._side_by_side", lambda *_: None)
    assert run(options) == len(everything)
    assert str(tmp_path) not in (options.output / "made.json").read_text()
    found = collect(options.output)
    assert {row["arm"] for row in found["letters"]["rows"]} == {"gvpo 0.1", "gvpo 0.25", "gvpo 0.5", "rft 0"}
    assert found["letters"]["rows"][0]["reward"]["seeds"].__len__() == 2
    off_policy = {(row["arm"], row["condition"]) for row in found["letters"]["off_policy"]}
    assert off_policy == {(arm, label) for arm in ("gvpo 0.1", "rft 0") for label in SOURCES.values()}
    tuned = {row["condition"] for row in found["letters"]["off_policy_tuning"]}
    assert tuned == {f"{label}, rate 0.003" for name, label in SOURCES.items() if name != "policy"}
    assert found["command"].endswith("--rates 0.003 --seeds 2")
    rewards = [point["reward"] for point in found["letters"]["optimum"]]
    assert rewards == sorted(rewards)
    assert (options.output / "language.png").stat().st_size > 0


def test_what_was_cut_before_any_seed_shows_all_of_the_tuning(options: Options) -> None:
    """And a task whose start is not known is left out."""
    worker = Worker(options, time.time() + 600)
    for job in plan(options):
        if job.method == "logger":
            continue
        point = {"updates": 16, "reward": 0.5, "kl": 1.0, "distinct": 4.0}
        found = {"points": [point], "rate": job.rate, "seconds": 1.0}
        if job.method == "start":
            found["optimum"] = [{"beta": 0.1, "reward": 1.0, "kl": 2.0, "distinct": 8.0}]
        if job.seed == 900:
            worker._write(job, found)
            worker._write(replace(job, task="other"), found) if job.method == "rft" else None
    (options.output / "made.json").write_text(
        json.dumps({"options": asdict(options) | {"output": ""}}, default=str)
    )
    found = collect(options.output)
    assert (found["seeds"], found["tasks"]) == ([], ["letters"])
    assert [row["label"] for row in found["letters"]["rows"]][:4] == [
        *(f"GVPO, initial reference, β {beta}, rate 0.003" for beta in (0.1, 0.25, 0.5)),
        "GVPO, rollout reference, rate 0.003",
    ]
    shutil.rmtree(options.output / "jobs")
    (options.output / "jobs").mkdir()
    with pytest.raises(InputError, match="no finished training"):
        collect(options.output)


def test_of_two_processes_one_gets_a_job_and_a_failure_ends_nothing(options: Options) -> None:
    first, second = Worker(options, time.time() + 600), Worker(options, time.time() + 600)
    job = Job("letters", "no such method", 0.0, 3, 1e-3)
    assert first._claim(job)
    assert not second._claim(job)
    first._write(job, first._attempt(job))
    assert "KeyError" in (result(options, job) or {})["error"]


def test_a_deadline_cuts_a_job_short(options: Options) -> None:
    found = Worker(options, time.time() - 1).run(Job("letters", "grpo", 0.0, 3, 1e-3))
    assert found["error"].startswith("cut")
    assert len(found["rewards"]) == 1


def test_learning_rates_are_chosen_on_the_tuning_seed(options: Options) -> None:
    """For each strength and source of completions."""
    options = replace(options, rates=(1.0, 2.0, 3.0))
    worker = Worker(options, time.time() + 600)
    reported = Job("letters", "gvpo", 0.5, 20)
    for rate, found in (
        (1.0, {"points": [{"reward": 0.9}, {"reward": 0.3}]}),
        (2.0, {"points": [{"reward": 0.1}, {"reward": 0.4}]}),
        (3.0, {"error": "diverged"}),
    ):
        assert tuned_rate(options, reported) is None
        worker._write(Job("letters", "gvpo", 0.5, 900, rate), found)
    assert tuned_rate(options, reported) == 2.0
    for other in ({"strength": 0.1}, {"source": "stale"}, {"method": "grpo"}):
        assert tuned_rate(options, replace(reported, **other)) is None


def test_the_plan_has_all_of_a_seed_before_the_next(options: Options) -> None:
    seeds = [job.seed for job in plan(options)]
    assert seeds == sorted(seeds, key=[900, 20, 21].index)
    assert {job.seed for job in plan(replace(options, seeds=0))} == {900}


def test_a_task_that_is_not_thorough_and_has_no_demonstrations_is_run_once_a_method(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "letters", replace(LETTERS, thorough=False, demonstrations=None))
    arms = [(job.method, job.strength, job.source) for job in plan(options) if job.seed == 20]
    own = {name: method for name, method in METHODS.items() if "policy" in method.sources}
    assert arms == [(name, method.strengths[0], "policy") for name, method in own.items()]


def test_what_waits_for_a_rate_has_its_tuning_in_the_plan(options: Options) -> None:
    everything = {job.name for job in plan(options)}
    waiting = [job for job in plan(options) if job.rate is None]
    assert waiting
    for job in waiting:
        assert {replace(job, seed=900, rate=rate).name for rate in options.rates} <= everything


def test_runs_on_logs_wait_for_them(options: Options) -> None:
    worker = Worker(options, time.time() + 600)
    job = Job("letters", "gvpo", 0.1, 3, 1e-3, "logs")
    assert not worker._is_ready(job)
    worker._write(next(job for job in plan(options) if job.method == "logger"), {"logs": {"a": []}})
    assert worker._is_ready(job)


def test_rejection_sampling_descends_on_the_right_completions_alone(options: Options, tmp_path: Path) -> None:
    model = tiny_model()
    trainer = make_trainer(
        METHODS["rft"], model, tokenizer_of(options), LETTERS, strength=0.0, rate=1e-3, seed=0, updates=2,
        rows=16, output=tmp_path / "scratch",
    )  # fmt: skip
    rows = [{"prompt": key, "key": key} for key in LETTERS.keys[:2] for _ in range(methods.K)]
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions(rows)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    right = torch.tensor([LETTERS.right(text, "") for text in texts])
    assert 0 < right.sum() < len(right)
    loss = trainer._compute_loss(trainer.model, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)[right]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)[right]
    width = batch["completion_ids"].shape[1]
    logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    kept = batch["completion_mask"][right].bool()
    # To the precision of autocast.
    assert float(loss) == pytest.approx(-float(logps.detach()[:, -width:][kept].mean()), rel=5e-3)


def tokenizer_of(options: Options) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model, padding_side="left")


@pytest.mark.slow
def test_the_command_runs_processes(options: Options) -> None:
    """The real tasks, of which this model can do nothing: it is the processes that are tested."""
    options = replace(
        options, tasks=("times",), methods=("grpo",), jobs=2, seeds=1, updates=2, rows=8, samples=2
    )
    assert run(options) == 3
    assert run(options) == 3  # nothing left to do


def test_bad_usage_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--tasks", "chess"], "no chess"),
        (["--methods", "ppo"], "no ppo"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--rows", "12"], "groups of 8"),
        (["--rates", "fast"], "numbers"),
        ([], "config.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli(["lab", "language", "--model", str(tmp_path), "--output", str(tmp_path / "a"), *wrong])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_jobs_failing_is_an_error(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.language.run._side_by_side", fail_all)
    with pytest.raises(InputError, match=r"All \d+ jobs failed"):
        run(options)


def fail_all(options: Options, jobs: list[Job], *_: object) -> None:
    for job in jobs:
        (options.output / "jobs" / f"{job.name}.json").write_text('{"error": "no"}')


def test_methods_are_what_their_names_say() -> None:
    def settings(name: str) -> dict:
        method: Method = METHODS[name]
        return method.settings

    assert METHODS["grpo"].strengths == METHODS["gspo"].strengths == (0.0,)
    assert settings("dr_grpo") == {"loss_type": "dr_grpo", "scale_rewards": "none"}
    assert settings("gspo")["importance_sampling_level"] == "sequence"
    assert settings("gvpo")["reference"] == "initial"
    assert "reference" not in settings("gvpo_rollout")
