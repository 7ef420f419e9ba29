"""Which versions of verl and its companions are here, said before any of them is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from gvpo.errors import InputError

V09, V060 = "gvpo.verl.trainer", "gvpo.verl.v060"
TESTED = ("0.9.1", "0.6.0")
_INSTALL = "pip install -c constraints.txt 'gvpo[verl]'"


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
