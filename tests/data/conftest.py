"""Fixtures of the tests of data."""

import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The datasets package, writing its cache to a temporary folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets
