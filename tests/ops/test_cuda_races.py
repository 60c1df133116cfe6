"""The CUDA kernels without a GPU, under orders of their threads drawn by chance: no access that no barrier orders."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import READINGS, kd, tensors
from numerics import check
from test_cuda_on_cpu import COMPILE, HERE, SOURCES, Emulator

pytestmark = pytest.mark.slow

# What a row is: a warp, a block, a cluster, streamed; of few snapshots and of many; sparse. Labels hard and soft.
CASES = [
    ("H100", (5, 5, 10), torch.float32),
    ("H100", (2, 5, 1000), torch.bfloat16),
    ("H100", (2, 9, 100), torch.float32),
    ("H100", (1, 5, 3001), torch.bfloat16),
    ("clusters", (1, 5, 3000), torch.bfloat16),
    ("clusters", (1, 9, 1601), torch.float32),
    ("streaming", (1, 3, 1500), torch.float32),
    ("H100", (2, 5, 100, 20), torch.float32),
    ("streaming", (1, 5, 3000, 100), torch.bfloat16),
]


class RacingEmulator(Emulator):
    """With every access of a kernel looked at."""

    def __init__(self, folder: Path, changed: tuple[str, str, str] | None = None):
        sources, options = SOURCES, [*COMPILE, "-O1", "-DEEKD_RACES", "-c"]
        if changed:  # (file, text, instead)
            csrc = shutil.copytree(SOURCES[0].parents[1], folder / "csrc")
            file = csrc / "cuda" / changed[0]
            assert file.read_text().count(changed[1]) == 1
            file.write_text(file.read_text().replace(*changed[1:]))
            sources = [csrc / "cuda" / source.name for source in SOURCES]
        objects = [folder / f"{source.stem}.o" for source in (*sources, HERE / "emulator.cpp", HERE / "races.cpp")]
        for source, out in zip((*sources, HERE / "emulator.cpp"), objects, strict=False):
            instrumented = ["-fsanitize=thread", "-Wno-tsan", "-o", out, "-x", "c++", source]
            subprocess.run([*options, *instrumented], check=True)
        plain = ["-std=c++20", "-O2", "-fPIC", "-c", "-o", objects[-1], HERE / "races.cpp"]
        subprocess.run([COMPILE[0], *plain], check=True)
        subprocess.run([COMPILE[0], "-shared", "-o", folder / "races.so", *objects], check=True)
        self.load(folder / "races.so")

    def races(self, device: str, x: dict, seed: int, run=check, **options) -> int:
        self.choose(device)
        self.library.schedule(seed)
        self.library.races()
        run(x, **options)
        return self.library.races()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return RacingEmulator(tmp_path_factory.mktemp("races"))


def use(emulator, monkeypatch):
    monkeypatch.setattr(sys.modules["eekd.ops.fused"], "namespace", lambda device, backend: emulator)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_every_access_is_ordered(emulator, monkeypatch, case, soft):
    use(emulator, monkeypatch)
    device, size, dtype = case
    for seed, (fusion, objective) in enumerate(READINGS, 1):
        x = tensors(*size, dtype=dtype, soft=soft)
        assert not emulator.races(device, x, seed, fusion=fusion, attention_objective=objective)


@pytest.mark.parametrize(
    "file, snapshots, text",
    [
        ("few.cuh", 5, "      put(sums(), part);\n      group.sync();"),
        ("few.cuh", 5, "lane % lanes == 0) own()[slot] = sum;\n        group.sync_blocks();"),
        ("few.cuh", 5, "if (by_kl) put(sums_next() + slots * group.warps(), total.moved);\n    group.sync();"),
        ("few.cuh", 5, "wait(barrier(stage), phases >> stage & 1);"),
        ("rows.cuh", 9, "row.id[row.used] = m, row.w[row.used++] = w;\n      }\n    }\n    group.sync();"),
    ],
)
def test_a_barrier_that_is_missing_is_found(monkeypatch, tmp_path, file, snapshots, text):
    without = re.sub(r"group\.sync(_blocks)?\(\);|^wait\(.*\);", "", text)
    emulator = RacingEmulator(tmp_path, (file, text, without))
    use(emulator, monkeypatch)

    def run(x, **options):
        kd(**x, reduction="none", **options)

    x = tensors(1, snapshots, 3000, dtype=torch.bfloat16)
    assert emulator.races("clusters", x, 1, run)
