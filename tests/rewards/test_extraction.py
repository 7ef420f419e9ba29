"""Where a completion's final answer is found."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo.errors import InputError
from gvpo.rewards import extract_answer
from gvpo.rewards.extraction import any_answer


@pytest.mark.parametrize(
    ("completion", "text", "form"),
    [
        (r"so $\boxed{72}$.", "72", "boxed"),
        (r"$\boxed{1}$ and $\boxed{-2}$", "1, -2", "boxed"),
        (r"\boxed{5}. We check our answer: $2+2=4$.", "5", "boxed"),
        (r"\boxed{5}. Our answer is consistent with the 8 given.", "5", "boxed"),
        (r"\boxed{5}. Step 2 gives \boxed{6}.", "6", "boxed"),
        ("9*2=18\n#### 18", "18", "hash"),
        ("#### 1. First of all\n#### 18", "18", "hash"),
        ("<answer>\n5 \n</answer>", "5", "tag"),
        ("**Answer:** 5 apples", "5 apples", "phrase"),
        ("Answer: She has 5 apples left.", "5", "phrase"),
        ("The answer is 5, since there are 8 and 3 go.", "5", "phrase"),
        ("The answer is $x$ or $y$.", "$x$ or $y$", "phrase"),
        ("The correct option is B.", "B", "phrase"),
        ("The answer to the question of how many there are is 30.", "30", "phrase"),
        ("## Final Answer\n\n$\\frac12$", "$\\frac12$", "phrase"),
        ("18 dollars", "18 dollars", "bare"),
        ("(B)", "(B)", "bare"),
    ],
)
def test_answer_and_form(completion, text, form):
    answer = extract_answer(completion)
    assert (answer.text, answer.form) == (text, form)
    assert answer.explicit == (form != "bare")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        "I cannot solve this problem.",
        "Altogether, she sold 48 + 24 = 72 clips.",
        r"\boxed{72",
        r"\boxed{5} and then \boxed{72",
        r"\boxed{}",
        "#### ",
        "The answer is",
        "The answer is 48 +",
        "The final answer is not 5.",
        "Is the answer 5? The answer is 5?",
        "I was told that the answer is 5.",
        "The answer is 5, which is wrong.",
        "The answer is 5. That can't be right, it has to be 6.",
        "The answer is unknown. (A guess: 5.)",
        "If one more came, the answer would be 5.",
        "Tom says the answer is 5.",
        "The answer to the first part is 5.",
        "The answer is 42. However, I made an error: it's 41.",
        "The answer is 5. Wait, one was eaten. So there are 4.",
        r"<think>So \boxed{6}? But",
    ],
)
def test_no_answer(completion):
    assert extract_answer(completion) is None


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("Altogether, she sold 48 + 24 = <<48+24=72>>72 clips in May.", "72"),
        ("Therefore, she makes **$18** every day.", "$18"),
        ("She sold 72 clips of 90.", None),
        ("We need to find x such that x + 3 = 8.", None),
        ("She sold 72 clips and", None),
        ("So: 42. If you have 2 more questions, ask.", None),
    ],
)
def test_the_last_sentence_counts_where_that_is_asked_for(completion, text):
    answer = extract_answer(completion, closing="sentence")
    assert (answer and answer.text) == text
    assert answer is None or not answer.explicit


def test_an_unknown_closing_is_refused():
    with pytest.raises(InputError, match="closing='word'"):
        extract_answer("5", closing="word")


def test_last_statement_counts():
    assert extract_answer("The answer is 4. Let me redo this. The answer is 5.").text == "5"


def test_a_problem_that_the_model_sets_itself_is_cut_off():
    assert extract_answer("#### 18\n\nQuestion: Tom has 3.\nAnswer: 3\n#### 3").text == "18"


def test_only_the_conclusion_of_a_thought_counts():
    assert extract_answer(r"<think>\boxed{6}?</think>It is \boxed{5}.").text == "5"


@given(
    # "<" could end the turn or begin a thought: what follows would then not be the answer.
    st.text(st.characters(blacklist_characters="\\{}<", blacklist_categories=("Cs",)), max_size=200),
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
def test_boxed_answers_are_balanced(content):
    assert any_answer(f"x \\boxed{{{content}}} y") == (content.strip() or None)


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        ("#### 72", "72"),
        ("#### -5", "-5"),
        ("#### 1,450,000", "1450000"),
        ("#### five", None),
        (142.0, "142"),
        (["9.6\n"], "9.6"),
        (["4.4e7\n", r"4.4 \times 10^7", "4.4e7"], json.dumps(["4.4e7", r"4.4 \times 10^7"])),
        ([r"$\frac{1}{2n}$"], r"\frac{1}{2n}"),
        ("$69$,$84$", "$69$,$84$"),
        (r"\frac{1}{", None),
        ("", None),
        (None, None),
        (True, None),
        ([], None),
    ],
)
def test_ground_truths(value, truth):
    assert any_answer(value) == truth
