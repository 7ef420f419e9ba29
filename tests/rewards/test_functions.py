"""Reward functions by name, their protocol, and verl's entry point."""

import json

import pytest

from gvpo.errors import InputError
from gvpo.rewards import REWARDS, combine, compute_score, load_reward


def completion(text):
    return [{"role": "assistant", "content": text}]


def test_accuracy_takes_texts_and_conversations():
    accuracy = load_reward("accuracy")
    assert accuracy.__name__ == "accuracy"
    rewards = accuracy(
        prompts=["", "", ""],
        completions=["#### 5", completion(r"\boxed{6}"), completion("The answer is 5.")],
        answer=["5", "5", "5"],
        trainer_state=object(),
    )
    assert rewards == [1.0, 0.0, 1.0]


def test_a_closing_sentence_counts_only_where_that_is_asked_for():
    for spec, reward in (("accuracy", 0.0), ("accuracy:sentence", 1.0)):
        function = load_reward(spec)
        assert function.__name__ == "accuracy"
        assert function(prompts=[""], completions=["So there are 5."], answer=["5"]) == [reward]
    assert compute_score("openai/gsm8k", "So there are 5.", "5", closing="sentence") == 1.0


def test_accuracy_without_a_truth_is_unknown():
    assert load_reward("accuracy")(prompts=[""], completions=["5"], answer=[None]) == [None]


def test_missing_column():
    with pytest.raises(InputError, match="column 'answer'"):
        load_reward("accuracy")(prompts=[""], completions=["5"])


def test_exact_is_to_the_letter():
    assert load_reward("exact")(prompts=[""] * 3, completions=["041 ", "41", "41."], answer=["041"] * 3) == [
        1,
        0,
        0,
    ]


def test_format_asks_for_an_explicit_statement():
    texts = [r"\boxed{5}", "#### 5", "5"]
    assert load_reward("format")(prompts=[""] * 3, completions=texts) == [1, 1, 0]


def test_length_falls_from_80_percent_of_the_limit():
    rewards = load_reward("length:100")(
        prompts=[""] * 4, completions=[""] * 4, completion_ids=[[1] * n for n in (80, 90, 100, 500)]
    )
    assert rewards == pytest.approx([0, -0.5, -1, -1])


def test_weighted_sum():
    reward = load_reward("accuracy + 0.25*format - 0.5*length:100")
    assert reward.__name__ == "accuracy_format_length"
    ids = [[1] * 10, [1] * 200]
    assert reward(
        prompts=["", ""], completions=["#### 5", "#### 6"], answer=["5", "5"], completion_ids=ids
    ) == [1.25, 0.75]


def test_weighted_sum_is_unknown_where_a_term_is():
    reward = combine([REWARDS["accuracy"], REWARDS["format"]], [1.0, 1.0])
    assert reward(prompts=["", ""], completions=["#### 5", "#### 5"], answer=[None, "5"]) == [None, 2.0]


def test_own_function(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("mine:short")(prompts=[""], completions=["abc"]) == [-3]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", "accuracy, exact, format, length, reasoning_gym"),
        ("no_such_module:f", "cannot be imported"),
        ("json:no_such_function", "no attribute 'no_such_function'"),
        ("json:JSONDecoder", "is no function"),
        ("length:0", "length:512"),
        ("", "describes no reward"),
        ("accuracy format", "describes no reward"),
    ],
)
def test_bad_descriptions(spec, message):
    with pytest.raises(InputError, match=message):
        load_reward(spec)


def test_compute_score_takes_answers_and_whole_solutions():
    assert compute_score("openai/gsm8k", "The answer is 5.", "5") == 1.0
    assert compute_score("openai/gsm8k", "The answer is 5.", "2+3=5\n#### 5", {"split": "train"}) == 1.0
    assert compute_score("DigitalLearningGmbH/MATH-lighteval", r"\boxed{6}", r"so $\boxed{5}$") == 0.0


def test_reasoning_gym_scores_with_the_task():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("gcd", size=1, seed=0)[0]
    columns = {"task": ["gcd"] * 2, "entry": [json.dumps(entry, default=str)] * 2}
    texts = [f"<answer>{entry['answer']}</answer>", "<answer>999999</answer>"]
    rewards = load_reward("reasoning_gym")(prompts=["", ""], completions=texts, **columns)
    assert rewards[0] == 1.0
    assert rewards[1] < 1.0
    assert compute_score("reasoning_gym/gcd", texts[0], "", {"entry": columns["entry"][0]}) == 1.0
