"""`gvpo train` on real GSM8K rows with a tiny chat model: template, reward, update, checkpoint, resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl.trainer import grpo_trainer

from gvpo.cli import main
from gvpo.run import RunDirectory
from gvpo.samples import read_samples
from gvpo.trl.arguments import parse_arguments
from gvpo.trl.metrics import PARTS
from tests.trl.chat_model import TOOL_SCHEMA, TOOL_TEMPLATE, save_chat_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "gsm8k_cpu.yaml"
FIXTURE = ROOT / "tests" / "fixtures" / "rewards" / "gsm8k.jsonl"
SHARED = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
REWARD = (
    "def digits(completions, **_):\n    return [float(len(set(c[0]['content']))) / 32 for c in completions]\n"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a reward function of one's own."""
    (tmp_path / "own_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    return tmp_path


def arguments(model: Path, *others: str) -> list[str]:
    data = SHARED if SHARED.exists() else FIXTURE
    return [
        "train", "--config", str(RECIPE), "--model_name_or_path", str(model),
        "--dataset_name", f"gsm8k:{data}", "--reward_funcs", "own_reward:digits", "accuracy",
        "--learning_rate", "0.01", "--dataset_size", "24", "--output_dir", "out", *others,
    ]  # fmt: skip


def run(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0


def fails(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error with which the command ends, with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("gvpo: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_recipe_trains_saves_and_resumes(chat_model: Path, inside: Path) -> None:
    run(arguments(chat_model, "--save_steps", "1"))
    names = {p.name for p in (inside / "out").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "model.safetensors"} <= names
    metrics = [json.loads(line) for line in (inside / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert all(m["loss"] > 0 for m in metrics if "loss" in m)
    assert any(abs(m["gvpo/kl"]) > 1e-6 for m in metrics if "gvpo/kl" in m)
    summary = json.loads((inside / "out" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["beta"] == 0.1

    # Stopped between two rollouts and in the middle of one, then gone on with.
    (inside / "out").rename(inside / "whole")
    whole = load_file(inside / "whole" / "model.safetensors")
    for checkpoint in ("checkpoint-4", "checkpoint-3"):
        shutil.rmtree(inside / "out", ignore_errors=True)
        shutil.copytree(inside / "whole" / checkpoint, inside / "out" / checkpoint)
        shutil.copy(inside / "whole" / "samples.jsonl", inside / "out")
        run(arguments(chat_model, "--save_steps", "1", "--resume", "auto"))
        resumed = load_file(inside / "out" / "model.safetensors")
        assert all(value.equal(resumed[name]) for name, value in whole.items())
    steps = [m for m in RunDirectory(inside / "out").metrics() if "loss" in m]
    assert [m["seconds_left"] > 0 for m in steps] == [True, True, False]
    # Samples of the steps that are made again are those of the first time.
    assert [line["step"] for line in read_samples(inside / "out")] == [0, 2, 4]
    assert read_samples(inside / "out") == read_samples(inside / "whole")

    # What was given is enough to run it again.
    again = yaml.safe_load((inside / "out" / "config.yaml").read_text())
    assert again["learning_rate"] == 0.01
    assert again["threads"] == torch.get_num_threads()
    assert again["reward_funcs"] == ["own_reward:digits", "accuracy"]


@pytest.mark.slow
def test_two_processes_learn_with_lora_and_evaluate(chat_model: Path, inside: Path) -> None:
    fixture = str(FIXTURE)
    argv = arguments(
        chat_model, "--use_peft", "--lora_target_modules", "all-linear", "--reference", "initial",
        "--per_device_train_batch_size", "4", "--steps_per_generation", "1", "--max_steps", "2",
        "--eval_strategy", "steps", "--eval_steps", "2", "--eval_dataset_name", f"gsm8k:{fixture}",
        "--eval_dataset_size", "4", "--per_device_eval_batch_size", "4",
        "--dataset_name", f"gsm8k:{fixture}", f"math:{fixture}",
    )  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29761",
    ]
    done = subprocess.run(
        [*command, "-m", "gvpo", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (inside / "out" / "adapter_model.safetensors").exists()
    metrics = [json.loads(line) for line in (inside / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_reward" in m and "eval_loss" in m for m in metrics)
    samples = read_samples(inside / "out")
    assert [(line["step"], line["held_out"], len(line["rewards"])) for line in samples] == [
        (0, False, 2), (1, False, 2), (2, True, 2), (2, True, 2),
    ]  # fmt: skip
    rewards = [m["eval_reward"] for m in metrics if "eval_reward" in m]
    means = [fmean(line["rewards"].values()) for line in samples if line["held_out"]]
    assert fmean(means) == pytest.approx(rewards[-1], abs=1e-4)
    steps = [m for m in metrics if "loss" in m]
    assert all(m["step_time"] == pytest.approx(sum(m[f"profiling/{part}"] for part in PARTS)) for m in steps)
    assert "s a step (" in done.stdout
    assert " tokens/s  " in done.stdout
    assert json.loads((inside / "out" / "summary.json").read_text())["processes"] == 2


SMALL = [
    "--num_generations", "4", "--max_completion_length", "8", "--per_device_train_batch_size", "8",
    "--max_steps", "2", "--logging_steps", "1", "--learning_rate", "0.01", "--output_dir", "out",
    "--reference", "initial",
]  # fmt: skip


def test_logged_completions_need_no_prompts_and_no_reward(chat_model: Path, inside: Path) -> None:
    rows = [
        {"prompt": f"{i}+1=", "completions": [str(i + 1), str(i), "no"], "rewards": [1.0, 0.0, 0.0]}
        for i in range(8)
    ]
    (inside / "logged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(["train", "--model_name_or_path", str(chat_model), "--offline", "logged.jsonl", *SMALL])
    metrics = [json.loads(line) for line in (inside / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["gvpo/reward_variance"] == pytest.approx(1 / 3) for m in metrics if "loss" in m)


@pytest.mark.slow
def test_demonstrations_come_from_a_column(chat_model: Path, inside: Path) -> None:
    rows = [
        {"prompt": f"{i}+1=", "answer": str(i + 1), "demonstrations": [f"The answer is {i + 1}."]}
        for i in range(8)
    ]
    (inside / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--model_name_or_path", str(chat_model), "--dataset_name", "sums.jsonl", *SMALL]
    run([*argv, "--demonstrations_per_group", "1", "--max_completion_length", "24"])
    metrics = [json.loads(line) for line in (inside / "out" / "metrics.jsonl").read_text().splitlines()]
    # The model knows nothing: what is rewarded is one demonstration in each group of four.
    assert all(m["reward"] == 0.25 for m in metrics if "reward" in m)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--offline", "logged.jsonl"], "and so is dataset_name"),
        (["--demonstrations_per_group", "1"], "has no column 'demonstrations'"),
        (["--dataset_name", "gsm9k"], "there is no data set 'gsm9k'"),
        (["--dataset_name", "missing.jsonl"], "missing.jsonl is not a file"),
        (["--dataset_name", "headless.jsonl"], "no column"),
        (["--reward_funcs", "acuracy"], "there is no reward 'acuracy'"),
        (["--reward_funcs", "own_reward:nothing"], "own_reward"),
        (["--trust", "1.5"], "trust=1.5 must be a share between 0 and 1"),
        (["--trust", "0.2", "--replay_ratio", "1"], "not kept with replayed groups: leave trust out there"),
        (["--beta", "0"], "beta=0.0, but GVPO needs a finite beta above 0"),
        (["--num_generations", "1"], "num_generations=1"),
        (["--per_device_train_batch_size", "6"], "6"),
        (["--epsilon", "0.3"], "epsilon=0.3 has no meaning in GVPO"),
        (["--loss_type", "dapo"], "loss_type='dapo' has no meaning in GVPO"),
        (["--lerning_rate", "1"], "did you mean learning_rate?"),
        (["--learning_rate", "fast"], "invalid float value"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--output_dir", "own_reward.py/out"], "own_reward.py is a file"),
        (["--model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        (["--resume", "out/checkpoint-7"], "out/checkpoint-7 is not a whole checkpoint"),
        (["--reward_weights", "1"], "1 reward_weights"),
        (["--chat_template", "missing.jinja"], "missing.jinja"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    given: list[str], words: str, chat_model: Path, inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (inside / "headless.jsonl").write_text('{"text": "2+2", "label": "4"}\n')
    before = sorted(inside.rglob("*.*"))
    argv = arguments(chat_model)
    if given[0] == "--config":
        argv = ["train"]
    message = fails([*argv, *given], capfd)
    assert words in message
    assert not (inside / "out").exists()
    assert [p for p in sorted(inside.rglob("*.*")) if "__pycache__" not in str(p)] == before


AGENTS = """
class Game:
    def reset(self, level, **_):
        self.moves = 0
        return f" level {level}"

    def move(self, x: int) -> str:
        \"\"\"Move.

        Args:
            x: Where to.
        \"\"\"
        self.moves += 1
        return "moved"

    def get_reward(self):
        return self.moves


class Silent(Game):
    def get_reward(self):
        return None


class Rewardless(Game):
    get_reward = None


def short(prompts, trainer):
    n = len(prompts)
    return {"prompt_ids": [[5]] * n, "completion_ids": [[8, 9, 2]] * n, "logprobs": [[0.0] * 3] * n,
            "env_mask": [[1, 0]] * n}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--environment", "agents:Game", "--keep_columns", "level"], None),
        (
            ["--environment", "agents:Silent", "--keep_columns", "level"],
            "(Silent) returned None or NaN for all 8",
        ),
        (["--environment", "agents:Rewardless"], "cannot be trained: No reward source provided"),
        (["--environment", "agents:Game"], "Environment Game could not be reset (TypeError: "),
        (["--environment", "agents:Nothing"], "the environment 'agents:Nothing' cannot be imported"),
        (["--tools", "agents:Game"], "the tool 'agents:Game' is no function"),
        (["--rollout_func", "agents:short"], "an env_mask of 2 values for the 3 tokens of completion 0"),
    ],
)
def test_environments_tools_and_rollout_functions_by_name(
    given: list[str], words: str | None, inside: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A game gives its own reward; what is not right about one, or about a mask, is told in one sentence."""
    monkeypatch.setattr(grpo_trainer, "is_jmespath_available", lambda: True)  # TOOL_SCHEMA does without
    monkeypatch.delitem(sys.modules, "agents", raising=False)
    (inside / "agents.py").write_text(AGENTS)
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(8)]
    (inside / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_chat_model(inside / "model", template=TOOL_TEMPLATE, schema=TOOL_SCHEMA)
    argv = ["train", "--model_name_or_path", str(model), "--dataset_name", "sums.jsonl", *SMALL, *given]
    if words is not None:
        assert words in fails(argv, capfd)
        return
    run(argv)
    metrics = [json.loads(line) for line in (inside / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(
        "rewards/Game/mean" in m and "rewards/accuracy/mean" not in m for m in metrics if "reward" in m
    )


def test_recipe_with_an_unknown_or_mistyped_option(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, words in (
        ("lerning_rate: 1.0", "did you mean learning_rate?"),
        ("beta: [1, 2]", "beta"),
        ("- a\n- b", "must be a YAML mapping"),
        ("a: [", "no valid YAML at line"),
    ):
        recipe.write_text(text)
        assert words in fails(["train", "--config", str(recipe)], capfd)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('gone')", "Reward function digits raised KeyError: 'gone'"),
        ("return [1.0]", "Reward function digits returned 1 rewards for 16 completions"),
        ("return [float('nan')] * len(completions)", "returned None or NaN for all 16 completions"),
        ("return [float('inf')] * len(completions)", "returned inf, which is no finite number: 16 of 16"),
    ],
)
def test_reward_functions_that_go_wrong(
    body: str, words: str, chat_model: Path, inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (inside / "own_reward.py").write_text(f"def digits(completions, **_):\n    {body}\n")
    argv = arguments(chat_model, "--reward_funcs", "own_reward:digits", "--max_completion_length", "4")
    assert words in fails(argv, capfd)


def test_existing_checkpoints_are_not_overwritten(
    chat_model: Path, inside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (inside / "out" / "checkpoint-2").mkdir(parents=True)
    assert "--resume auto" in fails(arguments(chat_model), capfd)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_parses(recipe: Path) -> None:
    parsed = parse_arguments(["--config", str(recipe), "--bf16", "false", "--use_cpu"])
    assert parsed.script.dataset_name
    assert parsed.model.model_name_or_path


def test_help_lists_what_gvpo_has_and_hides_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    run(["train", "--help"])
    text = capsys.readouterr().out
    for name in ("--beta", "--reference", "--micro_batch_tokens", "--reward_funcs", "--resume", "--use_peft"):
        assert name in text
    assert "--epsilon" not in text
