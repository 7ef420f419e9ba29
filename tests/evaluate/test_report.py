"""`gvpo report`: what it tells of runs, and that its page is self-contained, also in a browser."""

import json
import re
import shutil
import subprocess

import pyarrow.parquet
import pytest

from gvpo.errors import InputError
from gvpo.evaluate.report import load_run, write_report
from gvpo.progress import split_of
from gvpo.run import RunDirectory
from gvpo.samples import Recorder, Sample


def page_of(*runs, output="report.html"):
    """The page, as text."""
    path = runs[0].parent / output
    write_report(runs, path)
    return path.read_text()


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


def test_report_is_self_contained_and_escaped(runs):
    text = page_of(*runs)
    for title in ("Reward", "Accuracy", "KL to the reference", "Settings that differ", "Completions: first"):
        assert title in text
    assert "<script" not in text
    assert "second &amp; &lt;last&gt;" in text
    assert text.count("<figure") == 3
    for outside in ('src="', "url(http", "@import", "<link"):
        assert outside not in text
    assert len(text) < 150_000
    assert page_of(*runs, output="again.html") == text


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
    text = page_of(tmp_path / "ours", tmp_path / "verl")
    assert "Where the time goes: ours" in text
    assert "Where the time goes: verl" in text
    assert ">generation</text>" in text


def test_report_of_a_running_run_leaves_its_unfinished_line_out(runs):
    (runs[0] / "summary.json").unlink()
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert "<h2>In the end</h2>" in page_of(runs[0])


def section(text, heading):
    """What stands below a heading, without markup."""
    inside = text.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", inside)).strip()


def test_last_values_are_compared_with_the_first_run_s(runs):
    RunDirectory(runs[1]).log({"step": 5, "loss": 12345.6})
    table = section(page_of(*runs), "In the end")
    assert "Reward 0.4 1.4 (+1) Accuracy 0.8 0.8 (+0) KL to the reference 0.4 0.4 (+0) Loss 12,346" in table
    assert "(+" not in section(page_of(runs[0]), "In the end")


def test_staleness_is_drawn_where_it_was_logged(runs):
    assert "Age of the" not in page_of(runs[0])
    for number, name in enumerate(("age_mean", "age_max", "mixed_groups", "reference_age")):
        RunDirectory(runs[0]).log({"step": 5, f"staleness/{name}": number})
    text = page_of(runs[0])
    for title in (
        "Age of the rollouts",
        "Age of the oldest rollout",
        "Groups of several versions",
        "Age of the reference",
    ):
        assert f"<figcaption>{title}</figcaption>" in text


def test_numbers_on_the_axes_are_whole(runs):
    for step in range(5):
        RunDirectory(runs[0]).log({"step": step, "gvpo/weight_abs_mean": 1e-4 * step})
    drawing = page_of(runs[0]).partition("Weight spread")[2].partition("</svg>")[0]
    assert any(0 < float(label) < 1e-3 for label in re.findall(r">([\d.]+)</text>", drawing))


def test_completions_over_a_run_and_reward_by_difficulty(runs):
    recorder, run = Recorder(), RunDirectory(runs[0])
    for step, (hard, easy) in enumerate(((0.0, 1.0), (0.25, 1.0), (1.0, None))):
        asked = [Sample("hard <b>?</b>", f"no. {step}", hard), Sample("easy?", f"yes {step}", easy)]
        run.log(recorder.line(step, asked), "samples.jsonl")
    text = page_of(runs[0])
    shown = section(text, "Completions")
    assert shown.startswith(
        "hard &lt;b&gt;?&lt;/b&gt; step 0: reward 0 no. 0 step 1: reward 0.25 no. 1 "
        "step 2: reward 1 no. 2 easy? step 0: reward 1 yes 0"
    )
    assert "step 2: no reward yes 2 1+1= before 3 after 2 right answer 2" in shown
    for mark, completion in (("wrong", "no. 0"), ("", "no. 1"), ("right", "no. 2"), ("", "yes 2")):
        assert f'<pre class="{mark}">{completion}</pre>' in text
    figure = text.partition("<figcaption>Reward by difficulty</figcaption>")[2].partition("</figure>")[0]
    for label in ("0 to 0.33 (n = 1)", "0.67 to 1 (n = 1)", "visit of the prompt"):
        assert f">{label}</text>" in figure
    assert "by chance alone" in text
    assert "by chance alone" not in page_of(runs[1])


def test_evaluations_of_the_same_prompts_are_compared_by_difficulty(tmp_path):
    for name, rewards in (("before", (0.0, 1.0)), ("after", (0.5, 1.0))):
        run = RunDirectory(tmp_path / name)
        run.start({})
        rows = [{"prompt": f"{i}", "completion": "?", "reward": reward} for i, reward in enumerate(rewards)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), run.path / "samples.parquet")
        run.finish({"metrics": {"pass@1": {"mean": sum(rewards) / 2, "low": 0.0, "high": 1.0}}})
    text = page_of(tmp_path / "before", tmp_path / "after")
    assert text.count("<figure") == 1
    assert "<figcaption>Reward by difficulty, by evaluations</figcaption>" in text
    assert "step" not in section(text, "Completions: before")


def test_every_colour_has_one_for_dark_pages(runs):
    text = page_of(*runs)
    light, dark = text.split("prefers-color-scheme: dark")
    names = re.findall(r"(--\w+): #", light)
    assert names == re.findall(r"(--\w+): #", dark)
    assert {f"var({name})" for name in ("--c0", "--c1", "--text")} <= set(re.findall(r"var\(--\w+\)", text))
    assert "#000000" not in text


def test_report_refuses_what_is_no_run(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (runs[1] / "summary.json").write_text("{")
    for path, message in (
        (tmp_path / "nothing", "is not a run directory"),
        (tmp_path / "empty", "holds neither"),
        (runs[1], r"summary\.json cannot be parsed"),
    ):
        with pytest.raises(InputError, match=message):
            write_report([path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package chromium")
def test_report_in_a_browser(runs, tmp_path):
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write_report(runs, page)
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
