"""The `gvpo` command: help, version, exit codes."""

import subprocess
import sys

import pytest

from gvpo import __version__
from gvpo.cli import main


def stops(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return int(stopped.value.code or 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert stops(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("command", ["quickstart", "train", "data", "eval", "report"])
def test_each_command_is_listed_and_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stops(["--help"]) == 0
    assert f" {command} " in capsys.readouterr().out
    assert stops([command, "--help"]) == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["quickstrat"], "quickstrat"),
        (["quickstart", "--sed", "1"], "--sed"),
        (["quickstart", "--steps", "0"], "--steps"),
        (["quickstart", "--task", "division"], "There is no quickstart task 'division'"),
    ],
)
def test_bad_usage_exits_with_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert stops(argv) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_starts_without_the_engines() -> None:
    code = "import sys; import gvpo.cli; print('transformers' in sys.modules or 'trl' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"
