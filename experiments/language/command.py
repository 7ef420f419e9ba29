"""`gvpo lab language`: options checked, then the run."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from experiments.language.jobs import Options
from experiments.language.methods import METHODS, RATES, K
from experiments.language.run import collect, run
from experiments.language.tasks import TASKS
from gvpo.errors import InputError
from gvpo.model.smollm2 import smollm2


def main(*, model: str, device: str, rows: int, tasks: str, methods: str, rates: str, **others: Any) -> None:
    """See `gvpo lab language --help`; `others` are taken as they are.

    Raises:
        InputError: an unknown task, method or device, or a learning rate that is none.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: cpu or cuda.")
    if rows % K:
        raise InputError(f"--rows {rows}: completions come in groups of {K}.")
    try:
        chosen = tuple(float(rate) for rate in rates.split(",") if rate) or RATES
    except ValueError as error:
        raise InputError(f"--rates {rates}: numbers, comma between.") from error
    options = Options(
        model=model or str(smollm2()),
        device=device,
        rows=rows,
        tasks=_names("tasks", tasks, TASKS),
        methods=_names("methods", methods, METHODS),
        rates=chosen,
        **others,
    )
    run(options)
    if find_spec("matplotlib") is None:
        print(f"For tables and pictures, gvpo lab show --output {options.output.parent} where matplotlib is.")
    else:
        collect(options.output)


def _names(option: str, given: str, known: Iterable[str]) -> tuple[str, ...]:
    names = tuple(name for name in given.split(",") if name) or tuple(known)
    if unknown := set(names) - set(known):
        raise InputError(f"--{option}: no {', '.join(sorted(unknown))}; choose among {', '.join(known)}.")
    return names
