"""The wheel alone, far from the repository, and without what its extras bring."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# None in sys.modules is how Python says that a module cannot be imported.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({missing})); from gvpo.cli import main; main({argv})"
_TRL = ["trl", "transformers", "datasets", "accelerate", "peft", "math_verify", "psutil"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but what the wheel unpacks to."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("gvpo-*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run(site: Path, cwd: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "gvpo", "quickstart", "--steps", "2", "--output", "run"],
        ["-m", "gvpo", "data", "reasoning_gym:chain_sum", "--size", "3", "--output", "data"],
        ["-m", "gvpo", "eval", "--help"],
        ["-m", "gvpo", "report", "--help"],
        ["-m", "gvpo.verl", "--help"],
        ["-c", f"import gvpo; assert {str(ROOT)!r} not in gvpo.__file__; assert gvpo.GVPOStep"],
    ],
    ids=lambda argv: " ".join(argv[1:3]),
)
def test_the_wheel_alone_runs(argv: list[str], site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, *argv)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_an_index_shows_of_the_readme_leads_somewhere(site: Path) -> None:
    (metadata,) = site.glob("gvpo-*.dist-info/METADATA")
    _, _, page = metadata.read_text(encoding="utf-8").partition("\n\n")
    text = re.sub(r"(?s)```.*?```", "", page)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "$" not in text  # formulas, which indexes do not set
    assert "the source distribution" in text
    assert text.rstrip().endswith("(https://arxiv.org/abs/2504.19599).")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "missing", "extra"),
    [
        (["quickstart"], _TRL, "trl"),
        (["train", "--help"], _TRL, "trl"),
        (["data", "gsm8k", "--output", "data"], _TRL, "trl"),
        (["eval", "--model", "m", "--data", "gsm8k", "--output", "e"], _TRL, "trl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_without_its_extra_a_command_ends_in_a_sentence_that_names_it(
    argv: list[str], missing: list[str], extra: str, site: Path, tmp_path: Path
) -> None:
    done = run(site, tmp_path, "-c", WITHOUT.format(missing=missing, argv=argv))
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("gvpo: ")
    assert f"gvpo[{extra}]" in sentence
    assert not list(tmp_path.iterdir())
