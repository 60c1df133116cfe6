"""`eekd VERB`: what all verbs share, --help without torch, completion, and one line at Ctrl-C."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eekd
from eekd import __main__ as command
from eekd import completion

VERBS = tuple(command.VERBS)
ENTRIES = [["-m", "eekd", verb] for verb in VERBS] + [
    ["-m", "eekd.train"], ["-m", "eekd.bank"], ["-m", "eekd.compare"], ["-m", "eekd.report"],
    ["-m", "eekd.predict"], ["-m", "eekd.evaluate"], ["-m", "eekd.export"], ["-m", "eekd.info"],
    ["-m", "eekd.kernels.bench"],
]  # fmt: skip
# Words without which a verb stops before it does anything.
NEEDED = {
    "bank": ("--teacher", "run"),
    "report": (".",),
    "predict": (".", "config.json"),
    "evaluate": (".",),
    "export": (".", "--out", "new"),
}


@pytest.fixture
def torch_that(tmp_path):
    """Makes a torch that runs some code, and an environment in which it is the one that is imported."""

    def make(code: str) -> dict[str, str]:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(code)
        return os.environ | {"PYTHONPATH": str(tmp_path)}

    return make


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: " ".join(entry[1:]))
def test_help_version_and_mistakes_need_no_torch(entry, torch_that):
    environment = torch_that("raise SystemExit('torch was imported')")

    def told(*flags):
        return subprocess.run([sys.executable, *entry, *flags], env=environment, capture_output=True, text=True)

    done = told("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: eekd "), done.stderr
    done = told("--version")
    assert (done.returncode, done.stdout) == (0, f"eekd {eekd.__version__}\n"), done.stderr
    verb = entry[-1].split(".")[-1]
    done = told(*NEEDED.get(verb, ()), "--no-such-flag")
    assert done.returncode == 2 and "--no-such-flag" in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_without_a_verb_all_are_listed(capsys):
    assert command.main([]) == command.main(["--help"]) == 0
    told = capsys.readouterr().out
    for verb, what in command.VERBS.items():
        assert told.count(f"  {verb:8} {what}\n") == 2
    with pytest.raises(SystemExit):
        command.main(["--version"])
    assert capsys.readouterr().out == f"eekd {eekd.__version__}\n"


def test_a_verb_is_its_module(capsys):
    assert command.main(["info"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["eekd", eekd.__version__]
    assert command.main(["report", "nowhere"]) == 2
    assert "nowhere must be a run folder" in capsys.readouterr().err


@pytest.mark.bad_input
@pytest.mark.parametrize(("typed", "says"), [
    ("tran", f"VERB must be one of {', '.join(VERBS)}, got 'tran'; did you mean 'train'?"),
    ("xyz", f"VERB must be one of {', '.join(VERBS)}, got 'xyz'"),
    ("--print-completion fish", "--print-completion must be bash or zsh, got fish"),
    ("--print-completion", "--print-completion must be bash or zsh, got nothing"),
])  # fmt: skip
def test_a_mistyped_verb(typed, says, capsys):
    assert command.main(typed.split()) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


@pytest.mark.parametrize(("typed", "words"), [
    (["tr"], {"train"}),
    (["train", "te"], {"teacher"}),
    (["train", "--precisio"], {"--precision"}),
    (["train", "--precision", "f"], {"fp32", "fp16"}),
    (["train", "--students", "ce", "la"], {"last"}),
    (["train", "student", "--teacher.no-ne"], {"--teacher.no-nesterov"}),
    (["train", "--preset", "cifar100-crd:vgg13-v"], {"cifar100-crd:vgg13-vgg8"}),
    (["compare", "--methods", "half", "sed"], {"sed"}),
    (["bank", "--dtype", "b"], {"bfloat16"}),
    (["bench", "--dt"], {"--dtype"}),
    (["report", "--o"], {"--out"}),
    (["info", "--v"], {"--version"}),
])  # fmt: skip
def test_bash_completes(typed, words):
    line = " ".join(f"'{word}'" for word in ("eekd", *typed))
    asked = f'COMP_WORDS=({line}); COMP_CWORD={len(typed)}; _eekd; printf "%s\\n" "${{COMPREPLY[@]}}"'
    told = subprocess.run(["bash", "-c", f"{completion.script('bash')}\n{asked}"], capture_output=True, text=True)
    assert (set(told.stdout.split()), told.stderr) == (words, "")


def test_completion_knows_the_flags_of_help(capsys):
    for verb in ("train", "bank", "compare", "bench", "report"):
        with pytest.raises(SystemExit):
            command.main([verb, "--help"])
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", capsys.readouterr().out.replace("\n", " ")))
        known = re.search(rf"^      {verb}\) words=\"(.*)\";;$", completion.script("zsh"), re.M)[1].split()
        assert flags - {"--teacher"} <= {*known, "--max-restarts"}, verb
        assert {flag for flag in known if flag.startswith("--student.")} <= flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: " ".join(entry[1:]))
def test_a_signal_while_torch_is_imported_is_one_line(entry, number, torch_that, tmp_path):
    """The torch of this test says that it is being imported, and takes its time."""
    environment = torch_that(
        "import time\nprint('importing', flush=True)\ntry:\n    for _ in range(6000):\n        time.sleep(0.01)\n"
        "except BaseException:\n    pass\n"  # short sleeps: a signal just before one is noticed after it
    )
    flags = NEEDED.get(entry[-1].split(".")[-1], ())
    (tmp_path / "config.json").write_text("{}")
    process = subprocess.Popen(
        [sys.executable, *entry, *flags],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    told, errors = process.communicate(timeout=10)
    assert (process.returncode, told, errors) == (128 + number, "", f"stopped by {number.name}\n")


def test_a_second_ctrl_c_is_one_line(tmp_path):
    """The first one waits for the end of a step, which does not come."""
    code = """
