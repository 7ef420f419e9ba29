"""Every public name, option and default of the package, as one flat table.

    python -m tests.public_names    # writes tests/fixtures/public_names.json anew

Public is what docs/api.md lists, what a command's --help shows, GVPO's own fields of `GVPOConfig`, and
`gvpo.*` in verl. TRL's own defaults are TRL's and left out.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
import yaml
from typer.models import OptionInfo

import gvpo
from gvpo.cli import app

TABLE = Path(__file__).parent / "fixtures" / "public_names.json"
ROOT = Path(gvpo.__file__).parents[2]
Entry = tuple[str, str]


def collect() -> dict[str, str]:
    """Name → default or signature."""
    return dict(sorted({*_commands(), *_training(), *_verl(), *_api(), *_names()}))


def _commands() -> Iterator[Entry]:
    import experiments.command

    yield from _options("gvpo", app)
    yield from _options("gvpo lab", experiments.command.lab)


def _options(name: str, commands: typer.Typer) -> Iterator[Entry]:
    callbacks = [(name, callback.callback) for callback in [commands.registered_callback] if callback]
    for command in commands.registered_commands:
        callbacks.append((f"{name} {command.name or command.callback.__name__}", command.callback))
    for title, callback in callbacks:
        yield title, "command"
        hints = get_type_hints(callback, include_extras=True)
        for parameter in inspect.signature(callback).parameters.values():
            kind, *extra = get_args(hints[parameter.name]) or [hints[parameter.name]]
            option = parameter.name.replace("_", "-")
            for info in extra:
                made = f"--{option}" if isinstance(info, OptionInfo) else option.upper()
                first = (
                    [info.default] if isinstance(info.default, str) else []
                )  # as Annotated's options have it
                option = " ".join([*first, *(info.param_decls or ())] or [made])
                yield f"{title} {option}", f"{_type(kind)} = {_value(parameter.default)}"
    for group in commands.registered_groups:
        yield from _options(f"{name} {group.name}", group.typer_instance)


def _type(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) and not get_args(kind) else str(kind)


def _value(default: Any) -> str:
    return "required" if default is inspect.Parameter.empty else repr(default)


def _training() -> Iterator[Entry]:
    from trl import GRPOConfig

    from gvpo.trl import GVPOConfig
    from gvpo.trl.arguments import GVPOScriptArguments
    from gvpo.trl.config import REFUSED

    theirs = {field.name: _default(field) for field in dataclasses.fields(GRPOConfig)}
    for field in dataclasses.fields(GVPOConfig):
        # Refused options may be at their default alone, which is TRL's to choose.
        if _default(field) != theirs.get(field.name) and field.name not in REFUSED:
            yield f"GVPOConfig.{field.name}", _default(field)
    for name in REFUSED:
        yield f"GVPOConfig.{name}", "refused"
    for field in dataclasses.fields(GVPOScriptArguments):
        yield f"gvpo train --{field.name}", _default(field)


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory
    return repr(field.default if made is dataclasses.MISSING else made())


def _verl() -> Iterator[Entry]:
    path = Path(gvpo.__file__).parent / "verl" / "config" / "gvpo_trainer.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in settings["gvpo"].items():
        yield f"verl gvpo.{name}", repr(value)
    yield "verl actor_rollout_ref.actor.gvpo_beta", repr(settings["actor_rollout_ref"]["actor"]["gvpo_beta"])


def _api() -> Iterator[Entry]:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {
        (module, name)
        for module, members in re.findall(r"^::: (\S+)\n    options:\n      members: \[(.*)\]", page, re.M)
        for name in members.split(", ")
    }
    for module in ("gvpo", "gvpo.data", "gvpo.evaluate", "gvpo.replay", "gvpo.rewards", "gvpo.trl"):
        listed |= {(module, name) for name in importlib.import_module(module).__all__}
    for module, name in listed:
        value = getattr(importlib.import_module(module), name)
        yield f"{module}.{name}", _signature(value) if callable(value) else type(value).__name__
        if inspect.isclass(value) and not dataclasses.is_dataclass(value):
            for attribute, member in vars(value).items():
                function = getattr(member, "__func__", member)
                if not attribute.startswith("_") and inspect.isfunction(function):
                    yield f"{module}.{name}.{attribute}", _signature(function)


def _signature(value: Any) -> str:
    if inspect.isclass(value) and value.__name__.endswith("Config"):
        return "class"  # its fields are listed one by one
    parameters = inspect.signature(value).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return re.sub(r" at 0x\w+", "", str(inspect.Signature(plain)))


def _names() -> Iterator[Entry]:
    from gvpo.data.recipes import RECIPES
    from gvpo.rewards import REWARDS
    from gvpo.sums import TASKS

    for kind, names in {"data set": RECIPES, "reward": REWARDS, "quickstart task": TASKS}.items():
        yield from ((f"{kind} {name}", "name") for name in names)


if __name__ == "__main__":
    TABLE.write_text(json.dumps(collect(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
