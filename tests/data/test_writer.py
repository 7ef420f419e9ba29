"""Data sets on disk: both engines' formats, the manifest, and nothing half-written."""

import hashlib
import json

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from gvpo.data.command import parse_columns, prompts
from gvpo.data.writer import write_dataset
from gvpo.errors import InputError
from gvpo.rewards import compute_score, load_reward


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "gsm8k"
    source.mkdir()
    for split, count in (("train", 5), ("test", 3)):
        rows = [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(count)]
        rows.append({"question": "?", "answer": "no answer"})
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source


def test_both_engines_read_the_files(folder, tmp_path):
    write_dataset("gsm8k", tmp_path / "out", sources=[str(folder)])
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert len(rows) == 5
    row = rows[4]
    assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info", "answer"}
    assert row["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert row["extra_info"] == {"split": "train", "index": 4, "question": "4?"}
    assert (
        compute_score(row["data_source"], "#### 4", row["reward_model"]["ground_truth"], row["extra_info"])
        == 1
    )
    assert load_reward("accuracy")(
        prompts=[row["prompt"]], completions=["#### 4"], answer=[row["answer"]]
    ) == [1]


def test_manifest_counts_and_hashes(folder, tmp_path):
    manifest = write_dataset("gsm8k", tmp_path / "out", sources=[str(folder)])
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    for split, count in (("train", 5), ("test", 3)):
        facts = manifest["splits"][split]
        assert (facts["rows_read"], facts["rows_written"]) == (count + 1, count)
        assert facts["rows_dropped"] == {"the ground truth cannot be parsed": 1}
        assert facts["sha256"] == hashlib.sha256((tmp_path / "out" / facts["file"]).read_bytes()).hexdigest()
        assert facts["source_sha256"] == hashlib.sha256((folder / f"{split}.jsonl").read_bytes()).hexdigest()


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    write_dataset("gsm8k", tmp_path / "a", sources=[str(folder)])
    write_dataset("gsm8k", tmp_path / "b", sources=[str(folder / "test.jsonl"), str(folder / "train.jsonl")])
    for name in ("train.parquet", "test.parquet", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_written_files_can_be_read_again(folder, tmp_path):
    write_dataset("gsm8k", tmp_path / "out", sources=[str(folder)])
    again = write_dataset(str(tmp_path / "out" / "test.parquet"), tmp_path / "again")
    assert again["splits"]["test"]["rows_written"] == 3


def test_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    write_dataset("reasoning_gym:gcd", tmp_path, size=4)
    row = pyarrow.parquet.read_table(tmp_path / "test.parquet").to_pylist()[0]
    text = f"<answer>{row['answer']}</answer>"
    assert compute_score(row["data_source"], text, row["answer"], row["extra_info"]) == 1.0


def test_a_failure_leaves_the_earlier_files_alone(folder, tmp_path):
    write_dataset("gsm8k", tmp_path / "out", sources=[str(folder)])
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with (folder / "test.jsonl").open("ab") as file:
        file.write(b"\xff\xfe not text\n")
    with pytest.raises(InputError, match="row 5"):
        write_dataset("gsm8k", tmp_path / "out", sources=[str(folder)])
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_failure_leaves_no_new_folder(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="has no rows"):
        write_dataset("gsm8k", tmp_path / "out", sources=[str(tmp_path / "empty.jsonl")])
    assert not (tmp_path / "out").exists()


def test_two_files_for_one_split(folder, tmp_path):
    with pytest.raises(InputError, match="are for train"):
        write_dataset("gsm8k", tmp_path, sources=[str(folder / "train.jsonl")] * 2)


def test_column_mappings():
    assert parse_columns(["prompt=q", "answer=a=b"]) == {"prompt": "q", "answer": "a=b"}
    with pytest.raises(InputError, match="prompt=question"):
        parse_columns(["prompt"])


def test_command(folder, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(prompts)
    result = CliRunner().invoke(app, ["gsm8k", "--source", str(folder), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "train: 5 rows, 1 dropped: the ground truth cannot be parsed" in result.output
