"""What the first pages tell a newcomer to type is there."""

import importlib.util
import re
from pathlib import Path

import pytest
from trl import ModelConfig

from gvpo.data import load_prompts
from gvpo.trl.arguments import GVPOScriptArguments, parse_arguments
from gvpo.trl.config import REFUSED, GVPOConfig

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS = {
    name for config in (GVPOScriptArguments, GVPOConfig, ModelConfig) for name in config.__dataclass_fields__
} - REFUSED.keys()
# Of other commands: accelerate, vllm serve, verl.model_merger, and gvpo's others.
OTHERS = {"num_processes", "config", "samples", "output", "enable-lora", "max-lora-rank", "lora-modules"}
OTHERS |= {"backend", "local_dir", "target_dir", "model", "scale"}


def test_first_steps_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "start.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", page, re.M | re.S):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    arguments = parse_arguments(["--config", "recipe.yaml"])
    assert arguments.script.reward_funcs == ["my_rewards:brief"]
    assert len(load_prompts(arguments.script.dataset_name[0], answers=False)) == 8
    spec = importlib.util.spec_from_file_location("my_rewards", tmp_path / "my_rewards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = ["Light scatters.", "Light scatters", "word " * 21 + "end.", "word " * 60 + "end."]
    rewards = module.brief([[{"role": "assistant", "content": text}] for text in said])
    assert rewards == pytest.approx([1.0, 0.5, 0.75, 0.0])


def test_how_do_i_names_options_that_are_there() -> None:
    page = (DOCS / "how-do-i.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", page))
    assert {"plan", "resume", "stop_when"} <= named
    assert named - OPTIONS - OTHERS == set()


def test_coming_from_elsewhere_names_options_that_are_there() -> None:
    page = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[-1] for line in page.splitlines() if line.startswith("| ")]
    keys = [code.split(":")[0] for row in rows for code in re.findall("`([^`(]+)`", row)]
    named = {name for key in keys for name in re.findall(r"(?<!\w)[a-z][a-z0-9_]{3,}", key)}
    assert {"num_generations", "micro_batch_tokens", "dynamic_sampling"} <= named
    # A reward, a factor, what is in the core, and the heading.
    assert named - OPTIONS - {"length", "processes", "gvpo", "gvpo_weights", "train", "auto"} == set()
