"""The entry point: check what is installed and configured, in seconds, then run verl."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gvpo.errors import InputError
from gvpo.verl import EXTERNAL, cpu, have_verl_import

_CONFIG = Path(__file__).parent / "config"
V09, V060 = "gvpo.verl.trainer", "gvpo.verl.v060"
TESTED = ("0.9.1", "0.6.0")
_INSTALL = "pip install -c constraints.txt 'gvpo[verl]'"


def main() -> None:
    """Train with the overrides of the command line. Exits with 2 on bad input."""
    try:
        adapter = check_versions()
    except InputError as error:
        _refuse(error)
    if cpu.OVERRIDE in sys.argv:
        cpu.use()
    modules = have_verl_import("gvpo.verl.plugin")
    import hydra

    @hydra.main(config_path=str(_CONFIG), config_name="gvpo_trainer", version_base=None)
    def run(config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        from gvpo.verl.settings import check, prepare

        try:
            for note in check(config, HydraConfig.get().overrides.task):
                print(f"gvpo: {note}", file=sys.stderr)
            prepare(config)
            # Ray's processes on other machines import the plugin, too.
            name = f"ray_kwargs.ray_init.runtime_env.env_vars.{EXTERNAL}"
            OmegaConf.update(config, name, modules, force_add=True)
            _train_or_explain(import_module(adapter).train, config)
        except InputError as error:
            _refuse(error)

    run()


def _train_or_explain(train: Callable[[Any], None], config: Any) -> None:
    """Train; where a process of the run dies, say so in a sentence and end with 1."""
    from ray.exceptions import RayActorError

    from gvpo.verl.watch import WorkerDied

    try:
        train(config)
    except (WorkerDied, RayActorError) as error:
        print(
            f"gvpo: {' '.join(str(getattr(error, 'cause', None) or error).split())}\n"
            "gvpo: the same command with trainer.resume_mode=auto goes on from the last checkpoint in "
            f"{config.trainer.default_local_dir}.",
            file=sys.stderr,
        )
        sys.exit(1)


def _refuse(error: InputError) -> None:
    # From a process of Ray's it comes with that process's traceback around it.
    print(f"gvpo: {getattr(error, 'cause', None) or error}", file=sys.stderr)
    sys.exit(2)


def check_versions() -> str:
    """The module with the adapter for the installed verl.

    Raises:
        InputError: verl is missing or outside the tested range, or verl 0.9 has no TransferQueue.
    """
    installed = _version("verl")
    if installed is None:
        raise InputError(f"verl is not installed: {_INSTALL}.")
    from packaging.version import Version  # verl brings it

    found = Version(installed)
    if found.public == "0.6.0":
        return V060
    if not Version(TESTED[0]) <= found < Version("0.10.dev0"):
        raise InputError(
            f"verl {installed} is outside the range that gvpo.verl is tested with, which is 0.9.1 and later "
            f"releases of 0.9, and 0.6.0: {_INSTALL} brings {TESTED[0]}."
        )
    if found.public != TESTED[0]:
        print(f"gvpo: verl {installed} is newer than {TESTED[0]}, the newest tested one.")
    if _version("TransferQueue") is None:
        raise InputError(
            "TransferQueue is not installed, which verl 0.9's trainer keeps its rollouts in: "
            "pip install TransferQueue==0.1.11."
        )
    return V09


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
