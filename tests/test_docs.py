"""README and docs are run: every Python block in order, page by page, and every command line parsed.

Tutorials are run as a whole, commands too. Links lead somewhere, and tables are what the results say.
"""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from eekd.bank import __main__ as bank
from eekd.compare import __main__ as compare
from eekd.io.files import read_json
from eekd.train import __main__ as train

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*"))
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - set(TUTORIALS))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))


def a_users_names() -> dict:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(3, (8,))
    return {
        "torch": torch, "epochs": 5, "teacher": network(6), "student": network(4), "make_teacher": lambda: network(6),
        "train_one_epoch": lambda model: None, "images": images, "loader": [(images, labels)] * 3,
    }  # fmt: skip


def a_language_models_names() -> dict:
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra hf")
    pytest.importorskip("accelerate", reason="needs accelerate, of the extra hf")

    def gpt2(width: int):
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=width, n_layer=1, n_head=2)
        )

    tokens = [{"input_ids": row, "labels": row} for row in torch.randint(50, (16, 12))]
    return {
        "teacher": gpt2(16), "student": gpt2(8), "collator": transformers.default_data_collator,
        "train_dataset": tokens, "eval_dataset": tokens,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder runs/teacher with a small bank in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        teacher = "--teacher.model resnet8_w4 --teacher.epochs 2 --teacher.snapshots 2 --device cpu"
        assert train.main(["teacher", *teacher.split(), "--out", "runs/teacher"]) == 0
        assert bank.main(["--teacher", "runs/teacher", "--views", "2"]) == 0
        student = "--students attention_dkd --student.epochs 1 --device cpu"
        assert train.main(["student", "--teacher", "runs/teacher", *student.split(), "--out", "runs/mine"]) == 0
        torch.use_deterministic_algorithms(False)
        return Path("runs").resolve()


@pytest.mark.parametrize(
    "page",  # `make test` does not install transformers
    [pytest.param(p, marks=[pytest.mark.full] * ("eekd.hf" in "".join(blocks(p, "python"))), id=p.stem)
     for p in PAGES if blocks(p, "python")],
)  # fmt: skip
def test_the_examples_of_a_page_run(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "LogitBank" in page.read_text() or "load_student" in page.read_text():
        Path("runs").symlink_to(request.getfixturevalue("runs"))
    Image.new("L", (8, 8)).save("image.png")
    names = a_users_names()
    if "eekd.hf" in "".join(blocks(page, "python")):
        names |= a_language_models_names()
    if "DistributedDataParallel" in "".join(blocks(page, "python")):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        exec(blocks(ROOT / "docs" / "how-to" / "own-loop.md", "python")[0], names)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    if "optimizer" in names:
        assert names["measurements"]["weights"].sum().item() == pytest.approx(1, abs=1e-5)


def commands() -> list[str]:
    """By `python` or `torchrun`: the part from "-m" on."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    found = (re.match(r"(?:python|torchrun .*?) (-m eekd\.(?:train|bank|compare)\b.*)", line) for line in lines)
    return ["python " + match[1] for match in found if match]


@pytest.mark.parametrize("command", commands())
def test_the_command_lines_parse(command, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if " eekd.compare " in f"{command} ":
        compare.parse(shlex.split(command)[3:])
        return
    if "bank" in command:
        Path("runs").symlink_to(request.getfixturevalue("runs"))
        (bank if " eekd.bank " in command else train).parse(shlex.split(command)[3:])
        return
    for run in re.findall(r"runs/\w+", command):
        Path(run).mkdir(parents=True, exist_ok=True)
        Path(run, "config.json").write_text(train.Config().to_json())
    train.parse(shlex.split(command)[3:])


def steps(tutorial: Path) -> list[tuple[str, str]]:
    """The language and the text of every block of a page, or of every cell of a notebook."""
    if tutorial.suffix == ".md":
        return re.findall(r"```(python|bash)\n(.*?)```", tutorial.read_text(), re.DOTALL)
    cells = json.loads(tutorial.read_text())["cells"]
    return [("python", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.full
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_from_its_first_line_to_its_last(tutorial, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, text in steps(tutorial):
        if language == "python":
            exec(compile(text, str(tutorial), "exec"), names)
        for line in text.splitlines() if language == "bash" else ():
            program, option, module, *flags = shlex.split(line)
            assert (program, option) == ("python", "-m")
            package = importlib.util.find_spec(module).submodule_search_locations is not None
            assert importlib.import_module(module + ".__main__" * package).main(flags) == 0


@pytest.mark.parametrize(
    "page", [*(ROOT).glob("*.md"), *(ROOT / "docs").rglob("*.md"), *TUTORIALS], ids=lambda p: p.name
)
def test_links_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).is_file()]


def test_the_tables_are_what_the_results_say():
    render = runpy.run_path(str(ROOT / "results" / "render.py"))
    assert render["main"](["--check"]) == 0


def test_a_table_that_the_results_do_not_say_is_found(tmp_path):
    main = runpy.run_path(str(ROOT / "results" / "render.py"))["main"]
    main.__globals__["HERE"] = tmp_path / "results"
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "demo.json", tmp_path / "results")
    page = tmp_path / "README.md"
    page.write_text("Before\n<!-- table:demo/sentence -->\n> Over 5 seeds, it is perfect.\n<!-- end -->\nafter\n")
    assert main(["--check"]) == 1
    assert main([]) == 0 and main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("\nafter\n") and "perfect" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("**/*.json")), ids=lambda p: p.name)
def test_results_say_where_they_come_from(path):
    text, record = path.read_text(), read_json(path)  # which refuses a seal that is not the record's
    assert record["command"]
    assert record["environment"]["commit"] and record["environment"]["torch"]
    assert not re.findall(r'"/[a-z][^" ]*"', text), "paths of one machine"
