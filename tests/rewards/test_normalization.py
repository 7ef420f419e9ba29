"""How numbers are read."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo.rewards.normalization import clean, quantity


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1,234.50", Fraction(2469, 2)),
        ("1 234", Fraction(1234)),
        (r"10,\!080", Fraction(10080)),
        (r"\$32,\!348", Fraction(32348)),
        ("-$5", Fraction(-5)),
        ("negative 4", Fraction(-4)),
        (r"\frac43", Fraction(4, 3)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("3½ hours", Fraction(7, 2)),
        (r"3 \times 10^{8}", Fraction(300_000_000)),
        ("4.5e-3", Fraction(9, 2000)),
        ("twenty-one apples", Fraction(21)),
        ("1 4/5", Fraction(9, 5)),
        ("2 million", Fraction(2_000_000)),
        (r"90^\circ", Fraction(90)),
        (r"864 \mbox{ inches}^2", Fraction(864)),
    ],
)
def test_quantities(written, value):
    assert quantity(clean(written)).value == value


@pytest.mark.parametrize(
    "written", ["5x", "2k", r"2\pi", r"5\sqrt{2}", "5 or 6", "2,3", "5!", "52_8", "x=5", "", "1e999999999"]
)
def test_not_quantities(written):
    assert quantity(clean(written)) is None


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_do_not_change_a_number(number):
    assert quantity(clean(f"{number:,}")).value == quantity(clean(str(number))).value == number


@given(st.text(max_size=60))
def test_cleaning_is_idempotent_and_total(text):
    once = clean(text)
    assert clean(clean(once)) == clean(once)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_in_all_notations_are_one_number(top, bottom):
    expected = Fraction(top, bottom)
    for written in (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"$\dfrac{{{top}}}{{{bottom}}}$"):
        assert quantity(clean(written)).value == expected
