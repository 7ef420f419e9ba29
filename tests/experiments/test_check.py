"""The documentation's numbers are the results', and the check would notice if they were not."""

import json
import shutil
from pathlib import Path

import pytest

from experiments.check import Results, main, pages_of, renew
from experiments.comparison import Interval
from experiments.report import save
from experiments.runner import EXPERIMENTS
from gvpo.errors import InputError
from gvpo.run import new_figure

ROOT = Path(__file__).parents[2]


def test_the_documentation_agrees_with_the_results() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages_of(ROOT / "docs"))
    assert "<!--lab-table:language|" in text
    for experiment in EXPERIMENTS:
        assert f"<!--lab-table:{experiment}|" in text
        assert not json.loads((ROOT / "results" / experiment / "summary.json").read_text())["quick"]
    main(ROOT / "docs", ROOT / "results")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    def cell(*seeds: float) -> dict:
        return vars(Interval.of(seeds))

    row = {"arm": "gvpo", "label": "GVPO", "setting": {"lr": 0.1}}
    summary = {
        "experiment": "offline",
        "rows": [
            {**row, "condition": "log", "kl": cell(0.011, 0.013)},
            {**row, "condition": "other", "kl": cell(0.5, 0.7)},
            {**row, "arm": "dpo", "label": "DPO", "condition": "log", "kl": cell(1.0, 2.0)},
        ],
        "problem": {"steps": 320},
    }
    (tmp_path / "results" / "offline").mkdir(parents=True)
    (tmp_path / "results" / "offline" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "docs").mkdir()
    return tmp_path


def write(site: Path, text: str) -> None:
    (site / "docs" / "page.md").write_text(text, encoding="utf-8")


def test_what_is_written_up_to_date_passes_and_what_is_changed_does_not(site: Path) -> None:
    page = site / "docs" / "page.md"
    write(
        site,
        "KL is 9<!--lab:offline|rows|gvpo|log|kl--> (worst 9<!--lab:offline|rows|gvpo|log|kl|worst-->) after "
        "9<!--lab:offline|problem|steps--> steps.\n\n<!--lab-table:offline|rows|kl-->\nold\n<!--/lab-->\n",
    )
    with pytest.raises(InputError, match=r"page\.md:1: .*KL is 9.* should be .*KL is 0\.012"):
        main(site / "docs", site / "results")
    main(site / "docs", site / "results", write=True)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("KL is 0.012<!--lab:")
    assert "worst 0.013<!--" in text
    assert "after 320<!--" in text
    assert "| GVPO | 0.012 ±" in text
    assert "| DPO | 1.500 ±6.353 |  |" in text
    main(site / "docs", site / "results")
    page.write_text(text.replace("1.500", "1.501"), encoding="utf-8")
    with pytest.raises(InputError, match=r"1\.501"):
        main(site / "docs", site / "results")


def test_a_picture_of_other_results_is_noticed(site: Path) -> None:
    write(site, "![KL](assets/lab/offline.png)")
    summary = site / "results" / "offline" / "summary.json"
    picture = site / "docs" / "assets" / "lab" / "offline.png"
    picture.parent.mkdir(parents=True)
    with pytest.raises(InputError, match=r"offline\.png was not drawn from"):
        main(site / "docs", site / "results")
    found = json.loads(summary.read_text())
    save(new_figure()[0], picture, found)
    main(site / "docs", site / "results")
    summary.write_text(json.dumps(found | {"problem": {"steps": 321}}))
    with pytest.raises(InputError, match=r"offline\.png was not drawn from"):
        main(site / "docs", site / "results")


def test_results_of_another_run_are_drawn_by_their_experiment(site: Path) -> None:
    shutil.copytree(ROOT / "results" / "language", site / "results" / "language_again")
    (site / "docs" / "assets" / "lab").mkdir(parents=True)
    write(site, "![Reward](assets/lab/language_again.png)")
    main(site / "docs", site / "results", write=True)
    assert (site / "docs" / "assets" / "lab" / "language_again.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("KL is 1<!--lab:offline|rows|grpo|log|kl-->", "nothing at offline"),
        ("KL is 1<!--lab:offline|rows|gvpo|kl-->", "nothing at offline"),
        ("KL is 1<!--lab:foreign|rows|gvpo|kl-->", "run gvpo lab foreign"),
        ("KL is small<!--lab:offline|rows|gvpo|log|kl-->", "no number before it"),
        ("<!--lab-table:offline|rows|kl-->\nnever ended", "no end"),
    ],
)
def test_marks_that_lead_nowhere_are_said(site: Path, text: str, words: str) -> None:
    write(site, text)
    with pytest.raises(InputError, match=words):
        main(site / "docs", site / "results")


def test_renewing_twice_changes_nothing(site: Path) -> None:
    results = Results(site / "results")
    once = renew("<!--lab-table:offline|rows|kl-->\nx<!--/lab-->", results)
    assert renew(once, results) == once
