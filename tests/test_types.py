"""What a type checker and an editor see of the package."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, get_type_hints

import pytest

import gvpo

DOWNSTREAM = """
import torch
from gvpo import GroupBatch, GVPOStep, SequenceScorer, gvpo_loss, gvpo_weights

numbers, groups = torch.ones(4), torch.zeros(4).long()
weights: torch.Tensor = gvpo_weights(numbers, numbers, numbers, groups, beta=0.1)
loss = gvpo_loss(numbers, numbers, numbers, groups, beta=0.1)
value: torch.Tensor = loss.loss
reveal_type(loss.metrics)

def train(step: GVPOStep, batch: GroupBatch, scorer: SequenceScorer) -> None:
    report = step(batch)
    report.weights.sum()
    step.no_such_method()
"""


def _public() -> Iterator[tuple[str, Any]]:
    # verl 0.6.0 has an environment of its own.
    skipped = ("gvpo.verl.v060", "gvpo.__main__", "gvpo.verl.__main__")
    for found in walk_packages(gvpo.__path__, "gvpo."):
        if found.name in skipped:
            continue
        module = import_module(found.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != found.name:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{found.name}.{name}", value
            if inspect.isclass(value):
                for member, function in inspect.getmembers(value, inspect.isfunction):
                    if member in vars(value) and (not member.startswith("_") or member == "__init__"):
                        yield f"{found.name}.{name}.{member}", function


@pytest.mark.slow
def test_every_public_signature_can_be_read() -> None:
    unread = {}
    for name, value in _public():
        try:
            get_type_hints(value)
        except Exception as error:
            unread[name] = str(error)
    assert not unread


@pytest.mark.slow
def test_a_users_program_is_checked_against_our_types(tmp_path: Path) -> None:
    (tmp_path / "downstream.py").write_text(DOWNSTREAM)
    options = ["--strict", "--cache-dir", str(Path(__file__).parents[1] / ".mypy_cache")]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "downstream.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = [line for line in checked.stdout.splitlines() if line.startswith("downstream.py")]
    assert [line.partition(": ")[2] for line in lines] == [
        'note: Revealed type is "dict[str, torch._tensor.Tensor]"',
        'error: "GVPOStep" has no attribute "no_such_method"  [attr-defined]',
    ]
