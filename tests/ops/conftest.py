import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """Every test of the ops runs with poisoned buffers."""
