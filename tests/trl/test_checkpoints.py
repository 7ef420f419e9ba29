"""Checkpoints that are whole or not there, and runs that are killed and go on as if nothing had been."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from trl.trainer.utils import RepeatSampler

from gvpo.errors import InputError
from gvpo.run import RunDirectory
from gvpo.trl import GVPOTrainer
from gvpo.trl.checkpoint import EpochSampler, flaw, last_checkpoint, publish
from gvpo.trl.watch import RunCallback, StopOnSignal
from tests.gloo import run_ranks, start_rank
from tests.trl.common import parameters, trainer

STEPS = 12


def run(folder: Path) -> None:
    """Real sampling, AdamW, a schedule, replay; goes on from what it finds."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    made = trainer(
        GVPOTrainer,
        output_dir=str(folder),
        reference="initial",
        steps_per_generation=8,
        replay_ratio=0.5,
        dynamic_sampling="resample",
        easy_threshold=0.7,
        easy_fraction=0.2,
        max_steps=STEPS,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )
    checkpoint = last_checkpoint(folder)
    if dist.is_initialized():
        dist.barrier()  # before anything is tidied up
    step = (
        0
        if checkpoint is None
        else json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]
    )
    if first:
        records = RunDirectory(folder)
        records.start({}, resumed_at=step)
        RunCallback(records, Console(quiet=True)).attach(made)
    made.train(resume_from_checkpoint=checkpoint)
    if first:
        end = {"parameters": parameters(made), "optimizer": made.optimizer.state_dict()}
        torch.save(end, folder / "end.pt")


def _as_rank(rank: int, world: int, folder: Path) -> None:
    run(folder)


def _run_on(world: int, folder: Path) -> None:
    os.setpgrp()  # so that all of it can be killed at once
    if world == 1:
        run(folder)
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            fork.Process(target=start_rank, args=(rank, world, meeting, _as_rank, (folder,)))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


def in_child(folder: Path, world: int = 1) -> multiprocessing.Process:
    """The run in `world` processes, behind one that leads their process group."""
    child = multiprocessing.get_context("fork").Process(target=_run_on, args=(world, folder))
    child.start()
    return child


