import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """Every test of the models runs with poisoned buffers."""
