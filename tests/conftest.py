"""No network, no telemetry, quiet libraries: before any of them is imported. And nothing is left behind."""

import gc
import multiprocessing.util
import os
import shutil
import tempfile

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("gvpo", deadline=None)
hypothesis.settings.load_profile("gvpo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# For whatever is made without a name, by the libraries and by other processes too. Short, for Ray's sockets.
TEMPORARY = tempfile.mkdtemp(prefix="gvpo-")
os.environ["TMPDIR"] = tempfile.tempdir = TEMPORARY


def pytest_collection_finish() -> None:
    """Every `train` collects garbage: most of its time here, if it looks through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A green run leaves nothing; after another one its folder may be looked at."""
    if not session.testsfailed:
        multiprocessing.util._run_finalizers()  # of the server that ranks start from: its socket is there
        shutil.rmtree(TEMPORARY, ignore_errors=True)
