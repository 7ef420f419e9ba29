"""Demonstrations and logged completions: as tokens, and as the errors of bad ones."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvpo.errors import InputError
from gvpo.replay import ReplayBuffer
from gvpo.replay.demonstrations import Demonstrations
from gvpo.replay.offline import load_offline
from gvpo.replay.tokens import Encoder, fingerprint
from tests.replay.groups import group, same
from tests.trl.common import EOS, tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}<eos>+{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
# Opens the turn for generation with something that a finished turn does not have.
THINKING = CHAT.replace("%}a{%", "%}aTHINK{%")
MESSAGES = [{"role": "user", "content": "1+2"}]


def encoder(template=CHAT, **changes):
    return Encoder(tokenizer(), chat_template=template, **changes)


def text(ids):
    return tokenizer().decode(ids)


def test_answers_are_what_generation_would_have_written():
    plain = encoder()
    assert plain.prompt("1+2") == tokenizer()("1+2")["input_ids"]
    assert text(plain.answer("1+2", "3")) == "3<eos>"
    assert text(plain.answer("1+2", "3<eos>")) == "3<eos>"
    assert text(plain.answer("1+2", "34", complete=False)) == "34"
    assert text(plain.answer("1+2", [{"role": "assistant", "content": "3"}])) == "3<eos>"


@pytest.mark.parametrize("template", [CHAT, THINKING])
@pytest.mark.parametrize("answer", ["3", [{"role": "assistant", "content": "3"}]])
def test_chat_answers_end_their_turn_and_no_more(template, answer):
    ours = encoder(template)
    whole = tokenizer().apply_chat_template(
        MESSAGES, chat_template=template, add_generation_prompt=True, return_dict=True
    )
    assert ours.prompt(MESSAGES) == whole["input_ids"]
    assert text(ours.answer(MESSAGES, answer)) == "3<eos>"
    assert text(ours.answer(MESSAGES, answer, complete=False)) == "3"


def test_a_template_s_error_is_told():
    with pytest.raises(InputError, match=r"the chat template cannot render it \(no such thing\)"):
        encoder("{{ raise_exception('no such thing') }}").prompt(MESSAGES)


def demonstrations(**changes):
    settings = {
        "encoder": encoder(vocabulary_size=67),
        "per_group": 2,
        "group_size": 4,
        "longest": 6,
        "seed": 1,
    }
    return Demonstrations(**{**settings, **changes})


def test_demonstrations_take_their_slots():
    row = {"prompt": "1+2", "demonstrations": ["3", "03", [{"role": "assistant", "content": "003"}]]}
    first = demonstrations().chosen(row, 7)
    assert set(first) == {2, 3}
    assert demonstrations().chosen(row, 7) == first
    drawn = {tuple(text(d.ids) for d in demonstrations().chosen(row, n).values()) for n in range(40)}
    assert len(drawn) == 6
    one = {**row, "demonstrations": "3"}
    assert demonstrations(slots=[3, 0]).chosen(one, 0) == {3: ([*tokenizer()("3")["input_ids"], EOS], None)}
    for nothing in ([], None):
        assert demonstrations().chosen({**row, "demonstrations": nothing}, 0) == {}


LOGGED = [
    {"content": "3", "reward": 0.5, "complete": True, "completion_ids": None},
    {"content": "34", "reward": None, "complete": False, "completion_ids": None},
    {"content": "5", "reward": -1.0, "complete": True, "completion_ids": [6, 7, 2]},
]


def test_logged_answers_bring_their_rewards_and_tokens():
    shown = demonstrations(column="logged").of({"prompt": "1+2", "logged": LOGGED})
    ids = tokenizer()(["3", "34"])["input_ids"]
    assert shown == [([*ids[0], EOS], 0.5), (ids[1], None), ([6, 7, 2], -1.0)]
    rows = [{"prompt": "1+2", "logged": LOGGED[::2]}, {"prompt": "2", "logged": LOGGED[:1]}]
    offline = load_offline(rows, encoder())
    assert (offline.alone, [c.tolist() for c in offline.groups[0].completions]) == (
        1,
        [[*ids[0], EOS], [6, 7, 2]],
    )
    assert offline.groups[0].rewards.tolist() == [0.5, -1.0]
    with pytest.raises(InputError, match="row 1: completion 1: the reward is None"):
        load_offline([{"prompt": "1+2", "logged": LOGGED}], encoder())


BAD_DEMONSTRATIONS = {
    r"Row 1, demonstration 1 has 7 tokens, but max_completion_length is 6": ["3", "123456"],
    "Row 1, demonstration 0 is empty": "",
    "Row 1, demonstration 2 is empty": ["3", "4", " "],
    "Row 1: a demonstration is text or a list of messages, not int": 3,
    "Row 1, demonstration 0: its reward is nan, not a finite": [{**LOGGED[0], "reward": float("nan")}],
    "Row 1, demonstration 0: the token id 99 is outside": [{**LOGGED[0], "completion_ids": [99]}],
}


@pytest.mark.parametrize("message", list(BAD_DEMONSTRATIONS))
def test_bad_demonstrations_are_named(message):
    rows = [{"prompt": "1+2", "demonstrations": x} for x in ("3", BAD_DEMONSTRATIONS[message])]
    with pytest.raises(InputError, match=message):
        demonstrations().check(rows)


def test_missing_demonstrations_are_told():
    with pytest.raises(InputError, match="Row 0 has no column 'answers' with demonstrations"):
        demonstrations(column="answers").check([{"prompt": "1"}])
    with pytest.raises(InputError, match="No row has a demonstration"):
        demonstrations().check([{"prompt": "1", "demonstrations": []}])
    with pytest.raises(InputError, match="token id 7 is outside the model's vocabulary of 5"):
        demonstrations(encoder=encoder(vocabulary_size=5)).check([{"prompt": "<unk>", "demonstrations": "3"}])
    with pytest.raises(InputError, match="demonstrations_per_group=5 does not fit into groups of"):
        demonstrations(per_group=5)
    for slots in ([1], [1, 1], [1, 4]):
        with pytest.raises(InputError, match="must be 2 different slots"):
            demonstrations(slots=slots)


GROUPED = [
    {
        "prompt": "1+2",
        "completions": ["3", "4", "33"],
        "rewards": [1.0, 0.0, 0.5],
        "complete": [True, True, False],
    },
    {"prompt": "2+2", "completions": ["4", "5"], "rewards": [1, 0], "complete": [True, True]},
]
FLAT = [
    {"prompt": row["prompt"], "completion": c, "reward": r, "complete": f}
    for row in GROUPED
    for c, r, f in zip(row["completions"], row["rewards"], row["complete"], strict=True)
]


def test_rows_of_groups_and_rows_of_completions_are_the_same(tmp_path):
    pq.write_table(pa.Table.from_pylist(GROUPED), tmp_path / "grouped.parquet")
    shuffled = [FLAT[i] for i in (3, 0, 1, 4, 2)]
    lines = "".join(json.dumps(row) + "\n" for row in [*shuffled, {**FLAT[0], "prompt": "9"}])
    (tmp_path / "flat.jsonl").write_text(lines)
    grouped = load_offline(tmp_path / "grouped.parquet", encoder())
    flat = load_offline(str(tmp_path / "flat.jsonl"), encoder())
    assert (grouped.alone, flat.alone, grouped.group_size, grouped.scored) == (0, 1, 3, False)
    assert [text(c) for c in grouped.groups[0].completions] == ["3<eos>", "4<eos>", "33"]
    assert all(same(a, b) for a, b in zip(grouped.groups, flat.groups[::-1], strict=True))
    named = [{**row, "prompt": "1", "group": i % 2} for i, row in enumerate(FLAT[:4])]
    assert [g.rewards.tolist() for g in load_offline(named, encoder()).groups] == [[1.0, 0.5], [0.0, 1.0]]
    empty = [{**FLAT[0], "completion": ""}, FLAT[1]]  # ended at once
    assert load_offline(empty, encoder()).groups[0].completions[0].tolist() == [EOS]
    ids = [{"prompt_ids": [5], "completion_ids": [[6], [7, 2]], "rewards": [0.0, 1.0]}]
    assert load_offline(ids, encoder()).groups[0].lengths.tolist() == [1, 2]


def test_logged_references_are_kept_but_never_mixed():
    scored = [{**row, "reference_logp": -float(i), "reference": "old"} for i, row in enumerate(FLAT)]
    groups = load_offline(scored, encoder())
    assert groups.scored
    assert groups.groups[1].reference_logps.tolist() == [-3.0, -4.0]
    scored[1]["reference"] = "new"
    with pytest.raises(InputError, match=r"group '1\+2': A group cannot mix references"):
        load_offline(scored, encoder())
    del scored[1]["reference"], scored[1]["reference_logp"]
    with pytest.raises(InputError, match="under 'old' and none"):
        load_offline(scored, encoder())


BAD_ROWS = {
    "row 2: there is no prompt": {"prompt": ""},
    "row 2: the reward is None, not a finite number|row 2: there is no reward": {"reward": None},
    "row 2: the reward is nan, not a finite number": {"reward": float("nan")},
    "row 2: the reward is 'good', not a finite number": {"reward": "good"},
    "row 2: the completion is empty and has no end": {"completion": "", "complete": False},
    "row 2: there is no completion": {"completion": None},
    "row 2: it has 9 tokens, but max_completion_length is 8": {"completion": "12345678"},
    "row 2: the token id 99 is outside": {"completion_ids": [5, 99]},
    "row 2 has another prompt than the rows before it": {"prompt": "8", "group": "x"},
}


@pytest.mark.parametrize("message", list(BAD_ROWS))
def test_bad_logs_are_refused_by_row(message):
    rows = [{**row, "group": "x"} for row in FLAT[:2]] if "another prompt" in message else list(FLAT[:2])
    rows[1] = {**rows[1], **BAD_ROWS[message]}
    with pytest.raises(InputError, match=message):
        load_offline(rows, encoder(vocabulary_size=67), longest=8)


def test_logs_that_cannot_be_used_at_all(tmp_path):
    with pytest.raises(InputError, match="no prompt with two or more completions"):
        load_offline(FLAT[:1], encoder())
    with pytest.raises(InputError, match=r"3 rewards for 2 completions|2 completions: give one each"):
        load_offline([{**GROUPED[1], "rewards": [1.0, 0.0, 0.0]}], encoder())
    with pytest.raises(InputError, match=r"gone\.parquet is not a file"):
        load_offline(tmp_path / "gone.parquet", encoder())
    with pytest.raises(InputError, match="There is no replay buffer in"):
        load_offline(tmp_path, encoder())


def test_a_replay_buffer_is_a_log_too(tmp_path):
    ours = encoder()
    for folder, name in (("ours", fingerprint(ours.tokenizer)), ("theirs", "another")):
        with ReplayBuffer(tmp_path / folder, tokenizer=name) as buffer:
            buffer.append([group(3), group(4)])
    logged = load_offline(tmp_path / "ours", ours)
    assert logged.scored
    assert all(same(a, group(n)) for a, n in zip(logged.groups, (3, 4), strict=True))
    with pytest.raises(InputError, match="filled with another tokenizer"):
        load_offline(tmp_path / "theirs", ours)
    with pytest.raises(InputError, match="outside the model's vocabulary of 67"):
        load_offline(tmp_path / "ours", encoder(vocabulary_size=67))
