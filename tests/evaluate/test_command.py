"""`gvpo eval` with a real model that the test makes."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import typer
from typer.testing import CliRunner

from gvpo.errors import InputError
from gvpo.evaluate.command import evaluate, report
from gvpo.evaluate.sampling import SamplingOptions, TransformersSampler
from gvpo.model.generation import shared_prompts
from gvpo.model.tokenizer import load_tokenizer
from gvpo.sums import make_model, make_tokenizer

app = typer.Typer()
app.command("eval")(evaluate)
app.command("report")(report)


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"<bos>{a:02d}+07=", "answer": f"{a + 7:03d}"[::-1]} for a in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_evaluation_from_the_command_line(model, problems, tmp_path):
    common = [
        "eval",
        "--model",
        model,
        "--data",
        problems,
        "--plain",
        "--reward",
        "exact",
        "--max-tokens",
        "4",
    ]
    sampled = ["--samples", "4", "--temperature", "1", "--batch-size", "16"]
    result = invoke(*common, *sampled, "--output", tmp_path / "a")
    assert result.exit_code == 0
    for figure in ("pass@1", "avg@4", "pass@4", "maj@4", "truncated", "unparsable"):
        assert figure in result.output
    result = invoke(*common, *sampled, "--seed", 1, "--output", tmp_path / "b", "--compare", tmp_path / "a")
    assert result.exit_code == 0
    assert "of 12 prompts, p = " in result.output
    invoke(*common, *sampled, "--output", tmp_path / "c")
    texts = [(tmp_path / name / "samples.parquet").read_bytes() for name in "abc"]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.slow
def test_greedy_decoding_agrees_with_the_model(model, problems):
    tokenizer = load_tokenizer(str(model), needs_template=False, advice="")
    sampler = TransformersSampler(str(model), tokenizer, SamplingOptions(0.0, 1.0, 3), chat=False)
    text = "<bos>05+07="
    ids = sampler.tokenizer(text)["input_ids"]
    expected = []
    for _ in range(3):
        with torch.no_grad():
            token = int(sampler.model(torch.tensor([ids + expected])).logits[0, -1].argmax())
        expected.append(token)
        if token in sampler.ends:
            break
    # A longer neighbour pads this prompt, which must not change its completion.
    alone, _ = sampler.sample([text, "<bos>05+07=012+34="], seed=0)
    assert alone.text == sampler.tokenizer.decode(expected, skip_special_tokens=True)
    assert alone.tokens == len(expected)
    assert alone.truncated == (expected[-1] not in sampler.ends)


def test_samples_of_a_prompt_share_it_and_are_what_they_were(model, monkeypatch):
    tokenizer = load_tokenizer(str(model), needs_template=False, advice="")
    texts = [text for text in ("<bos>05+07=", "<bos>5+7=", "<bos>15+07=") for _ in range(4)]
    shapes, drawn = [], []
    for sharing in (shared_prompts, lambda model: nullcontext()):
        monkeypatch.setattr("gvpo.model.generation.shared_prompts", sharing)
        for temperature in (0.0, 1.0):
            options = SamplingOptions(temperature, 1.0, 6)
            sampler = TransformersSampler(str(model), tokenizer, options, chat=False)
            sampler.model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, out: shapes.append(tuple(inputs[0].shape))
            )
            drawn.append(sampler.sample(texts, seed=1))
    assert drawn[:2] == drawn[2:]
    assert shapes[0][0] == 3
    assert len(set(drawn[1])) > len(set(drawn[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "./no/such/model"}, "there is no model at"),
        ({"--data": "no_such_data"}, "there is no data set 'no_such_data'"),
        ({"--reward": "no_such_reward"}, "there is no reward"),
        ({"--samples": "4", "--temperature": "0"}, "are all alike"),
        ({"--chat-template": "missing.jinja"}, "missing.jinja cannot be read"),
    ],
)
def test_bad_input_leaves_no_directory(model, problems, tmp_path, change, message):
    options = {"--model": model, "--data": problems, "--output": tmp_path / "run"} | change
    with pytest.raises(InputError, match=message):
        invoke("eval", "--plain", *(part for pair in options.items() for part in pair))
    assert not (tmp_path / "run").exists()


def test_a_model_without_chat_template_or_tokenizer(model, problems, tmp_path):
    with pytest.raises(
        InputError, match="has no chat template: give one with --chat-template FILE, or --plain"
    ):
        invoke("eval", "--model", model, "--data", problems, "--output", tmp_path / "run")
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        invoke("eval", "--plain", "--model", bare, "--data", problems, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
