"""`gvpo replay export`: Parquet that other tools and `offline` read."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from gvpo.cli import main
from gvpo.errors import InputError
from gvpo.replay import ReplayBuffer
from gvpo.replay.offline import load_offline
from gvpo.replay.view import export, rank_folder
from tests.replay.groups import group
from tests.replay.test_answers import encoder


def test_what_is_exported_is_what_was_kept(tmp_path, capsys):
    for rank, numbers in enumerate((range(20), range(20, 35))):
        with ReplayBuffer(rank_folder(tmp_path, rank)) as buffer:
            buffer.append([group(n) for n in numbers])
    path = tmp_path / "out" / "groups.parquet"
    with pytest.raises(SystemExit) as stopped:
        main(["replay", "export", str(tmp_path), "-o", str(path)])
    assert stopped.value.code == 0
    assert "35 groups written to" in capsys.readouterr().out
    table = pq.read_table(path)
    assert table["policy_step"].to_pylist() == [n // 8 for n in range(35)]
    # Read as logged completions: rows that take no part are left out, all else is there.
    for number, found in enumerate(load_offline(path, encoder()).groups):
        wanted = group(number)
        part = [True] * 4 if wanted.valid is None else wanted.valid.tolist()
        for name in ("completions", "prompts", "rewards", "reference_logps"):
            pairs = zip(
                np.array(getattr(wanted, name), dtype=object)[part], getattr(found, name), strict=True
            )
            assert all(np.array_equal(a, b) for a, b in pairs)
        counted = wanted.counted_of_each
        if counted is not None:
            shown = [c for c, takes_part in zip(counted, part, strict=True) if takes_part]
            assert np.array_equal(np.concatenate(shown), found.counted)
        assert found.reference == wanted.reference


def test_without_a_buffer_nothing_is_left(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["replay", "export", str(tmp_path), "-o", str(tmp_path / "x.parquet")])
    assert stopped.value.code == 2
    assert "There is no replay buffer in" in capsys.readouterr().err
    with ReplayBuffer(tmp_path / "one") as buffer:
        buffer.append([group(0)])
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"cannot be written"):
        export(tmp_path / "one", tmp_path / "taken" / "x.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "taken"]


def test_rows_with_their_own_prompts_and_masks_are_read():
    row = {
        "prompt_ids": [[5], [5, 6]],
        "completion_ids": [[7, 8], [9]],
        "counted": [[False, True], [True]],
        "rewards": [0.0, 1.0],
    }
    (found,) = load_offline([row], encoder()).groups
    assert [p.tolist() for p in found.prompts] == [[5], [5, 6]]
    assert found.counted.tolist() == [False, True, True]
    with pytest.raises(InputError, match="there are 3 prompts for 2 completions"):
        load_offline([{**row, "prompt_ids": [[5], [5], [6]]}], encoder())
    with pytest.raises(InputError, match="completion 1: counted marks 2 of its 1 tokens"):
        load_offline([{**row, "counted": [[False, True], [True, True]]}], encoder())
