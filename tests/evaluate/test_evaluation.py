"""Sampling that can be interrupted, grading, summaries and comparisons."""

import json
import zlib
from dataclasses import replace

import datasets
import pyarrow.parquet
import pytest

from gvpo.data import load_prompts
from gvpo.errors import InputError
from gvpo.evaluate.evaluation import Settings, compare, finish, grade, sample_all, summarise
from gvpo.evaluate.sampling import Completion, SamplingOptions
from gvpo.rewards import load_reward
from gvpo.run import RunDirectory

SETTINGS = Settings(
    model="a model", data="arithmetic", reward="exact", samples=4, batch_size=6, sampling=SamplingOptions(1.0)
)


class Interrupted(Exception):
    pass


class Guesser:
    """Answers some problems, by the text and the seed alone."""

    def __init__(self, batches=None, offset=0):
        self.batches, self.offset, self.calls = batches, offset, 0

    def render(self, prompt):
        return prompt

    def sample(self, texts, seed):
        if self.calls == self.batches:
            raise Interrupted
        self.calls += 1
        return [self._answer(text, seed + index) for index, text in enumerate(texts)]

    def _answer(self, text, seed):
        left, right = text.rstrip("=").split("+")
        wrong = zlib.crc32(f"{text}{seed + self.offset}".encode()) % 3 == 0
        answer = str(int(left) + int(right) + wrong)
        return Completion(answer, len(answer), truncated=False)


@pytest.fixture
def prompts():
    return load_prompts("arithmetic", split="test", size=10)


def evaluate(prompts, folder, sampler, settings=SETTINGS):
    run = RunDirectory(folder)
    rows = sample_all(settings, prompts, run, lambda: sampler)
    grade(rows, prompts, run, settings.reward, load_reward(settings.reward))
    return rows, finish(run, settings, rows)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(prompts, tmp_path):
    _, whole = evaluate(prompts, tmp_path / "whole", Guesser())
    for batches in (1, 3):
        with pytest.raises(Interrupted):
            evaluate(prompts, tmp_path / "cut", Guesser(batches))
    rest = Guesser()
    _, resumed = evaluate(prompts, tmp_path / "cut", rest)
    assert rest.calls == 7 - 4
    assert resumed == whole
    files = [pyarrow.parquet.read_table(tmp_path / name / "samples.parquet") for name in ("whole", "cut")]
    assert files[0].equals(files[1])
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == [
        "config.yaml",
        "samples.parquet",
        "summary.json",
        "summary.png",
    ]


def test_prompts_of_like_length_are_sampled_together_and_samples_kept_in_order(tmp_path):
    left = [7, 12345, 9, 678, 4, 23456, 890, 5]
    prompts = datasets.Dataset.from_dict(
        {"prompt": [f"{n}+1=" for n in left], "answer": [str(n + 1) for n in left]}
    )
    sampler = Guesser()
    batches, draw = [], sampler.sample
    sampler.sample = lambda texts, seed: batches.append(texts) or draw(texts, seed)
    rows, _ = evaluate(prompts, tmp_path, sampler, replace(SETTINGS, batch_size=8))
    assert [sorted({len(text) for text in batch}) for batch in batches] == [[8], [6], [4], [4]]
    assert all(len(set(batch)) == 2 for batch in batches)  # with all of their samples
    assert [(row["prompt_index"], row["sample"]) for row in rows] == [
        (i, n) for i in range(8) for n in range(4)
    ]
    assert [row["prompt"] for row in rows[::4]] == list(prompts["prompt"])


def test_a_finished_evaluation_does_not_load_the_model_again(prompts, tmp_path):
    _, first = evaluate(prompts, tmp_path, Guesser())
    assert evaluate(prompts, tmp_path, Guesser(batches=0))[1] == first


