"""Fixtures of the tests of SECURITY.md."""

import pytest


@pytest.fixture
def marker(tmp_path):
    """What code in a data file would leave; never there at the end."""
    path = tmp_path / "was run"
    yield path
    assert not path.exists()
