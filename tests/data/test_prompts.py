"""Prompt data sets by name, and what is refused."""

import json

import pytest

from gvpo.data import load_prompts
from gvpo.errors import InputError

QUESTION = "How many?"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_gsm8k_has_the_published_recipe_s_prompt(tmp_path):
    file = write(tmp_path / "train.jsonl", [{"question": QUESTION, "answer": "2+70=72\n#### 1,072"}])
    row = load_prompts(f"gsm8k:{file}")[0]
    instruction = 'Let\'s think step by step and output the final answer after "####".'
    assert row["prompt"] == [{"role": "user", "content": f"{QUESTION} {instruction}"}]
    assert row["answer"] == "1072"
    assert row["data_source"] == "openai/gsm8k"


def test_math_takes_the_boxed_answer_of_a_solution(tmp_path):
    file = write(tmp_path / "m.jsonl", [{"problem": QUESTION, "solution": r"so $\boxed{\frac{1}{2}}$."}])
    row = load_prompts("math", source=file, system_prompt="Be brief.")[0]
    assert row["answer"] == r"\frac{1}{2}"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"].endswith(r"within \boxed{}.")


def test_columns_and_instruction_of_any_file(tmp_path):
    file = write(tmp_path / "mine.jsonl", [{"q": QUESTION, "a": 5}])
    row = load_prompts(file, columns={"prompt": "q", "answer": "a"}, instruction="")[0]
    assert row["prompt"] == [{"role": "user", "content": QUESTION}]
    assert row["answer"] == "5"
    assert row["data_source"] == "mine"


def test_plain_text(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "07+95=", "answer": "201"}])
    assert load_prompts(file, chat=False)[0]["prompt"] == "07+95="


def test_conversations_are_kept(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = write(tmp_path / "c.jsonl", [{"prompt": messages, "answer": "5"}])
    assert load_prompts(file, system_prompt="other")[0]["prompt"] == messages


def test_unparsable_truths_are_dropped_and_counted(tmp_path, caplog):
    rows = [{"question": QUESTION, "answer": answer} for answer in ("#### 5", "no number", "#### ", "#### x")]
    assert len(load_prompts(f"gsm8k:{write(tmp_path / 'a.jsonl', rows)}")) == 1
    assert "3 rows: the ground truth cannot be parsed" in caplog.text


def test_size_draws_at_random_but_keeps_the_order(tmp_path):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(50)]
    file = write(tmp_path / "n.jsonl", rows)
    chosen = [int(row["answer"]) for row in load_prompts(file, size=10, seed=1)]
    assert len(chosen) == 10
    assert chosen == sorted(chosen)
    assert chosen == [int(row["answer"]) for row in load_prompts(file, size=10, seed=1)]
    assert chosen != [int(row["answer"]) for row in load_prompts(file, size=10, seed=2)]


def test_rewards_of_ones_own_need_no_ground_truths(tmp_path):
    asked = write(tmp_path / "asked.jsonl", [{"question": "Why?"}])
    (row,) = load_prompts(asked, answers=False)
    assert row.keys() == {"prompt", "data_source"}
    assert row["prompt"] == [{"role": "user", "content": "Why?"}]  # no box for a checked answer
    (row,) = load_prompts(asked, answers=False, instruction="Be brief.")
    assert row["prompt"][0]["content"] == "Why? Be brief."
    with pytest.raises(InputError, match="no column 'answer'"):
        load_prompts(asked)
    answered = write(tmp_path / "answered.jsonl", [{"question": "1+1?", "answer": "2"}])
    assert load_prompts(answered, answers=False)[0] == load_prompts(answered)[0]
    with pytest.raises(InputError, match="no column 'truth'"):
        load_prompts(answered, answers=False, columns={"answer": "truth"})


def test_arithmetic_is_right_and_its_splits_are_apart():
    train, test = load_prompts("arithmetic", seed=3), load_prompts("arithmetic", split="test", seed=4)
    assert (len(train), len(test)) == (9000, 1000)
    assert not set(train["prompt"]) & set(test["prompt"])
    for row in train.select(range(100)):
        left, right = row["prompt"].rstrip("=").split("+")
        assert int(left) + int(right) == int(row["answer"])


def test_reversed_arithmetic_has_fixed_widths():
    row = load_prompts("arithmetic:reversed", size=1)[0]
    left, right = row["prompt"].rstrip("=").split("+")
    assert (len(left), len(right), len(row["answer"])) == (2, 2, 3)
    assert int(row["answer"][::-1]) == int(left) + int(right)


def test_reasoning_gym_keeps_the_entry():
    pytest.importorskip("reasoning_gym")
    train = load_prompts("reasoning_gym:gcd", size=3)
    assert json.loads(train[0]["entry"])["answer"] == train[0]["answer"]
    assert train["prompt"] != load_prompts("reasoning_gym:gcd", split="test", size=3)["prompt"]


GOOD = b'{"question": "a?", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (GOOD + b"{not json}\n", "row 2 is not JSON"),
        (GOOD + b'["a list"]\n', "row 2 is not a JSON object"),
        (GOOD + '{"question": "é", "answer": "#### 1"}\n'.encode("latin-1"), "row 2: byte 0xe9 is not UTF-8"),
        (
            b'{"text": "a?", "answer": "#### 1"}\n',
            "no column 'question' or 'prompt'.*it has 'text', 'answer'",
        ),
        (b'{"question": "a?"}\n', "no column 'answer'"),
        (GOOD + b'{"question": "b?"}\n', "row 2 has no column 'answer'"),
        (b'{"question": 7, "answer": "#### 1"}\n', "row 1: the question is a int"),
        (b'{"prompt": ["a"], "answer": "1"}\n', "row 1: the prompt is a list but not of messages"),
        (b'{"id": 1, "question": "a?", "answer": "#### 1"}\n' * 2, "row 2 repeats the id 1 of row 1"),
        (b'{"question": "a?", "answer": "unknown"}\n', "no usable row of 1"),
    ],
)
def test_bad_files_are_refused_with_place_and_reason(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_prompts(f"gsm8k:{file}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsm9k", {}, "choose one of gsm8k, math"),
        ("gsm8k:missing.jsonl", {}, "missing.jsonl is not a file"),
        ("aime24", {"split": "train"}, "has no train split"),
        ("gsm8k", {"split": "dev"}, "choose train or test"),
        ("arithmetic", {"size": 9001}, "ask for fewer"),
        ("arithmetic", {"size": 0}, "at least one"),
        ("reasoning_gym:no_such_task", {}, "no task 'no_such_task'"),
    ],
)
def test_bad_requests(name, options, message):
    with pytest.raises(InputError, match=message):
        load_prompts(name, **options)


def test_bad_parquet(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"bad\.parquet cannot be read as parquet"):
        load_prompts(str(tmp_path / "bad.parquet"))
