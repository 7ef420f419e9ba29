"""The picture of a terminal is of the run that it is given, and needs no font from elsewhere."""

from benchmarks.pictures import terminal
from gvpo.run import RunDirectory
from gvpo.samples import Recorder, Sample


def test_the_terminal_of_a_run(tmp_path):
    run, recorder = RunDirectory(tmp_path), Recorder()
    for step in range(1, 5):
        run.log({"step": step, "reward": step / 8, "step_time": 60.0, "profiling/generation": 45.0})
        run.log(recorder.line(step - 1, [Sample(f"{step}+1=", f"{step + 1}", 1.0)]), "samples.jsonl")
    drawn = terminal(tmp_path).replace("&#160;", " ")
    for shown in ("3/4", "0:03:00", "60 s left", "0.375", "0.125 to 0.375", "generation 75%", "3+1="):
        assert shown in drawn
    assert "url(" not in drawn.replace("url(#", "")
