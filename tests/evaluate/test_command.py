"""`gvpo eval` and `gvpo report` with a real model that the test makes."""

import json
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch
import typer
from typer.testing import CliRunner

from gvpo.errors import InputError
from gvpo.evaluate.command import evaluate, report
from gvpo.evaluate.report import load_run
from gvpo.evaluate.sampling import SamplingOptions, TransformersSampler
from gvpo.model.generation import shared_prompts
from gvpo.model.tokenizer import load_tokenizer
from gvpo.progress import split_of
from gvpo.run import RunDirectory
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


@pytest.fixture
def runs(tmp_path):
    for index, name in enumerate(("first", "second & <last>")):
        run = RunDirectory(tmp_path / name)
        run.start({"beta": 0.1 * (index + 1), "seed": 0})
        for step in range(5):
            run.log({"step": step, "reward": step / 10 + index, "gvpo/kl": 0.1 * step, "accuracy": step / 5})
        run.finish({"accuracy_after": 0.8, "steps": 5})
        sample = {"prompt": "1+1=", "before": "3", "after": "2", "answer": "2<script>alert(1)</script>"}
        (run.path / "samples.json").write_text(json.dumps([sample]))
    return [tmp_path / "first", tmp_path / "second & <last>"]


def test_report_is_self_contained_and_escaped(runs, tmp_path):
    page = tmp_path / "report.html"
    assert invoke("report", *runs, "--output", page).exit_code == 0
    text = page.read_text()
    for title in ("Reward", "Accuracy", "KL to the reference", "Settings that differ", "Completions: first"):
        assert title in text
    assert "<script" not in text
    assert "second &amp; &lt;last&gt;" in text
    assert text.count("<figure") == 3
    for outside in ('src="', "url(http", "@import", "<link"):
        assert outside not in text
    assert len(text) < 150_000
    invoke("report", *runs, "--output", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_report_shows_where_the_time_goes(tmp_path):
    ours = {"step_time": 10.0, "profiling/generation": 6.0, "profiling/scoring": 1.0, "profiling/update": 2.5}
    names = {"gen": 4.0, "reward": 1.0, "update_actor": 5.0, "gvpo_score": 2.0, "step": 11.0}
    verl = {f"timing_s/{name}": seconds for name, seconds in names.items()}
    for name, entry in (("ours", ours), ("verl", verl), ("torn", {**ours, "profiling/update": None})):
        run = RunDirectory(tmp_path / name)
        run.start({})
        for step in (1, 2):
            run.log({"step": step, **entry})
        run.log({"step": 2, "train_runtime": 20.0})
    splits = [split_of(load_run(tmp_path / name, name).metrics) for name in ("ours", "verl", "torn")]
    assert [step for step, _ in splits[0]] == [1, 2]
    parts = ("generation", "rewards", "reference", "scoring", "update", "other")
    assert [tuple(split[0][1][part] for part in parts) for split in splits] == [
        (6.0, 0.0, 0.0, 1.0, 2.5, 0.5),
        (4.0, 1.0, 0.0, 2.0, 3.0, 1.0),
        (6.0, 0.0, 0.0, 1.0, 0.0, 3.0),
    ]
    page = tmp_path / "report.html"
    invoke("report", tmp_path / "ours", tmp_path / "verl", "--output", page)
    text = page.read_text()
    assert "Where the time goes: ours" in text
    assert "Where the time goes: verl" in text
    assert ">generation</text>" in text


def test_report_of_a_running_run_leaves_its_unfinished_line_out(runs, tmp_path):
    (runs[0] / "summary.json").unlink()
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert invoke("report", runs[0], "--output", tmp_path / "report.html").exit_code == 0


def test_report_refuses_what_is_no_run(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (runs[1] / "summary.json").write_text("{")
    for path, message in (
        (tmp_path / "nothing", "is not a run directory"),
        (tmp_path / "empty", "holds neither"),
        (runs[1], r"summary\.json cannot be parsed"),
    ):
        with pytest.raises(InputError, match=message):
            invoke("report", path, "--output", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package chromium")
def test_report_in_a_browser(runs, tmp_path):
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    invoke("report", *runs, "--output", page)
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    dom = subprocess.run(
        [*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert dom.stdout.count("</svg>") == 3
    assert "second &amp; &lt;last&gt;" in dom.stdout
    subprocess.run(
        [*browser, f"--screenshot={shot}", "--window-size=1200,900", page.as_uri()],
        timeout=60,
        check=True,
        capture_output=True,
    )
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    # The first run's curves are really painted, in their colour.
    assert (abs(pixels - [0x1F / 255, 0x5F / 255, 0xA8 / 255]).max(-1) < 0.02).sum() > 200
