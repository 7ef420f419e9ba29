"""The documentation's benchmark tables are those of the results."""

import pytest

from benchmarks import page


def test_tables_are_the_results() -> None:
    pages = [path.read_text() for path in page.DOCS.rglob("*.md")]
    assert sum(text.count("<!--bench:") for text in pages) >= 8
    for text in pages:
        assert page.renew(text) == text


def test_a_changed_number_is_noticed() -> None:
    text = (page.DOCS / "performance.md").read_text()
    at = text.index("<!--bench:step")
    digit = next(i for i, c in enumerate(text) if i > at and c == "|" and text[i + 2].isdigit()) + 2
    changed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    assert changed != text
    assert page.renew(changed) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"),
        (1234.5, "1,234"),
        (5e-7, "5e-07"),
        ([0.5, 1], "0.5 / 1"),
        (None, "–"),
        (False, "no"),
    ],
)
def test_cells(value, shown) -> None:
    assert page.text(value) == shown
