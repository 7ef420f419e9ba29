"""Where a completion's final answer is found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo.rewards import extract_answer
from gvpo.rewards.statements import boxed_contents


@pytest.mark.parametrize(
    ("completion", "text", "form"),
    [
        (r"so $\boxed{72}$.", "72", "boxed"),
        (r"$\boxed{1}$ and $\boxed{-2}$", "1, -2", "boxed"),
        (r"\boxed{5}. We check our answer: $2+2=4$.", "5", "boxed"),
        ("9*2=18\n#### 18", "18", "hash"),
        ("<answer>\n5 \n</answer>", "5", "tag"),
        ("**Answer:** 5 apples", "5 apples", "phrase"),
        ("The answer is $x$ or $y$.", "x, y", "phrase"),
        ("Altogether, she sold 48 + 24 = 72 clips.", "72", "closing"),
        ("She pays $64 for the 16 glasses.", "$64", "closing"),
    ],
)
def test_answer_and_form(completion, text, form):
    answer = extract_answer(completion)
    assert (answer.text, answer.form) == (text, form)
    assert answer.explicit == (form != "closing")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        "I cannot solve this problem.",
        r"\boxed{72",
        r"\boxed{}",
        "#### ",
        "the total is 48 +",
        "The answer is",
    ],
)
def test_no_answer(completion):
    assert extract_answer(completion) is None


def test_last_statement_counts():
    assert extract_answer("The answer is 4. Let me redo this. The answer is 5.").text == "5"


def test_a_problem_that_the_model_sets_itself_is_cut_off():
    assert extract_answer("#### 18\n\nQuestion: Tom has 3.\nAnswer: 3\n#### 3").text == "18"


def test_retracted_answer_is_replaced():
    assert extract_answer("The answer is 5. Wait, one was eaten. So there are 4 apples.").text == "4"


def test_only_the_conclusion_of_a_thought_counts():
    assert extract_answer(r"<think>\boxed{6}?</think>It is \boxed{5}.").text == "5"
    assert extract_answer("<think>The answer is 6. But") is None


@given(
    st.text(st.characters(blacklist_characters="\\{}", blacklist_categories=("Cs",)), max_size=200),
    st.integers(),
)
def test_a_final_box_wins_whatever_precedes_it(noise, number):
    answer = extract_answer(f"{noise}\n\nFinally, the total: $\\boxed{{{number}}}$.")
    assert answer is not None
    assert answer.text == str(number)


@given(st.text(max_size=400))
def test_any_text_is_read_without_error(text):
    answer = extract_answer(text)
    assert answer is None or answer.text.strip()


@given(
    st.recursive(
        st.sampled_from("ab1"),
        lambda inner: st.builds("{{{}}}".format, inner) | st.builds("{}{}".format, inner, inner),
    )
)
def test_boxed_contents_are_balanced(content):
    assert boxed_contents(f"x \\boxed{{{content}}} y") == [content]