def kill(child: multiprocessing.Process) -> None:
    """SIGKILL for all processes of the run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.join()


def records(folder: Path) -> list[dict[str, Any]]:
    clocks = ("time", "seconds", "per_second", "flos", "profiling", "memory")
    return [
        {key: value for key, value in entry.items() if not any(clock in key for clock in clocks)}
        for entry in RunDirectory(folder).metrics()
        if "loss" in entry
    ]


def assert_same_end(a: Path, b: Path) -> None:
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (a, b)]
    assert all(value.equal(ends[1]["parameters"][name]) for name, value in ends[0]["parameters"].items())
    states = [end["optimizer"]["state"] for end in ends]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert all(value.equal(states[1][key][name]) for name, value in state.items())
    assert len(records(a)) == STEPS
    for one, other in zip(records(a), records(b), strict=True):
        assert {k: (v, other.get(k)) for k, v in one.items() if v != other.get(k)} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "wanted"), [(1, 8), (2, 3)])
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(
    world: int, wanted: int, tmp_path: Path
) -> None:
    """Rollouts in flight included: docs/upstream/trl-resume-rollouts.md."""
    """SIGKILL at random moments of a run, checkpoint writing included, each followed by a resume."""
    torch.set_num_threads(1)
    started = time.monotonic()
    child = in_child(tmp_path / "whole", world)
    child.join()
    assert child.exitcode == 0
    seconds = time.monotonic() - started
    rng = random.Random(0)
    kills = 0
    while kills < wanted:
        child = in_child(tmp_path / "killed", world)
        child.join(rng.uniform(0.05, 0.6) * seconds)
        if child.exitcode is None:
            kill(child)
            kills += 1
        if child.exitcode == 0:  # it came to its end: start it over
            assert_same_end(tmp_path / "whole", tmp_path / "killed")
            shutil.rmtree(tmp_path / "killed")
    child = in_child(tmp_path / "killed", world)
    child.join()
    assert child.exitcode == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    left = {p.name for p in (tmp_path / "killed").iterdir() if p.name.startswith(("checkpoint", ".check"))}
    assert left == {f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 1}"}


def _resume_everywhere(rank: int, world: int, folder: Path) -> list[int]:
    """Steps from which a resumed run differs; epochs have four steps here."""
    settings: dict[str, Any] = {
        "reference": "initial",
        "steps_per_generation": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 11,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = trainer(GVPOTrainer, output_dir=str(folder), **settings)
    whole.train()
    differ = []
    for step in (3, 4, 6, 9):
        again = trainer(GVPOTrainer, output_dir=str(folder / f"again-{step}"), **settings)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        if not all(value.equal(parameters(again)[name]) for name, value in parameters(whole).items()):
            differ.append(step)
    return differ


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_resumed_in_any_epoch_a_run_is_the_same(world: int, tmp_path: Path) -> None:
    """On two processes: docs/upstream/accelerate-cpu-ranks.md."""
    assert run_ranks(_resume_everywhere, world, tmp_path) == [[]] * world


def checkpoints(folder: Path, **changes: Any) -> GVPOTrainer:
    made = trainer(output_dir=str(folder), save_strategy="steps", save_steps=1, **changes)
    made.train()
    return made


def test_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    newest = tmp_path / "checkpoint-3"
    assert last_checkpoint(tmp_path) == str(newest)
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint-3 is torn \(model\.safetensors is not"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match="is torn"):
        trainer(output_dir=str(tmp_path)).train(resume_from_checkpoint=str(newest))
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-1" / "gvpo_checkpoint.json").write_text("{")
    with pytest.warns(UserWarning, match="is torn"):
        assert last_checkpoint(tmp_path) is None


def test_finished_run_makes_no_further_step(tmp_path: Path) -> None:
    """docs/upstream/transformers-finished-run.md."""
    done = checkpoints(tmp_path, optim="adamw_torch")
    (tmp_path / ".checkpoint-in-progress" / "replaced").mkdir(parents=True)  # killed in its last moments
    again = trainer(output_dir=str(tmp_path), optim="adamw_torch", save_total_limit=2)
    again.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-2", "checkpoint-3"]
    assert again.state.global_step == 3
    assert all(value.equal(parameters(again)[name]) for name, value in parameters(done).items())
    assert {float(state["step"]) for state in again.optimizer.state.values()} == {3.0}
    longer = trainer(output_dir=str(tmp_path), optim="adamw_torch", max_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


def test_a_checkpoint_of_trl_is_taken(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    (tmp_path / "checkpoint-3" / "gvpo_checkpoint.json").unlink()
    assert flaw(tmp_path / "checkpoint-3") is None
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("")
    assert flaw(tmp_path / "checkpoint-3") is not None


def test_best_model_and_limit_are_kept(tmp_path: Path) -> None:
    from tests.trl.common import dataset

    made = checkpoints(
        tmp_path,
        eval_dataset=dataset(8),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        save_total_limit=1,
        max_steps=4,
    )
    best = made.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{made.state.best_global_step}")
    left = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert Path(best).name in left
    assert len(left) <= 2


def test_full_disk_is_one_sentence_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    made = trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2)
    made.args.max_steps = 1
    made.train()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    again = trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Writing more than 8 kB fails; what is printed stays below.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(InputError, match=r"checkpoint of step 2 cannot be written .*checkpoint-1"):
            again.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint-1", "README.md"}
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_mistake_while_saving_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2)
    original = made._save_rng_state

    def mistaken(folder: str) -> None:
        if made.state.global_step == 2:
            raise RuntimeError("a kernel failed")
        original(folder)

    monkeypatch.setattr(made, "_save_rng_state", mistaken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        made.train()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "README.md"}


def _one_cannot_write(rank: int, world: int, folder: Path) -> str:
    made = trainer(
        output_dir=str(folder),
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
        per_device_train_batch_size=4,
    )
    if rank == 1:
        made._save_rng_state = _full  # type: ignore[method-assign]
    with pytest.raises(InputError) as caught:
        made.train()
    return str(caught.value)


def _full(folder: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_all_processes_stop_if_one_cannot_write(tmp_path: Path) -> None:
    other, own = run_ranks(_one_cannot_write, 2, tmp_path)
    assert "No space left" in own
    assert "another process failed" in other
    assert all("make room or choose another output_dir" in text for text in (other, own))
    assert {p.name for p in tmp_path.iterdir()} == {"README.md"}


def test_each_part_goes_on_with_what_it_knew(tmp_path: Path) -> None:
    """Bad steps in a row, what memory allowed, metrics that wait to be logged."""
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    settings |= {"max_steps": 2, "max_bad_steps": 2, "logging_steps": 2, "reference": "initial"}
    whole = trainer(**settings)
    whole._token_ceiling.most = 77.0
    whole.train()
    again = trainer(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again._token_ceiling.most == whole._token_ceiling.most == pytest.approx(77 * 1.01**2)
    for name in ("reward", "gvpo/kl", "entropy"):
        assert again.state.log_history[0][name] == whole.state.log_history[0][name]
    shutil.rmtree(tmp_path / "checkpoint-2")
    for step in (0, 1):
        bad = trainer(**{**settings, "max_steps": step + 1})
        weight = list(bad.model.parameters())[1]
        weight.register_hook(lambda gradient: gradient * torch.nan)
        outcome = (
            pytest.raises(InputError, match="2 steps in a row")
            if step
            else pytest.warns(match="Step 0 is skipped")
        )
        with outcome:
            bad.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if step else None)


def test_signal_saves_and_stops_after_the_step(tmp_path: Path) -> None:
    made = trainer(output_dir=str(tmp_path), max_steps=5)
    stop = StopOnSignal()
    made.add_callback(stop)
    made.reward_funcs[0] = _raising_signal_at(made, step=1)
    before = signal.getsignal(signal.SIGTERM)
    made.train()
    assert stop.received is signal.SIGTERM
    assert made.state.global_step == 2
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert signal.getsignal(signal.SIGTERM) is before


def _raising_signal_at(made: GVPOTrainer, step: int) -> Any:
    original: Any = made.reward_funcs[0]

    def reward(**columns: Any) -> Any:
        if made.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(**columns)

    return reward


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, final = tmp_path / "aside" / "checkpoint-1", tmp_path / "checkpoint-1"
    for name in ("a", "part/b", "part/deep/c"):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text(name)
    everything = {written, *written.rglob("*"), written / "gvpo_checkpoint.json"}
    events: list[Path] = []
    sync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        events.append(next(path for path in (tmp_path, *tmp_path.rglob("*")) if same(path, file)))
        sync(file)

    def same(path: Path, file: int) -> bool:
        return os.path.samestat(path.stat(), os.fstat(file))

    def named(source: Path, target: Path) -> None:
        assert set(events) == everything
        replace(source, target)
        events.clear()

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    publish(written, final)
    assert events == [tmp_path]
    assert flaw(final) is None


def test_what_was_written_last_is_kept_and_taken(tmp_path: Path) -> None:
    """Of a run that went back to an earlier checkpoint the later steps are of the past."""
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    trainer(**settings, max_steps=5).train()
    again = trainer(**settings, max_steps=4, save_total_limit=2)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    trainer(**settings, max_steps=5).train(resume_from_checkpoint=True)
    trainer(**settings, max_steps=4).train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_trainer_interrupted_within_a_step_can_train_again(tmp_path: Path) -> None:
    """As in a notebook: nothing of the step that was begun gets into the next."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    settings |= {"steps_per_generation": 8, "output_dir": str(tmp_path / "again")}
    whole = trainer(**{**settings, "output_dir": str(tmp_path / "whole")})
    whole.train()
    again = trainer(**settings)
    prepare, calls = again._prepare_inputs, iter(range(100))

    def interrupted(inputs: Any) -> Any:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return prepare(inputs)

    again._prepare_inputs = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.train(resume_from_checkpoint=True)
    assert all(value.equal(parameters(again)[name]) for name, value in parameters(whole).items())
    for name in ("reward", "gvpo/groups", "entropy"):
        assert again.state.log_history[0][name] == whole.state.log_history[0][name]


def test_a_second_run_samples_anew(tmp_path: Path) -> None:
    """The rest of a generation was sampled by another policy than that of the second run's first step."""
    made = trainer(output_dir=str(tmp_path), max_steps=1, steps_per_generation=8)
    made.train()
    left = made._buffered_inputs
    assert left is not None
    made.train()
    assert made._buffered_inputs is not None
    assert made._buffered_inputs[0] is not left[0]


def test_each_epoch_has_an_order_of_its_own_however_it_was_reached() -> None:
    def order(*epochs: int) -> list[int]:
        sampler = EpochSampler(RepeatSampler(range(32), mini_repeat_count=1, seed=1), seed=5)
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found = list(sampler)
        return found

    assert order(0, 1, 2) == order(2)
    assert len({tuple(order(epoch)) for epoch in range(4)}) == 4
