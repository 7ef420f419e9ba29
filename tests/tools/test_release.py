"""A release is whole or not made at all: in clones of this repository, with the real git, build and twine."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from gvpo.errors import InputError
from tools.release import CHANGES, CITATION, ROOT, VERSION, check, git, release

NOTES = '### Added\n- A thing (`thing`), with a *star* and a "quote".\n\n### Fixed\n- Another.'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This repository with one unreleased change, and nothing in the way."""
    folder = tmp_path / "gvpo"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    git(folder, "checkout", "--quiet", "-B", "main")
    git(folder, "config", "user.name", "Tester")
    git(folder, "config", "user.email", "tester@example.org")
    (folder / CHANGES).write_text(f"# Changes\n\n## Unreleased\n\n{NOTES}\n", encoding="utf-8")
    git(folder, "commit", "--quiet", "--allow-empty", "--all", "--message", "Say what is new")
    return folder


@pytest.mark.slow
def test_a_dry_run_changes_nothing_and_a_release_is_version_changelog_tag_and_files(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = git(clone, "rev-parse", "HEAD")
    release(clone, "7.8.9", apply=False)
    told = capsys.readouterr().out
    assert NOTES in told
    assert "gvpo-7.8.9-py3-none-any.whl" in told
    assert "Nothing was changed" in told
    assert (git(clone, "rev-parse", "HEAD"), git(clone, "tag"), git(clone, "status", "--porcelain")) == (
        before,
        "",
        "",
    )

    release(clone, "7.8.9", apply=True)
    assert git(clone, "rev-parse", "HEAD^") == before
    assert git(clone, "rev-parse", "v7.8.9^{commit}") == git(clone, "rev-parse", "HEAD")
    assert NOTES in git(clone, "tag", "--list", "--format=%(contents)", "v7.8.9")
    assert git(clone, "diff", "--name-only", before).split() == [str(CHANGES), str(CITATION), str(VERSION)]
    assert "7.8.9" in (clone / VERSION).read_text()
    assert "## Unreleased\n\n## 7.8.9 – 20" in (clone / CHANGES).read_text()
    assert 'version: "7.8.9"\ndate-released: 20' in (clone / CITATION).read_text()
    assert sorted(f.name for f in (clone / "dist").iterdir()) == [
        "gvpo-7.8.9-py3-none-any.whl",
        "gvpo-7.8.9.tar.gz",
    ]
    with tarfile.open(clone / "dist" / "gvpo-7.8.9.tar.gz") as source:
        inside = {"/".join(name.split("/")[1:3]) for name in source.getnames()}
    assert inside >= {"docs/index.md", "tests/models.py", "tools/release.py", "README.md", "pyproject.toml"}
    assert not [
        name for name in inside if name.startswith(("results", "benchmarks/results", ".compat", "runs"))
    ]
    assert git(clone, "status", "--porcelain") == ""
    with pytest.raises(InputError, match="no changes under '## Unreleased'"):
        check(clone, "7.9.0")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("new", "new is no version"),
        ("7.8.9-rc1", "is written 7.8.9rc1"),
        ("0.0.1", "0.0.1 is older than"),
        ("5.0.0", "the tag v5.0.0 is there already"),
    ],
)
def test_a_version_that_cannot_be_is_refused(clone: Path, version: str, message: str) -> None:
    git(clone, "tag", "v5.0.0")
    with pytest.raises(InputError, match=message):
        check(clone, version)


def test_a_dirty_tree_and_an_empty_changelog_are_refused(clone: Path) -> None:
    (clone / "stray.txt").write_text("")
    with pytest.raises(InputError, match=r"has changes: commit or stash them.\n\?\? stray.txt"):
        check(clone, "7.8.9")
    (clone / "stray.txt").unlink()
    (clone / CHANGES).write_text(
        "# Changes\n\n## Unreleased\n\n### Added\n\n## 0.0.1\n- Old.\n", encoding="utf-8"
    )
    git(clone, "commit", "--quiet", "--all", "--message", "Say nothing")
    with pytest.raises(InputError, match="no changes under '## Unreleased'"):
        check(clone, "7.8.9")


@pytest.mark.slow
def test_what_fails_on_the_way_leaves_the_repository_as_it_was(clone: Path) -> None:
    (clone / VERSION).write_text('__version__ = "0.1.0"\n')
    (clone / "pyproject.toml").write_text("[build-system]\n")
    git(clone, "commit", "--quiet", "--all", "--message", "Break the build")
    before = git(clone, "rev-parse", "HEAD")
    with pytest.raises(InputError, match="build"):
        release(clone, "7.8.9", apply=True)
    assert (git(clone, "rev-parse", "HEAD"), git(clone, "tag")) == (before, "")
    assert not (clone / "dist").exists()