def test_other_settings_or_prompts_are_refused(prompts, tmp_path):
    evaluate(prompts, tmp_path, Guesser())
    with pytest.raises(InputError, match="samples 4 instead of 2"):
        evaluate(prompts, tmp_path, Guesser(), Settings(**{**vars(SETTINGS), "samples": 2}))
    with pytest.raises(InputError, match="prompts_sha256"):
        evaluate(load_prompts("arithmetic", split="test", size=11), tmp_path, Guesser())


def row(prompt, extracted, reward, truncated=False):
    return {
        "prompt_index": prompt,
        "extracted": extracted,
        "reward": reward,
        "truncated": truncated,
        "tokens": 5,
    }


def test_summary():
    rows = [row(0, "5", 1.0), row(0, "5.0", 1.0), row(0, "6", 0.0), row(0, None, 0.0, True)]
    rows += [row(1, "1/2", 0.0), row(1, "0.5", 0.0), row(1, "7", 1.0), row(1, "8", 0.0)]
    figures = {name: figure["mean"] for name, figure in summarise(rows, samples=4, seed=0).items()}
    assert figures == {
        "pass@1": pytest.approx(3 / 8),
        "avg@4": pytest.approx(3 / 8),
        "pass@2": pytest.approx((5 / 6 + 1 / 2) / 2),
        "pass@4": 1.0,
        "maj@2": 0.5,
        "maj@4": 0.5,
        "truncated": pytest.approx(1 / 8),
        "unparsable": pytest.approx(1 / 8),
        "tokens": 5.0,
    }


def test_comparison_is_paired(prompts, tmp_path):
    evaluate(prompts, tmp_path / "a", Guesser())
    evaluate(prompts, tmp_path / "b", Guesser(offset=99))
    there, back = compare(tmp_path / "a", tmp_path / "b", 0), compare(tmp_path / "b", tmp_path / "a", 0)
    assert there["difference"]["mean"] == -back["difference"]["mean"]
    assert (there["better"], there["worse"]) == (back["worse"], back["better"])
    evaluate(prompts.select(range(5)), tmp_path / "c", Guesser())
    with pytest.raises(InputError, match="different prompts"):
        compare(tmp_path / "a", tmp_path / "c", 0)
    with pytest.raises(InputError, match="no finished evaluation"):
        compare(tmp_path / "a", tmp_path / "missing", 0)


def test_summary_on_disk(prompts, tmp_path):
    rows, summary = evaluate(prompts, tmp_path, Guesser())
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["metrics"]["pass@1"]["mean"] == pytest.approx(sum(r["reward"] for r in rows) / len(rows))
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "extracted"), [("accuracy:sentence", "56"), ("accuracy", None)])
def test_answers_are_read_as_the_reward_reads_them(name, extracted, tmp_path):
    row = {"prompt": "7 x 8?", "completion": "7 x 8 = 56.", "answer": "56", "prompt_index": 0}
    rows = [row | {"sample_index": 0, "tokens": 5, "truncated": False}]
    prompts = datasets.Dataset.from_list([{"prompt": "7 x 8?", "answer": "56"}])
    grade(rows, prompts, RunDirectory(tmp_path), name, load_reward(name))
    assert (rows[0]["extracted"], rows[0]["reward"]) == (extracted, float(extracted is not None))


def test_a_reward_of_ones_own_gets_what_it_gets_in_training(tmp_path):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.5] * len(completions)

    asked = [{"role": "user", "content": "Peru?"}]
    prompts = datasets.Dataset.from_list([{"prompt": asked, "capital": "Lima"}])
    row = {"prompt": "<user>Peru?", "completion": "Lima", "answer": None, "prompt_index": 0}
    rows = [row | {"sample_index": i, "tokens": 1, "truncated": False} for i in range(2)]
    grade(rows, prompts, RunDirectory(tmp_path), "my:own", reward)
    assert seen["prompts"] == [asked, asked]
    assert seen["completions"] == [[{"role": "assistant", "content": "Lima"}]] * 2
    assert seen["capital"] == ["Lima", "Lima"]
    assert [row["reward"] for row in rows] == [0.5, 0.5]
