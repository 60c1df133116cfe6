import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All of this folder is full: `make test` does not install transformers."""
    for item in items:
        if item.path.parent.name == "hf":
            item.add_marker("full")
