import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All of this folder is full: `make test` does not install transformers."""
    for item in items:
        if item.path.parent.name == "hf":
            item.add_marker("full")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without the variables by which TrainingArguments tell accelerate of bf16 and torch.compile; they leave them."""
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "DYNAMO_MODE"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_{name}")
