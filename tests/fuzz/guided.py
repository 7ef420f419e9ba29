"""The same readers under a coverage-guided fuzzer: `python -m tests.fuzz.guided READER -runs=10000`."""

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gvpo"]):
    from tests.fuzz.readers import READERS, SEEDS

from gvpo.errors import InputError


def main() -> None:
    name = sys.argv.pop(1)
    reader, environment = READERS[name], dict(os.environ)

    def one_input(data: bytes) -> None:
        try:
            reader(data)
        except InputError:
            pass
        finally:
            os.environ.clear()
            os.environ.update(environment)

    corpus = Path(tempfile.mkdtemp(prefix="gvpo-fuzz-"))
    for i, seed in enumerate(SEEDS[name]):
        (corpus / str(i)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
