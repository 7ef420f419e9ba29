"""A release: version, changelog, commit, tag, wheel and sdist, checked.

    python -m tools.release 0.2.0            # everything in a temporary clone; tells what would be
    python -m tools.release 0.2.0 --apply    # the same, then commit, tag and dist/ come into the repository

The work is done in a clone: what fails leaves the repository as it was. Nothing is pushed or uploaded.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from packaging.version import InvalidVersion, Version

from gvpo.errors import InputError

ROOT = Path(__file__).parents[1]
VERSION = Path("src/gvpo/_version.py")
CHANGES = Path("CHANGELOG.md")
CITATION = Path("CITATION.cff")
UNRELEASED = "## Unreleased"


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"git {words[0]} failed in {folder}: {done.stderr.strip()}")
    return done.stdout.strip()


def notes(changes: str) -> str:
    """What the changelog says under its heading of unreleased changes."""
    _, heading, rest = changes.partition(f"{UNRELEASED}\n")
    text = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    if not heading or not re.search(r"^- ", text, flags=re.MULTILINE):
        raise InputError(f"{CHANGES} has no changes under '{UNRELEASED}': say there what the release brings.")
    return text.strip()


def check(root: Path, version: str) -> None:
    """Refuse an odd or old version, a tag that is there, a dirty tree, and a changelog that says nothing."""
    try:
        wanted = Version(version)
    except InvalidVersion:
        raise InputError(f"{version} is no version: give one such as 0.2.0.") from None
    before = re.findall(r'"(.+)"', (root / VERSION).read_text(encoding="utf-8"))[0]
    if str(wanted) != version:
        raise InputError(f"{version} is written {wanted}: give it so.")
    if git(root, "tag", "--list", f"v{version}"):
        raise InputError(f"the tag v{version} is there already: give a version after {before}.")
    if wanted < Version(before):
        raise InputError(f"{version} is older than {before}, the version of {VERSION}.")
    if dirty := git(root, "status", "--porcelain"):
        raise InputError(f"the working tree has changes: commit or stash them.\n{dirty}")
    notes((root / CHANGES).read_text(encoding="utf-8"))


def edit(root: Path, version: str, today: str) -> None:
    """Write version and date where they belong."""
    (root / VERSION).write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    changes = (root / CHANGES).read_text(encoding="utf-8")
    changes = changes.replace(UNRELEASED, f"{UNRELEASED}\n\n## {version} – {today}", 1)
    (root / CHANGES).write_text(changes, encoding="utf-8")
    citation = (root / CITATION).read_text(encoding="utf-8")
    citation = re.sub(r"^(version|date-released):.*\n", "", citation, flags=re.MULTILINE)
    citation = citation.replace(
        "type: software\n", f'type: software\nversion: "{version}"\ndate-released: {today}\n', 1
    )
    (root / CITATION).write_text(citation, encoding="utf-8")


def run(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(words[:3])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(clone: Path, version: str) -> list[Path]:
    """Wheel and sdist, as an index would take them; the wheel, unpacked, must be of the version."""
    run(clone, "-m", "build", "--no-isolation", "--outdir", "dist")
    files = sorted((clone / "dist").iterdir())
    run(clone, "-m", "twine", "check", "--strict", *map(str, files))
    (wheel,) = (f for f in files if f.suffix == ".whl")
    run(clone, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", str(wheel))
    shown = run(clone / "site", "-c", "import gvpo; print(gvpo.__version__, gvpo.__file__)").split()
    if shown[0] != version or not Path(shown[1]).is_relative_to(clone / "site"):
        raise InputError(f"the wheel holds version {shown[0]} at {shown[1]}, not {version}.")
    return files


def release(root: Path, version: str, *, apply: bool) -> None:
    """Make the release in a clone, and bring it into `root` if `apply`."""
    check(root, version)
    today, branch = date.today().isoformat(), git(root, "rev-parse", "--abbrev-ref", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "gvpo"
        git(root, "clone", "--quiet", "--branch", branch, str(root), str(clone))
        told = notes((clone / CHANGES).read_text(encoding="utf-8"))
        edit(clone, version, today)
        for key in ("user.name", "user.email"):
            git(clone, "config", key, git(root, "config", key))
        git(clone, "commit", "--quiet", "--all", "--message", f"Release {version}")
        git(
            clone,
            "tag",
            "--annotate",
            f"v{version}",
            "--message",
            f"gvpo {version}\n\n{told}",
            "--cleanup=verbatim",
        )
        files = build(clone, version)
        print(f"{git(clone, 'show', '--stat', '--format=%s', 'HEAD')}\n\nv{version}:\n\n{told}\n")
        print("\n".join(f"dist/{f.name}  {f.stat().st_size / 1024:.0f} KiB" for f in files))
        if not apply:
            print(f"\nNothing was changed. To do it: make release VERSION={version} APPLY=1")
            return
        git(root, "pull", "--quiet", "--ff-only", str(clone), branch)
        git(root, "fetch", "--quiet", str(clone), f"refs/tags/v{version}:refs/tags/v{version}")
        shutil.rmtree(root / "dist", ignore_errors=True)
        shutil.copytree(clone / "dist", root / "dist")
    print(f"\nDone. Next: make wheel (tries it), git push --follow-tags, twine upload dist/gvpo-{version}*")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__.partition("\n")[0])
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("--apply", action="store_true", help="commit, tag and dist/ in this repository")
    given = parser.parse_args(argv)
    try:
        release(ROOT, given.version, apply=given.apply)
    except InputError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
