"""`gvpo report` reads completions as verl writes them."""

import pytest
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from gvpo.samples import VERL_FOLDERS, read_samples, stories

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_completions_that_verl_writes_are_read(tmp_path):
    prompts, scores = ["1+1=", "1+1=", "2+2=\u2028", "2+2=\u2028"], [1.0, 0.0, 0.0, 0.0]
    for step in (9, 10):
        for folder, _ in VERL_FOLDERS:
            PPOTrainer._write_generations(
                prompts, ["2", "3", "\n", ""], ["2", "2", "4", "4"], scores,
                {"uid": list("abcd")}, str(tmp_path / folder), step,
            )  # fmt: skip
    lines = read_samples(tmp_path)
    assert [(line["step"], line["held_out"]) for line in lines] == [
        (8, False),
        (9, False),
        (9, True),
        (10, True),
    ]
    assert [list(line["rewards"].values()) for line in lines] == [[0.5, 0.0]] * 4
    assert [[one.completion for _, one in story.answers] for story in stories(lines)] == [
        ["2"] * 2,
        ["\n"] * 2,
    ] * 2
