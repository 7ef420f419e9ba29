"""What runs elsewhere asks for what there is: the CI's jobs, containers and forms."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
STEPS = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


def targets(commands: list[str]) -> set[str]:
    """What `make` is asked for."""
    return {
        target for c in commands for words in re.findall(r"\bmake ([\w ./-]+)", c) for target in words.split()
    }


def test_every_job_makes_what_there_is_and_all_that_the_gate_makes() -> None:
    gate = targets([(ROOT / ".ci/run").read_text(encoding="utf-8")])
    assert gate == {"lint", "docs", "test", "test-verl060", "test-vllm"}
    assert gate <= targets(STEPS)
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    made = {w.replace(".venv", "$(VENV)") for w in targets([*STEPS, container["postCreateCommand"]])}
    assert {target for target in made if f"\n{target}:" not in MAKEFILE} == set()


def test_the_pythons_of_the_jobs_are_those_that_are_claimed() -> None:
    claimed = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == claimed


@pytest.mark.parametrize("file", sorted((ROOT / "docker").iterdir()), ids=lambda file: file.name)
def test_containers_copy_what_there_is(file: Path) -> None:
    copied = re.findall(r"^COPY (.+) \S+$", file.read_text(encoding="utf-8"), re.M)
    assert copied
    assert [name for names in copied for name in names.split() if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem
)
def test_forms_are_forms(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    for part in form["body"]:
        assert set(part["attributes"]) <= {"label", "description", "render"}
        assert set(part.get("validations", {})) <= {"required"}
