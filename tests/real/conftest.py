"""What the tests with a real model share: SmolLM2-135M-Instruct from its package, or a skip that says why."""

from pathlib import Path

import pytest

from gvpo.errors import InputError
from gvpo.model.smollm2 import packaged_smollm2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return packaged_smollm2()
    except InputError as why:
        pytest.skip(str(why))
