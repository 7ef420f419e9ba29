"""What reads files or text from outside. Each takes bytes and must return, or raise an `InputError`."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from gvpo.data import load_prompts
from gvpo.errors import InputError
from gvpo.replay.buffer import ReplayBuffer
from gvpo.replay.view import ReplayView
from gvpo.rewards import extract_answer
from gvpo.rewards.functions import accuracy
from gvpo.run import RunDirectory
from gvpo.samples import by_difficulty, read_samples, stories
from gvpo.trl.arguments import parse_arguments
from tests.replay.groups import group, same


def config(data: bytes) -> None:
    """A recipe of `gvpo train`."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_bytes(data)
        parse_arguments(["--config", str(recipe)])


def prompts(data: bytes) -> None:
    """A data set of prompts."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("jsonl", "parquet"):
            path = Path(folder) / f"data.{suffix}"
            path.write_bytes(data)
            with contextlib.suppress(InputError):
                load_prompts(str(path))


def answers(data: bytes) -> None:
    """A model's response, in which the answer is looked for."""
    extract_answer(data.decode("utf-8", errors="replace"))


def rewards(data: bytes) -> None:
    """A response and, after a zero byte, the ground truth: the whole way to a reward."""
    response, _, truth = data.decode("utf-8", errors="replace").partition("\0")
    assert accuracy([""], [response], answer=[truth])[0] in (0.0, 1.0, None)


def replay(data: bytes) -> None:
    """A replay buffer, with some of its bytes replaced: the first four say where, the rest is what."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in _buffer_files().items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        victims = sorted(_buffer_files())
        name = victims[data[0] % len(victims)] if data else victims[0]
        content = bytearray((Path(folder) / name).read_bytes())
        at = int.from_bytes(data[1:4], "little") % (len(content) + 1)
        content[at : at + len(data[4:])] = data[4:]
        (Path(folder) / name).write_bytes(bytes(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _read_all(Path(folder))


def metrics(data: bytes) -> None:
    """A run's metrics, as `gvpo report` and resuming read them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_bytes(data)
        RunDirectory(folder).metrics()


def samples(data: bytes) -> None:
    """A run's completions, as `gvpo report` reads and tells them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "samples.jsonl").write_bytes(data)
        lines = read_samples(Path(folder))
        stories(lines)
        for held_out in (False, True):
            by_difficulty(lines, held_out=held_out)


READERS: dict[str, Callable[[bytes], None]] = {
    "config": config,
    "prompts": prompts,
    "answers": answers,
    "rewards": rewards,
    "replay": replay,
    "metrics": metrics,
    "samples": samples,
}

SEEDS: dict[str, list[bytes]] = {
    "config": [
        b"dataset_name: gsm8k\nbeta: 0.1\nreward_funcs: [accuracy]\nenv: {A: 1}\n",
        b"beta: [1, 2]\nnum_generations: x\n",
        b"env: {A=: 1}\n",
    ],
    "prompts": [
        b'{"question": "1+1?", "answer": "#### 2", "id": 1}\n{"question": "2", "answer": "\\\\boxed{2}"}\n',
        b'{"prompt": [{"role": "user", "content": "a"}], "answer": 3}\n',
    ],
    "answers": [
        b"The answer is $\\boxed{\\frac{1}{2}}$.",
        b"#### 1,234.50",
        b"so x \\in [1, 2) \\cup \\{3\\}",
    ],
    "rewards": [
        b"It is $\\boxed{\\frac{2}{4}}$.\x000.5",
        b"The answer is $(x-1)^2$\x00x^2-2x+1",
        b"#### [1, 2)\x00\\{1\\} \\cup (1,2)",
    ],
    "replay": [b"\x00" + at + b"\x00\xff" * 3 for at in (b"\x10\x00\x00", b"\x80\x25\x00", b"\x00\x90\x01")]
    + [b"\x02\x42\x00\x00[[7", b"\x02\x90\x00\x00\x00}"],
    "metrics": [b'{"step": 1, "loss": 0.5}\n{"step": 2}\n{"st'],
    "samples": [
        b'{"step": %d, "held_out": false, "rewards": {"a": 0.5, "b": 1}, "samples": '
        b'[{"key": "a", "prompt": "p", "completion": "c", "reward": null}]}\n' * 2 % (1, 2),
    ],
}


@cache
def _buffer_files() -> dict[str, bytes]:
    """The files of a small buffer."""
    with tempfile.TemporaryDirectory() as folder:
        with ReplayBuffer(folder) as buffer:
            for start in (0, 5):
                buffer.append([group(n) for n in range(start, start + 5)])
            buffer.save(Path(folder) / "saved")
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _read_all(folder: Path) -> None:
    """What is read must be what was written: a group that is torn or altered may be missing, never wrong."""
    written = {n: group(n) for n in range(10)}
    with contextlib.suppress(InputError), ReplayView(folder) as view:
        for found in view.read(range(len(view))):
            assert any(same(found, original) for original in written.values())
    with contextlib.suppress(InputError), ReplayView(folder / "saved") as view:
        for found in view.read(range(len(view))):
            assert any(same(found, original) for original in written.values())
    with ReplayBuffer(folder) as buffer:
        with contextlib.suppress(InputError):
            buffer.restore(folder / "saved")
        buffer.append([group(10)])
        assert same(buffer.read([len(buffer) - 1])[0], group(10))
