"""The notebooks run, and their pages in the documentation are what they are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from tests.trl.chat_model import save_chat_model

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))


def cells(notebook: Path) -> Iterator[tuple[bool, str]]:
    """Whether it is code, and its text, of each cell."""
    for cell in re.split(r"^# %%", notebook.read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, text = cell.partition("\n")
        code = "[markdown]" not in head
        yield code, (text if code else re.sub(r"^# ?", "", text, flags=re.M)).strip()


def run(name: str, **constants: Any) -> dict[str, Any]:
    """What a notebook leaves behind, with some of its constants changed."""
    path = ROOT / "examples" / "notebooks" / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    for constant, value in constants.items():
        source, count = re.subn(rf"^{constant} = .*$", f"{constant} = {value!r}", source, flags=re.M)
        assert count == 1, constant
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def without_a_screen() -> Iterator[None]:
    matplotlib.use("agg")
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_shows_its_notebook(notebook: Path) -> None:
    page = (ROOT / "docs" / "notebooks" / f"{notebook.stem}.md").read_text(encoding="utf-8")
    code = [block.strip() for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)]
    assert code == [text for is_code, text in cells(notebook) if is_code], "make notebooks"
    for is_code, text in cells(notebook):
        assert is_code or text in page, "make notebooks"
    pictures = re.findall(r"!\[png\]\((.+?)\)", page)
    assert bool(pictures) != ("Not run yet" in page)
    assert all((ROOT / "docs" / "notebooks" / picture).is_file() for picture in pictures)


@pytest.mark.slow
def test_the_formula_in_60_lines() -> None:
    source = "\n".join(text for code, text in cells(NOTEBOOKS[0].with_name("formula.py")) if code)
    assert len([line for line in source.splitlines() if line and not line.startswith("#")]) <= 60
    found = run("formula")
    distances = {(loss.__name__, who): gone[-1] for (loss, who), (_, gone) in found["found"].items()}
    assert len(distances) == 8
    assert all(distance < 1e-7 for (loss, _), distance in distances.items() if loss == "gvpo")
    assert all(distance > 0.01 for (loss, _), distance in distances.items() if loss == "grpo")
    assert (found["logps"].grad + found["weights"]).abs().max() < 1e-15


@pytest.mark.slow
def test_a_reward_of_your_own(tmp_path: Path) -> None:
    model = str(save_chat_model(tmp_path / "model"))
    found = run("own_reward", MODEL=model, STEPS=2, OUTPUT=str(tmp_path / "run"))
    assert [row["country"] for row in found["held_out"]][:2] == ["Peru", "Cuba"]
    assert len(found["training"]) == 32
    assert [line["step"] for line in found["lines"]] == [1, 2]
    assert set(found["exam_after"]) >= {"eval_rewards/form/mean", "eval_rewards/fact/mean"}
    assert found["form"]([[{"content": "[1]"}], [{"content": '{"a": 1}'}]], ["Peru"] * 2) == [0, 0.3]


@pytest.mark.slow
def test_learning_from_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("logs", MODEL=str(save_chat_model(tmp_path / "model")), STEPS=2, FOLDER=str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [len(line["response"]["choices"]) for line in lines] == [6] * 32
    assert not any(country in json.dumps(lines) for country in found["HELD_OUT"])
    assert "GVPO 2/2" in capsys.readouterr().out
    assert [found["stars"](text, "Peru") for text in ("no", "[1]", '{"country": "Peru"}')] == [1, 3, 5]
    assert len(found["after"]["Peru"]) == 4
