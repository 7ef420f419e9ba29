"""Hostile files and text end in success or in one clear sentence.

`make fuzz` gives each reader 10,000 inputs of this kind and as many of a coverage-guided fuzzer.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gvpo.errors import InputError
from tests.fuzz.readers import READERS, SEEDS

EXAMPLES = int(os.environ.get("GVPO_FUZZ_EXAMPLES", "40"))


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with pieces cut, copied and replaced, or any bytes at all."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + length] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[at : at + 8]) * 2)))
    return bytes(data)


@pytest.mark.parametrize("name", list(READERS))
def test_reader_succeeds_or_says_what_is_wrong(name: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.one_of(mutated(SEEDS[name]), st.binary(max_size=200)))
    def check(data: bytes) -> None:
        environment = dict(os.environ)
        try:
            READERS[name](data)
        except InputError as error:
            said.append(str(error))
        finally:
            os.environ.clear()
            os.environ.update(environment)

    said: list[str] = []
    check()
    assert all(sentence and "\n" not in sentence for sentence in said)
