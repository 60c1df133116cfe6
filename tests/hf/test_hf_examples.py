"""The examples run on real texts."""

import runpy
import shutil
import subprocess

import pytest
from tiny import ROOT


@pytest.fixture
def example():
    """Runs an example of examples/ in a folder of its own."""

    def run(name, *args, **options):
        return runpy.run_path(str(ROOT / "examples" / name))["main"](*args, **options)

    return run


def test_the_example_of_a_language_model(example, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "docs" / "how-to").glob("*.md"))))
    found = example("hf_causal_lm.py", text, steps=4)
    assert len(found) == 3 and all(1 < perplexity < 512 for perplexity in found.values())


def test_the_example_of_a_classifier(example):
    found = example("hf_classification.py", sorted((ROOT / "docs" / "how-to").glob("*.md"))[:3], steps=4)
    assert len(found) == 3 and all(0 <= accuracy <= 1 for accuracy in found.values())


def test_a_student_of_a_real_text_gains_by_the_snapshots(example, tmp_path):
    if not shutil.which("bible"):
        pytest.skip("needs the text of Debian's bible-kjv")
    text = tmp_path / "text.txt"
    text.write_bytes(subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True).stdout)
    found = example("hf_causal_lm.py", text)
    assert found["student by EEKD"] < found["student by cross-entropy"] < 100
