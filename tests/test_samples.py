"""What is kept of a run's completions, and what is told of it."""

import json
from pathlib import Path

import pytest

from gvpo.errors import InputError
from gvpo.run import RunDirectory
from gvpo.samples import Line, Recorder, Sample, by_difficulty, read_samples, stories, text_of


def generation(*rewards: float, first: int = 0) -> list[Sample]:
    """Two completions for each prompt, of these mean rewards."""
    return [
        Sample(f"prompt {first + i}", f"answer {j}", reward + (j - 0.5) / 10)
        for i, reward in enumerate(rewards)
        for j in range(2)
    ]


def test_a_line_has_every_prompt_s_reward_and_completions_of_the_first() -> None:
    recorder = Recorder()
    line = recorder.line(0, [*generation(*[i / 10 for i in range(9)]), Sample("unscored", "?", None)])
    assert list(line["rewards"].values()) == pytest.approx([i / 10 for i in range(9)])
    assert [one["prompt"] for one in line["samples"]] == [f"prompt {i}" for i in range(6)]
    assert {one["completion"] for one in line["samples"]} == {"answer 0"}
    # Those are followed; where none of them is asked, another is shown. Held-out prompts are others.
    again = recorder.line(1, generation(0.3, 0.4, first=5))
    assert [one["prompt"] for one in again["samples"]] == ["prompt 5"]
    other = recorder.line(2, [*generation(0.3, first=20), Sample("unscored", "?", None)])
    assert [one["prompt"] for one in other["samples"]] == ["prompt 20"]
    held_out = recorder.line(2, generation(0.1, first=30), held_out=True)
    assert [one["prompt"] for one in held_out["samples"]] == ["prompt 30"]
    # Whoever goes on from there follows the same.
    resumed = Recorder([line, again, other, held_out])
    assert resumed.line(3, generation(0.3, 0.4, first=5)) == recorder.line(3, generation(0.3, 0.4, first=5))


def test_long_texts_keep_beginning_and_end() -> None:
    (one,) = Recorder().line(0, [Sample("p" * 9000, "a" * 5000 + "b" * 5000, 1.0)])["samples"]
    assert len(one["prompt"]) < 2100
    assert one["completion"].startswith("aaa")
    assert one["completion"].endswith("bbb")


def test_the_text_of_a_conversation_is_its_last_message() -> None:
    picture = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": picture}]
    assert text_of(talk) == "[image]What is this?"
    assert text_of([{"role": "assistant", "content": None, "tool_calls": []}]) == ""
    assert text_of("plain") == "plain"
    assert text_of([]) == ""


def told(*generations: list[Sample], held_out: bool = False) -> list[Line]:
    recorder = Recorder()
    return [recorder.line(step, one, held_out=held_out) for step, one in enumerate(generations)]


def test_a_story_is_a_prompt_early_in_the_middle_and_late() -> None:
    lines = told(*(generation(step / 10, first=step % 2) for step in range(9)))
    first, second = stories(lines)
    assert [step for step, _ in first.answers] == [0, 4, 8]
    assert [step for step, _ in second.answers] == [1, 5, 7]
    assert (first.prompt, first.answers[0][1]) == ("prompt 0", Sample("prompt 0", "answer 0", -0.05))
    # Prompts that come once: three of them in the place of one.
    once = stories(told(*(generation(0.1, first=step) for step in range(9))))
    assert [(one.prompt, len(one.answers)) for one in once] == [(f"prompt {n}", 1) for n in (0, 4, 8)]
    assert stories([]) == []
    many = told(*[generation(*[0.5] * 9)] * 2, held_out=True) + told(*[generation(*[0.5] * 9)] * 2)
    assert [one.held_out for one in stories(many)] == [False] * 6 + [True] * 6


def test_reward_by_difficulty_follows_thirds_of_the_first_rewards() -> None:
    # Two hard prompts that are learnt, one easy one that is not visited again after the second time.
    lines = told(generation(0.0, 0.2, 0.9), generation(0.4, 0.4, 1.0), generation(0.8, 1.0), generation(1.0))
    hard, easy = by_difficulty(lines, held_out=False)
    assert hard == ("0 to 0.3 (n = 2)", pytest.approx([0.1, 0.4, 0.9, 1.0]))
    assert easy == ("0.6 to 0.9 (n = 1)", pytest.approx([0.9, 1.0]))
    assert by_difficulty(lines, held_out=True) == []
    assert by_difficulty(lines[:1], held_out=False) == []
    alike = by_difficulty(told(generation(0.5, 0.5), generation(0.5, 0.5)), held_out=False)
    assert alike == [("0.5 to 0.5 (n = 2)", pytest.approx([0.5, 0.5]))]


def test_completions_that_verl_wrote_are_read(tmp_path: Path) -> None:
    for folder, step in (("rollouts", 9), ("rollouts", 10), ("validation", 10)):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [
            {"input": one.prompt, "output": one.completion, "gts": "4", "score": one.reward, "step": step}
            for one in generation(0.1, 0.2)
        ]
        (tmp_path / folder / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rollouts" / "11.jsonl").write_text('{"input": "being wri')
    lines = read_samples(tmp_path)
    assert [(line["step"], line["held_out"]) for line in lines] == [(8, False), (9, False), (10, True)]
    assert list(lines[0]["rewards"].values()) == pytest.approx([0.1, 0.2])
    assert [len(story.answers) for story in stories(lines)] == [2, 2]
    (tmp_path / "rollouts" / "12.jsonl").write_text('{"step": 12, "prompt": "of another version"}\n')
    with pytest.raises(InputError, match=r"12\.jsonl does not hold samples as they were written"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    "line",
    ['{"step": 1}', '{"step": 1, "held_out": false, "rewards": 3, "samples": []}', "[]",
     '{"step": 1, "held_out": false, "rewards": {}, "samples": [{"key": "a"}]}',
     '{"step": 1, "held_out": false, "rewards": {"a": "b"}, "samples": []}',
     '{"step": 1, "held_out": false, "rewards": {}, "samples": [3]}'],
)  # fmt: skip
def test_damaged_lines_are_refused_by_name(line: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"samples\.jsonl.*remove"):
        by_difficulty(read_samples(tmp_path), held_out=False)


def test_a_new_run_drops_an_earlier_one_s_samples(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log(Recorder().line(0, generation(0.5)), "samples.jsonl")
    run.start({}, resumed_at=3)
    assert len(read_samples(tmp_path)) == 1
    run.start({})
    assert read_samples(tmp_path) == []


def test_prompts_need_not_be_valid_unicode() -> None:
    assert Recorder().line(0, [Sample("\ud800", "\udfff", 1.0)])["rewards"] != {}
