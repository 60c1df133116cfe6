"""results/language.py trains on chapters that it does not test on, and stores what running teachers say."""

import importlib

import pytest
import torch
from tiny import ROOT

TEXT = "in the beginning god created heaven and earth without form void darkness was upon face of deep"


@pytest.fixture
def tasks(monkeypatch):
    """language_tasks with 20 chapters of a text of its own."""
    monkeypatch.syspath_prepend(ROOT / "results")
    module = importlib.import_module("language_tasks")
    torch.manual_seed(0)
    words = TEXT.split()

    def verse(chapter):
        return f"{chapter} " + " ".join(words[i] for i in torch.randint(len(words), (12,)).tolist())

    own = {("Ge", str(c)): [verse(f"chapter{c}") for _ in range(16)] for c in range(20)}
    monkeypatch.setattr(module, "chapters", lambda: own)
    return module


SETTINGS = {
    "chapters": {"train": 5, "more": 4, "val": 4, "test": 4}, "vocabulary": 300, "block": 16,
    "teacher": {"layers": 1, "width": 64, "batch": 4, "epochs": 1, "lr": 1e-3},
    "student": {"layers": 1, "width": 64, "batch": 4, "epochs": 1, "lr": 1e-3},
    "temperature": 1.0, "alpha": 0.5,
}  # fmt: skip


def test_no_chapter_is_in_two_parts_and_stored_teachers_are_the_running_ones(tasks, tmp_path):
    language = importlib.import_module("language")
    task = tasks.Text(SETTINGS)
    rows = {name: {tuple(row["input_ids"].tolist()) for row in rows} for name, rows in task.data.items()}
    assert [*rows] == ["train", "more", "val", "test"] and all(rows.values())
    assert not rows["test"] & (rows["train"] | rows["more"] | rows["val"])
    teacher = language.train_teacher(task, 0, tmp_path / "run")
    assert 1 < teacher["test"] < 300 and teacher["stored"]["bytes"] > 0
    ways = {"steps": 6}
    stored, running = (
        language.train_student(task, 0, tmp_path / "run", "attention", **ways, running=running)
        for running in (False, True)
    )
    torch.testing.assert_close(stored["weights"], running["weights"], rtol=2e-2, atol=2e-3)
    alone = language.train_student(task, 0, tmp_path / "run", "ce")
    assert 1 < alone["test"] < 300 and "weights" not in alone
