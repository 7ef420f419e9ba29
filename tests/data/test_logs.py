"""Logs of a deployed model: what is read of them, what is left out, and what is refused with its line."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo.cli import main
from gvpo.data import load_prompts
from gvpo.data.logs import Logs
from gvpo.errors import InputError

LOG = Path(__file__).parents[1] / "fixtures" / "logs" / "chat.jsonl"


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "logs", *map(str, arguments)])
    return stopped.value.code or 0


def asked(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def answer(content, reward, complete=True, ids=None):
    return {"content": content, "reward": reward, "complete": complete, "completion_ids": ids}


def test_a_log_becomes_prompts_with_their_rated_answers(tmp_path, capsys):
    assert command(LOG, "--output", tmp_path / "out", "--scale", "1:5", "--answer", "result") == 0
    printed = capsys.readouterr().out
    assert "10 lines: 8 answers to 6 prompts; 1 left out: images or sounds; 1 left out: no rating;" in printed
    assert "rewards of 8: lowest 0, mean 0.562, highest 1" in printed
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [(row["prompt"], row["logged"]) for row in rows] == [
        (asked("12+3="), [answer("15", 1.0), answer("16", 0.0)]),
        (asked("4+4="), [answer("8", 0.75)]),
        (asked("9+1="), [answer("10", 1.0)]),
        (
            [{"role": "system", "content": "7"}, *asked("1+1=")],
            [answer("2", 0.5), answer("22", 0.25, False, [6, 6])],
        ),
        (asked("3+3="), [answer("7", 0.0)]),
        (asked("3+3=", "7", "no"), [answer("6", 1.0)]),
    ]
    assert [row["answer"] for row in rows] == ["15", "8", "10", "2", "6", "6"]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "15"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["prompts_with_two_or_more"] == 2
    assert manifest["answers_dropped"] == {
        "images or sounds": 1,
        "no rating": 1,
        "the conversation does not end with the assistant's message": 1,
        "tools (--offline reads episodes)": 1,
    }
    data = load_prompts(str(tmp_path / "out" / "train.parquet"), keep=["logged"])
    assert data[3]["logged"][1] == answer("22", 0.25, False, [6, 6])


def test_reward_functions_may_rate_logged_answers_instead():
    unrated = Logs(rewards="both").prompts([LOG])
    assert sum(found["reward"] is None for row in unrated for found in row["logged"]) == 1
    alone = Logs(rewards="functions").prompts([LOG])
    assert all(found["reward"] is None for row in alone for found in row["logged"])


def test_ratings_are_numbers_words_or_nested(tmp_path):
    line = {"messages": asked("1", "2")}
    ratings = [True, False, "thumbs_up", "Bad", "4", {"stars": 2}]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({**line, "meta": {"user": rating}}) for rating in ratings[:5]))
    (row,) = Logs(rating="meta.user").prompts([log])
    assert [found["reward"] for found in row["logged"]] == [1.0, 0.0, 1.0, 0.0, 4.0]
    log.write_text(json.dumps({**line, "rating": "meh"}))
    (row,) = Logs(words={"meh": 0.4}).prompts([log])
    assert row["logged"][0]["reward"] == 0.4


def test_only_the_answer_must_have_a_text(tmp_path):
    empty = {"role": "system", "content": ""}  # keeps a template from bringing its own
    lines = [{"messages": [empty, *asked("2+2?", text)], "rating": 1} for text in ("4", " ")]
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = Logs()
    assert logs.prompts([file]) == [{"prompt": [empty, *asked("2+2?")], "logged": [answer("4", 1.0)]}]
    assert logs.dropped == {"no text": 1}


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1))
def test_a_scale_is_linear_also_upside_down(low, high, part):
    value = low + part * (high - low)
    if abs(high - low) < 1e-3 or not min(low, high) <= value <= max(low, high):
        return
    assert Logs(scale=(low, high))._rating({"rating": value}) == pytest.approx(part, abs=1e-6)


BAD = {
    "there are no messages (fields: rating)": {"rating": 1},
    "a message is no object with role and content": {"messages": ["hello"], "rating": 1},
    "the rating is 'meh', not a finite number: words need --word": {
        "messages": asked("1", "2"),
        "rating": "meh",
    },
    "the rating is {'a': 1}, not a finite number": {"messages": asked("1", "2"), "rating": {"a": 1}},
    "the rating is nan": {"messages": asked("1", "2"), "rating": float("nan")},
    "there is no message before the answer": {"messages": asked("1", "2")[1:], "rating": 1},
    "the content of a message is 7, not text": {"messages": asked("1", 7), "rating": 1},
    "the token ids of the answer are [1, -1]": {
        "messages": asked("1", "2"),
        "rating": 1,
        "token_ids": [1, -1],
    },
    "the rating is of one of 2 choices: put it into that choice": {
        "messages": asked("1"),
        "response": {"choices": [{"message": asked("", "2")[1]}, {"message": asked("", "3")[1]}]},
        "rating": 1,
    },
    "a choice is not an object": {"messages": asked("1"), "response": {"choices": [3]}, "rating": 1},
}


@pytest.mark.parametrize("message", list(BAD))
def test_a_bad_line_is_named_and_nothing_is_written(message, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text("\n\n".join(map(json.dumps, [{"messages": asked("1", "2"), "rating": 1}, BAD[message]])))
    assert command(log, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"log.jsonl, line 3: {message}" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_meant_is_refused(tmp_path, capsys):
    log, out = tmp_path / "log.jsonl", ("-o", tmp_path / "out")
    log.write_text(json.dumps({"messages": asked("1", "2"), "rating": 3, "right": "2"}) + "\n")
    for words, told in {
        ("--scale", "1:1"): "--scale 1:1 is no scale",
        ("--scale", "1-5"): "--scale LOW:HIGH",
        ("--word", "up"): "'up' is not NAME=COLUMN",
        ("--scale", "4:5"): "line 1: the rating 3 is outside the scale from 4 to 5",
        ("--answer", "truth"): "line 1: there is no field 'truth' with the ground truth",
        ("--rating", "stars"): "no answer of 1 lines is of use (1: no rating)",
    }.items():
        assert command(log, *out, *words) == 2
        assert told in capsys.readouterr().err
    with log.open("a") as file:
        file.write(json.dumps({"messages": asked("1", "3"), "rating": 1, "right": "4"}))
    with pytest.raises(InputError, match="line 2: an earlier line has another right to the same prompt"):
        Logs(answer="right").prompts([log])