import time
from eekd import command
from eekd.train.signals import signals
def main():
    with signals, signals.held():
        print("held", flush=True)
        while not signals.received:
            time.sleep(0.01)
        print("received", flush=True)
        while True:
            time.sleep(0.01)
command.run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for word in ("held", "received"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "stopped by SIGINT\n") and process.returncode == 130


SPINS = "3000" if len(os.sched_getaffinity(0)) <= 4 else "None"


@pytest.mark.parametrize("entry, given, spins", [
    (["-m", "eekd", "train"], {}, SPINS), (["-m", "eekd.train"], {}, SPINS), (["-m", "eekd.compare"], {}, SPINS),
    (["-m", "eekd.bank", "--teacher", "."], {}, SPINS), (["-m", "eekd", "train"], {"GOMP_SPINCOUNT": "5"}, "5"),
    (["-m", "eekd", "train"], {"OMP_WAIT_POLICY": "passive"}, "None"),
])  # fmt: skip
def test_threads_wait_briefly_unless_the_environment_says_otherwise(entry, given, spins, torch_that):
    environment = torch_that("import os\nprint(os.environ.get('GOMP_SPINCOUNT'), flush=True)\nos._exit(0)")
    kept = {name: value for name, value in environment.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, *entry], env=kept | given, capture_output=True, text=True)
    assert done.stdout == f"{spins}\n", done


def test_torch_takes_how_threads_wait_from_the_environment():
    """libgomp says so when torch loads it."""
    code = "import os; os.environ |= {'GOMP_SPINCOUNT': '3000', 'OMP_DISPLAY_ENV': 'VERBOSE'}; import torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch was built with another OpenMP")
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr


def test_a_signal_after_the_end_changes_nothing():
    code = "import atexit, os, signal; from eekd import command; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", f"{code}; command.run(lambda: 3)"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


# names that are imported when they are used


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_eekd_imports_no_torch_and_a_name_what_it_needs():
    fresh("import sys, eekd; assert not {'torch', 'numpy', 'tyro'} & set(sys.modules), sorted(sys.modules)")
    fresh(
        "import sys, eekd; eekd.ensemble_kd; assert 'eekd._C' in sys.modules; import torch; "
        "torch.ops.eekd.ensemble_kd_fwd; torch.ops.eekd.sparse_ensemble_kd_fwd"
    )
    fresh("from eekd import _C; assert _C.cpu_capability()")
    fresh("import eekd; assert eekd.ops.reference.ensemble_kd and eekd.bank.LogitBank is eekd.LogitBank")
    fresh("from eekd import *; assert EEKDLoss and SnapshotEnsemble.load and use_backend")
    fresh(
        "import inspect, eekd; assert dict(inspect.getmembers(eekd)).keys() >= set(eekd.__all__) == "
        "set(eekd.__all__) & set(dir(eekd))"
    )


def test_a_name_used_first_inside_of_torch_compile():
    code = (
        "import torch, eekd\n@torch.compile(fullgraph=True, backend='eager')\n"
        "def f(s, z):\n    return eekd.ensemble_kd(s, z).loss\nprint(f(torch.ones(3, 4), torch.ones(2, 3, 4)))"
    )
    assert fresh(code).startswith("tensor(")


def test_public_names_are_pickled_by_their_own_modules():
    for name in eekd.__all__:
        assert pickle.loads(pickle.dumps(getattr(eekd, name))) is getattr(eekd, name)


def test_type_checkers_see_the_public_names():
    source = Path(eekd.__file__).read_text()
    block = source.partition("if TYPE_CHECKING:")[2].partition("\nelse:")[0]
    assert sorted(re.findall(r"\w+", " ".join(re.findall(r"import (.*)", block)))) == eekd.__all__


@pytest.mark.bad_input
def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'eekd' has no attribute 'ensemble_dk'"):
        eekd.ensemble_dk  # noqa: B018


def test_help_is_quick():
    """Of the import of torch it takes a small part; both are measured here."""

    def seconds(*words):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return time.perf_counter() - start

    torch = min(seconds("-c", "import torch") for _ in range(2))
    assert min(seconds("-m", "eekd", "train", "--help") for _ in range(2)) < torch
