"""Several processes: they agree with one, and with each other, whatever is spread over them and whoever is killed."""

import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

import eekd.bank.__main__ as writer
import eekd.compare.__main__ as comparison
from eekd import models, parallel
from eekd.io import tensors as tensor_files
from eekd.io.files import read_json
from eekd.parallel import convert_sync_batchnorm
from eekd.parallel.process_group import _of_the_living
from eekd.parallel.sync_batchnorm import SyncBatchNorm
from eekd.train.__main__ import main
from eekd.train.run_folder import read_metrics
from eekd.train.session import _device

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # GPUs may be too few
SMALL = [
    "--precision",
    "fp32",
    "--channels-last=false",
    "--train-limit",
    "155",
    "--teacher.model",
    "resnet8_w4",
    "--student.model",
    "resnet8_w4",
    "--teacher.epochs",
    "2",
    "--student.epochs",
    "2",
    "--teacher.snapshots",
    "2",
    "--teacher.batch-size",
    "24",
    "--student.batch-size",
    "24",
    "--deterministic",
    "--augment",
    "crop",
]
TIMES = {"seconds", "seconds_teacher", "seconds_forward", "seconds_backward"}


def launch(processes: int, *command, **environment: str) -> subprocess.CompletedProcess:
    """`python command` in one process, or by torchrun in several."""
    start = [sys.executable] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes)]
    done = subprocess.run([*start, *map(str, command)], env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


class Crew:
    """Processes started by torchrun that run one program after another, since to start takes longer than most run."""

    LOOP = """
        import itertools, os, runpy, sys, time
        from pathlib import Path
        for number in itertools.count():
            program = Path(sys.argv[1], f"{number}.py")
            while not program.exists():
                time.sleep(0.02)
            runpy.run_path(str(program))
            program.with_suffix("." + os.environ["RANK"]).touch()
    """

    def __init__(self, processes: int, folder: Path):
        self.processes, self.folder, self.programs = processes, folder, 0
        (folder / "loop.py").write_text(textwrap.dedent(self.LOOP))
        start = [*TORCHRUN, "--nproc-per-node", str(processes), folder / "loop.py", folder]
        with open(folder / "told", "w") as told:
            self.torchrun = subprocess.Popen(start, env=ENVIRONMENT, stderr=told)

    def run(self, program: str) -> None:
        path = self.folder / f"{self.programs}.py"
        self.programs += 1
        (self.folder / "unfinished").write_text(program)
        (self.folder / "unfinished").rename(path)
        end = time.monotonic() + 300
        while not all(path.with_suffix(f".{rank}").exists() for rank in range(self.processes)):
            alive = self.torchrun.poll() is None and time.monotonic() < end
            assert alive, (self.folder / "told").read_text()[-4000:]
            time.sleep(0.02)

    def end(self) -> None:
        self.torchrun.terminate()
        self.torchrun.wait()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Iterator[Callable[..., None]]:
    """Runs code in processes that have joined, unless it is to join them; `rank` and `size` are their numbers."""
    crews = {}
    start = "import torch\nfrom torch import nn\nfrom eekd import parallel\ntorch.manual_seed(0)\n"
    joined = "with parallel.process_group():\n    rank, size = parallel.rank(), parallel.world_size()\n"

    def run(processes: int, code: str, join: bool = True) -> None:
        if processes not in crews or crews[processes].torchrun.poll() is not None:
            crews[processes] = Crew(processes, tmp_path_factory.mktemp("crew"))
        code = textwrap.dedent(code)
        crews[processes].run(start + (joined + textwrap.indent(code, "    ") if join else code))

    yield run
    for crew in crews.values():
        crew.end()


def weights(run: Path, *folders: str) -> dict[str, torch.Tensor]:
    """All that the run's networks learned."""
    files = [path for folder in folders or [""] for path in sorted((run / folder).rglob("*.safetensors"))]
    assert files
    return {
        f"{path.relative_to(run)} {name}": tensor
        for path in files
        for name, tensor in tensor_files.load_tensors(path).items()
    }


def assert_close(run: Path, other: Path, tolerance: float) -> None:
    """The same files in both, and in them numbers that are close."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (theirs[name] - tensor).abs().max().item()
        assert difference <= tolerance * (1 + tensor.abs().max().item()), name


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.full)])
def test_what_processes_hand_each_other(together, processes):
    together(
        processes,
        """
        assert parallel.max_across_processes(rank, -rank, 7) == [size - 1, 0, 7]
        assert parallel.all_reduce_sum(torch.tensor([rank + 1.0, 1.0])).tolist() == [size * (size + 1) / 2, size]
        assert parallel.all_gather(torch.tensor([rank])).tolist() == [[r] for r in range(size)]
        assert parallel.broadcast(lambda: f"a folder of {rank} ünd more") == "a folder of 0 ünd more"
        buffers = [torch.tensor([rank * 4.0]), torch.tensor(rank), torch.full((2, 2), float(rank))]
        parallel.all_reduce_mean_(buffers)
        assert buffers[0].tolist() == [2.0 * (size - 1)] and buffers[1] == rank
        assert buffers[2].eq((size - 1) / 2).all()
        try:
            parallel.broadcast(lambda: 1 / 0)
        except (ZeroDivisionError, RuntimeError) as error:
            assert isinstance(error, ZeroDivisionError) == (rank == 0)
        else:
            raise AssertionError

        network = nn.Linear(3, 2)
        parallel.check_replicas(network)
        with torch.no_grad():
            network.bias[1] += 1e-7 * (rank == 1)
        try:
            parallel.check_replicas(network)
        except RuntimeError as error:
            assert "the network of process 1 differs from that of process 0" in str(error)
        else:
            raise AssertionError
    """,
    )


def test_only_who_ends_well_leaves_the_group(tmp_path):
    """Joined twice; then an error in one, which NCCL would make wait for the other."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from pathlib import Path
        import torch
        from torch import nn
        from eekd import parallel
        for _ in range(2):
            with parallel.process_group():
                network = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
                assert parallel.max_across_processes(parallel.rank()) == [1]
            del network
            assert not torch.distributed.is_initialized()
            threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
            assert not any("gloo" in thread for thread in threads), threads  # one might free a tensor at Python's end
        try:
            with parallel.process_group():
                parallel.barrier()
                if parallel.rank() == 1:
                    raise KeyError
        except KeyError:
            assert torch.distributed.is_initialized()
    """)
    )
    told = launch(2, script).stderr
    assert not re.sub(r".*OMP_NUM_THREADS.*|\*+|\s", "", told), told


@pytest.mark.parametrize("local, processes, gpus, backend, taken", [
    (0, 1, 0, "gloo", []),
    (1, 2, 2, "cpu:gloo,cuda:nccl", [1]),
    (0, 2, 1, "gloo", [0]),
    (1, 2, 1, "gloo", []),
])  # fmt: skip
def test_nccl_needs_a_gpu_for_each_process(local, processes, gpus, backend, taken, monkeypatch):
    seen, devices = [], []
    for name in parallel.TORCHRUN:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    group = torch.distributed
    monkeypatch.setattr(group, "rendezvous", lambda *_, **__: iter([(group.HashStore(), 0, 1)]))
    monkeypatch.setattr(group, "init_process_group", lambda backend, **_: seen.append(backend))
    monkeypatch.setattr(group, "destroy_process_group", lambda: seen.append("left"))
    with parallel.process_group():
        assert seen == [backend] and devices == taken
    assert seen[1:] == ["left"]
    monkeypatch.setattr("eekd.train.__main__._main", lambda argv: 2)
    assert main([]) == 2 and seen[2:] == [backend]  # this one failed, and stays


def test_the_living_meet_among_what_the_dead_left():
    """Dead first processes have left a part with everything in it, and one that was not done."""
    store = torch.distributed.HashStore()
    for left in ({"part": "old", "old/1": "x", "old/2": "y", "old/seen": "x y"}, {"part": "new", "new/2": "z"}, {}):
        for key, value in left.items():
            store.set(key, value)
        with ThreadPoolExecutor(3) as pool:
            parts = []
            for number in (2, 1, 0):  # the first process comes last
                parts.append(pool.submit(_of_the_living, store, number, 3, timedelta(seconds=30)))
                time.sleep(0.1)
        assert [part.result().add("here", 1) for part in parts] == [1, 2, 3]
    store.set_timeout(timedelta(seconds=0.2))
    for number in (0, 1):
        with pytest.raises(RuntimeError, match=f"process {number} of 2 waited 0:00:01 for the others, and not all"):
            _of_the_living(store, number, 2, timedelta(seconds=1))


@pytest.mark.full
def test_machines_that_count_their_restarts_apart_go_on(tmp_path):
    """A killed worker's machine counts a restart, the other, whose worker is still busy, none."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys, time
        from datetime import timedelta
        from pathlib import Path
        from eekd import parallel
        died = Path(sys.argv[1], "died")
        before = died.exists()
        with parallel.process_group(timedelta(seconds=60)):
            parallel.barrier()
            if not before and parallel.is_main_process():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            elif not before:
                time.sleep(90)
            assert parallel.max_across_processes(parallel.rank()) == [1]
            restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
            Path(sys.argv[1], f"went-on-{parallel.rank()}").write_text(restarts)
    """)
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    start = [
        *TORCHRUN[:-1],
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        endpoint,
        "--monitor-interval",
        "0.1",
        script,
        tmp_path,
    ]
    machines = [subprocess.Popen(start, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        told = [machine.communicate(timeout=200)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert sorted((tmp_path / f"went-on-{rank}").read_text() for rank in range(2)) == ["0", "1"]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.full)])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(together, processes):
    """Uneven shares; outputs, gradients and running statistics."""
    together(
        processes,
        """
        from eekd.parallel import convert_sync_batchnorm
        for momentum in (0.1, None):
            plain = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum)).double()
            nn.init.uniform_(plain[0].weight)
            same = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum)).double()
            same.load_state_dict(plain.state_dict())
            same = convert_sync_batchnorm(same)
            x = torch.randn(7, 3, 4, 4, dtype=torch.double)
            whole, part = x.clone().requires_grad_(), x[rank::size].clone().requires_grad_()
            direction = torch.randn_like(x)
            for _ in range(2):
                expected, got = plain(whole), same(part)
            (expected * direction).sum().backward()
            (got * direction[rank::size]).sum().backward()
            torch.testing.assert_close(got, expected[rank::size])
            torch.testing.assert_close(part.grad, whole.grad[rank::size])
            torch.testing.assert_close(parallel.all_reduce_sum(same[0].weight.grad), plain[0].weight.grad)
            for name, buffer in plain.state_dict().items():
                torch.testing.assert_close(same.state_dict()[name], buffer)
            torch.testing.assert_close(same.eval()(x), plain.eval()(x))
    """,
    )


def test_batch_norms_are_synchronised_in_place():
    network = models.build("resnet8_w4", num_classes=10, in_channels=1, image_size=8)
    names = list(network.state_dict())
    assert list(convert_sync_batchnorm(network).state_dict()) == names
    assert any(isinstance(module, SyncBatchNorm) for module in network.modules())
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_snapshots_spread_over_processes_say_the_same(together, processes):
    """Five and three of them, uneven batches, a batch of none; one alone needs no exchange."""
    together(
        processes,
        """
        from eekd import SnapshotEnsemble, models
        for count in (5, 3):
            torch.manual_seed(1)
            networks = [models.build("resnet8_w4", num_classes=10, in_channels=1, image_size=8) for _ in range(count)]
            everywhere, spread = SnapshotEnsemble(networks), SnapshotEnsemble(networks, snapshots_on="ranks")
            assert len(spread) == count and len(spread.models) == max(1, len(range(rank, count, size)))
            images = torch.randn(9, 1, 8, 8)
            for mine in (images[rank::size], images[: 2 if rank else 0]):
                for got, expected in zip(spread(mine), everywhere(mine), strict=True):
                    assert got.shape == expected.shape
                    torch.testing.assert_close(got, expected)
        alone = SnapshotEnsemble(networks[:1], snapshots_on="ranks")
        for got, expected in zip(alone(images), SnapshotEnsemble(networks[:1])(images), strict=True):
            assert torch.equal(got, expected)
        if rank == 0:
            alone(images)  # the others do not call
    """,
    )


def test_a_loop_that_joined_gpus_only_exchanges_tensors_of_the_cpu_too(together):
    """NCCL has no CPU; here it is gloo that was told to take none."""
    together(
        2,
        """
        from eekd import SnapshotEnsemble
        torch.distributed.init_process_group("cuda:gloo")
        rank = parallel.rank()
        assert parallel.max_across_processes(rank) == [1]
        assert parallel.all_reduce_sum(torch.tensor(rank + 1)) == 3
        assert parallel.all_gather(torch.tensor(rank)).tolist() == [0, 1]
        assert parallel.broadcast(lambda: "word") == "word"
        buffer = torch.tensor([2.0 * rank])
        parallel.all_reduce_mean_([buffer])
        assert buffer == 1
        networks, x = [nn.Sequential(nn.Linear(3, 2)) for _ in range(2)], torch.randn(5, 3)
        for network in networks:
            for p in network.parameters():
                torch.distributed.broadcast(p.detach(), 0, parallel.group_of(p))
        for got, expected in zip(SnapshotEnsemble(networks, snapshots_on="ranks")(x), SnapshotEnsemble(networks)(x)):
            torch.testing.assert_close(got, expected)
        torch.distributed.destroy_process_group()
    """,
        join=False,
    )


def test_ignored_rows_weigh_nothing_wherever_they_are(together):
    """The mean over the labelled rows of all processes, as docs/how-to/several-processes.md weighs the loss."""
    together(
        2,
        """
        from torch.nn.parallel import DistributedDataParallel
        from eekd import EEKDLoss
        student, criterion = nn.Linear(6, 5), EEKDLoss("confidence")
        x, z, labels = torch.randn(9, 6), torch.randn(3, 9, 5), torch.randint(5, (9,))
        labels[[0, 2, 4, 5]] = -100
        (expected,) = torch.autograd.grad(criterion(student(x), z, labels)[0], student.weight)
        mine = slice(rank, None, size)
        replica = DistributedDataParallel(student)
        loss, _ = criterion(replica(x[mine]), z[:, mine].contiguous(), labels[mine])
        rows = (labels[mine] != -100).sum()
        (loss * (size * rows / parallel.all_reduce_sum(rows))).backward()
        torch.testing.assert_close(student.weight.grad, expected)
    """,
    )


NORM_FREE = """
from torch import nn

def build(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(),
                         nn.Linear(8 * (image_size - 2) ** 2, 16), nn.GELU(), nn.Linear(16, num_classes))
"""


@pytest.fixture(scope="module")
def norm_free(tmp_path_factory) -> list:
    """Flags of a small run whose networks see every sample by itself, and its outcome in one process."""
    folder = tmp_path_factory.mktemp("norm-free")
    (folder / "net.py").write_text(NORM_FREE)
    model = f"{folder / 'net.py'}:build"
    flags = [
        "-m",
        "eekd.train",
        *SMALL,
        "--teacher.model",
        model,
        "--student.model",
        model,
        "--teacher.lr",
        "0.02",
        "--student.lr",
        "0.02",
        "--students",
        "ce",
        "uniform",
        "attention",
    ]
    launch(1, *flags, "--out", folder / "one")
    return [*flags, "--out"], folder / "one"


@pytest.mark.parametrize("processes, flags", [
    pytest.param(1, ["--accumulate", 3], marks=pytest.mark.full),
    (2, ["--accumulate", 2, "--check-replicas", 1]),
    pytest.param(4, ["--snapshots-on", "ranks"], marks=pytest.mark.full),
    pytest.param(2, ["--parallel", "fsdp", "--accumulate", 2], marks=pytest.mark.full),
])  # fmt: skip
def test_the_same_batch_gives_the_same_networks(norm_free, tmp_path, processes, flags):
    """155 images in batches of 24, the last one of 11: however they are shared out, the steps are the same."""
    command, one = norm_free
    launch(processes, *command, tmp_path / "run", *flags)
    assert_close(one, tmp_path / "run", 2e-5)
    for phase in ("teacher", "students/attention"):
        ours, theirs = (read_metrics(run / phase, {}) for run in (one, tmp_path / "run"))
        for row, other in zip(ours, theirs, strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() - TIMES:
                assert row[name] == pytest.approx(other[name], abs=1e-4), name


@pytest.mark.full
def test_processes_run_seed_after_seed(norm_free, tmp_path):
    """The first seed's networks are those of a run of its own, and what is lost of the second is done again."""
    command, one = norm_free
    run, summary = tmp_path / "run", tmp_path / "run" / "summary.json"
    launch(2, *command, run, "--seeds", 2)
    assert_close(one, run / "seed-0", 2e-5)
    before = read_json(summary)
    assert before["seeds"] == [0, 1] and len({row["test"]["std"] for row in before["rows"]}) > 1
    summary.unlink()
    shutil.rmtree(run / "seed-1" / "students")
    (run / "seed-1" / "summary.json").unlink()
    launch(2, "-m", "eekd.train", "--resume", run)
    again = read_json(summary)
    assert [row["test"] for row in again["rows"]] == [row["test"] for row in before["rows"]]


@pytest.mark.full
def test_synchronised_batch_norm_makes_processes_agree(tmp_path):
    command = ["-m", "eekd.train", *SMALL, "--students", "attention", "--sync-batchnorm", "--out"]
    launch(1, *command, tmp_path / "one")
    launch(2, *command, tmp_path / "two")
    assert_close(tmp_path / "one", tmp_path / "two", 2e-3)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.full), "fsdp"])
def test_processes_leave_out_the_same_steps(together, tmp_path, parallel):
    """A batch is bad in one process: by policy "stop" all end, by "skip" all go on without it."""
    together(
        2,
        f"""
        from pathlib import Path
        from eekd.train.config import Config, Student, Teacher
        from eekd.train import Session, train_teacher
        from eekd.train.run_folder import read_metrics
        shape = dict(model="resnet8_w4", epochs=1, batch_size=24)
        for policy in ("stop", "skip"):
            config = Config(train_limit=155, teacher=Teacher(**shape, snapshots=1), student=Student(**shape),
                            accumulate=2, parallel="{parallel}", non_finite=policy)
            session, folder, seen = Session(config), Path("{tmp_path}", policy), []

            def run(network, images, run=session.run, seen=seen):
                seen.append(images.sum().item())
                return run(network, images) * (float("nan") if rank == 1 and seen[-1] == seen[min(4, len(seen) - 1)]
                                               and len(seen) > 4 else 1)

            session.run = run
            try:
                train_teacher(config, folder, session=session)
            except FloatingPointError as error:
                where = "the loss" if rank else "nothing was bad when the batch was run again by this process"
                assert policy == "stop" and "step 3, " in str(error) and where in str(error), error
                assert (folder / ("non-finite-3" + "-process-1" * rank + ".json")).exists()
            else:
                assert policy == "skip" and read_metrics(folder, {{}})[0]["skipped"] == 1
    """,
    )


DROPOUT = """
import os, time
from torch import nn

class Dropout(nn.Dropout):  # tells its steps, and takes long enough for them to be killed
    def forward(self, x):
        if self.training and "STEPS" in os.environ:
            time.sleep(0.05)
            with open(f"{os.environ['STEPS']}-{os.getpid()}", "a") as file:
                file.write(".")
        return super().forward(x)

def build(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), Dropout(),
                         nn.Linear(8 * (image_size - 2) ** 2, 16), nn.GELU(), nn.Linear(16, num_classes))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], tuple[list, Path]]:
    """Flags of a run of so many processes, whose own random numbers decide the bits, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "net.py").write_text(DROPOUT)
    model = f"{folder / 'net.py'}:build"
    command = ["-m", "eekd.train", *SMALL, "--teacher.model", model, "--student.model", model, "--save-every", "0.05"]

    @functools.cache
    def run(processes: int) -> tuple[list, Path]:
        flags = ["--no-deterministic", "--students", "ce", "attention"] if processes == 2 else ["--students", "ce"]
        told = folder / f"told-{processes}"
        told.mkdir()
        launch(processes, *command, *flags, "--out", folder / f"{processes}", STEPS=str(told / "steps"))
        return [*command, *flags, "--out"], folder / f"{processes}"

    return run


def steps(folder: Path, processes: int) -> list[int]:
    """How many the processes took that came last."""
    files = sorted(folder.glob("steps-*"), key=lambda path: path.stat().st_mtime)
    return [path.stat().st_size for path in files[-processes:]]


def same_outcome(run: Path, other: Path) -> None:
    """Everything that was learned and measured, to the bit."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for phase in ("teacher", *(str(path.relative_to(run)) for path in run.glob("students/*"))):
        for row, again in zip(*(read_metrics(r / phase, {}) for r in (run, other)), strict=True):
            assert [(k, v) for k, v in row.items() if k not in TIMES] == [
                (k, v) for k, v in again.items() if k not in TIMES
            ]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_workers(command: list, run: Path, kills: int, rng: random.Random, processes: int = 2) -> int:
    """Starts workers by torchrun, which restarts them, and kills one at random after checkpoints.

    Gives how often it did.
    """
    start = [*TORCHRUN, "--nproc-per-node", processes, "--max-restarts", kills, "--monitor-interval", 0.1, *command]
    environment = ENVIRONMENT | {"STEPS": str(run.parent / "steps")}
    torchrun = subprocess.Popen([*map(str, start), run], env=environment, stderr=subprocess.PIPE, text=True)
    killed, last = 0, 0.0
    try:
        while torchrun.poll() is None and killed < kills:
            written = [path.stat().st_mtime for path in run.rglob("checkpoints/*.json") if path.exists()]
            if max(written, default=0.0) > last:  # the new workers have come so far
                time.sleep(rng.uniform(0, 0.3))
                if workers := children(torchrun.pid):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    killed, last = killed + 1, time.time()
            time.sleep(0.02)
        told = torchrun.communicate(timeout=300)[1]
    finally:
        torchrun.kill()
    assert torchrun.returncode == 0, told[-4000:]
    return killed


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_worker_changes_nothing(undisturbed, tmp_path, processes):
    command, run = undisturbed(processes)
    assert kill_workers(command, tmp_path / "run", 1, random.Random(0), processes) == 1
    same_outcome(run, tmp_path / "run")
    went_on, whole = steps(tmp_path, processes), steps(run.parent / f"told-{processes}", processes)
    assert len(set(went_on)) == 1 and 0 < went_on[0] < max(whole), went_on


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_workers_change_nothing(undisturbed, tmp_path, seed):
    command, run = undisturbed(2)
    assert kill_workers(command, tmp_path / "run", 1 + seed % 3, random.Random(seed))
    same_outcome(run, tmp_path / "run")


@pytest.mark.full
def test_the_slurm_script_goes_on_after_preemption(undisturbed, tmp_path):
    """With stand-ins for Slurm: SIGTERM saves and asks to be queued again, and the next start ends the run."""
    command, run = undisturbed(2)
    commands = {
        # As Slurm's own does, it kills its task, and here what that started, when it is told to end.
        "srun": """
            "$@" & task=$!
            echo $task > FOLDER/task
            trap 'kill -KILL $(cat /proc/$task/task/$task/children) $task; exit 137' TERM
            wait $task""",
        # To all processes of the step: torchrun then tells its workers a second time.
        "scancel": """
            [ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
            task=$(cat FOLDER/task)
            kill -TERM $(cat /proc/$task/task/$task/children) $task""",
        "scontrol": 'echo "$*" >> FOLDER/asked; echo localhost',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n".replace("FOLDER", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    slurm = ENVIRONMENT | {
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": str(os.getpid()), "STEPS": str(tmp_path / "steps"),
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    flags = command[command.index("eekd.train") + 1 : command.index("--out")]
    start = ["bash", ROOT / "examples" / "train.sbatch", tmp_path / "run", *flags]
    job = subprocess.Popen(start, env=slurm, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not any((tmp_path / "run").rglob("checkpoints/*.json")):
        time.sleep(0.02)
    job.terminate()
    told = job.communicate(timeout=100)[1]
    assert told.count("stopped by SIGTERM; go on with: python -m eekd.train --resume") == 2, told
    assert f"requeue {os.getpid()}" in (tmp_path / "asked").read_text()
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run(start, env=slurm, check=True, capture_output=True)
    same_outcome(run, tmp_path / "run")
    assert max(steps(tmp_path, 2)) < max(steps(run.parent / "told-2", 2))  # it went on


@pytest.mark.full
def test_a_comparison_shares_its_seeds(tmp_path):
    flags = [
        "-m",
        "eekd.compare",
        "--train-limit",
        "155",
        "--teacher.epochs",
        "1",
        "--student.epochs",
        "1",
        "--teacher.snapshots",
        "1",
        "--teacher.model",
        "resnet8_w4",
        "--methods",
        "ce",
        "--seeds",
        "2",
        "--out",
    ]
    launch(2, *flags, tmp_path / "out")
    assert read_json(tmp_path / "out" / "study.json")["seeds"] == [0, 1]


@pytest.mark.bad_input
@pytest.mark.parametrize("environment, flags, message", [
    ({"WORLD_SIZE": "2", "RANK": "1"}, [],
     "error: LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT must be set where WORLD_SIZE is, got"),
    ({"TORCHELASTIC_MAX_RESTARTS": "3"}, [], "--out must be given under torchrun --max-restarts"),
    ({}, ["--accumulate", "5"], r"teacher.batch_size must be a multiple of 5 \(1 processes x accumulate 5\), got 64"),
    ({}, ["--parallel", "fsdp", "--precision", "fp16"], "parallel must be ddp when precision is fp16, got 'fsdp'"),
])  # fmt: skip
def test_mistakes(environment, flags, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(flags) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.bad_input
@pytest.mark.parametrize("command, flags", [(writer, ["--teacher", "none"]), (comparison, ["--methods", "ce"])])
def test_part_of_the_environment_is_not_enough_to_share_work(command, flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(flags) == 2
    assert capsys.readouterr().err.startswith("error: RANK, LOCAL_RANK, ")


@pytest.mark.bad_input
def test_each_process_needs_a_gpu_of_its_own_on_cuda(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of two machines
    assert _device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device cuda needs a GPU for each process of this machine, and there are 1: "):
        _device("cuda")


@pytest.mark.full
@pytest.mark.bad_input
def test_a_restart_with_other_settings_is_refused(undisturbed, monkeypatch, capsys):
    _, run = undisturbed(2)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main(["--out", str(run), "--seed", "1"]) == 2
    assert f"{run} holds a run with another " in capsys.readouterr().err
    monkeypatch.chdir(run)  # where there is a config.json, which is not that of --out
    assert main(["--resume", "elsewhere"]) == 2
    assert "elsewhere is not a run that has begun" in capsys.readouterr().err


def test_only_the_first_process_keeps_what_all_gather(monkeypatch):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert parallel.gather_to_main_process(tensors.items()) == tensors
    monkeypatch.setattr("eekd.parallel.collectives.is_main_process", lambda: False)
    assert parallel.gather_to_main_process(tensors.items()) == {}


def test_only_what_the_exchange_raises_is_laid_on_another_process():
    gloo = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:48769"
    assert parallel.is_peer_failure(RuntimeError(gloo))
    assert parallel.is_peer_failure(torch.distributed.DistBackendError("NCCL"))
    assert not parallel.is_peer_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_process_leaves_as_it_would_and_runs_no_python_after(tmp_path):
    """What Python does last of all could end a thread of gloo's, and the process with it."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import atexit, os, sys
        from eekd import parallel
        atexit.register(print, "at exit")
        aborts = type("Aborts", (), {"__del__": lambda self, abort=os.abort: abort()})()
        print("to the end", flush=True)
        parallel.exit_process(3)
    """)
    )
    for environment, code in ((ENVIRONMENT | {"WORLD_SIZE": "2"}, 3), (ENVIRONMENT, -signal.SIGABRT)):
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout.split("\n")[0]) == (code, "to the end"), done
        assert code < 0 or done.stdout == "to the end\nat exit\n"


@pytest.mark.slow
def test_no_process_dies_at_its_end(tmp_path):
    """As many runs at a time as load the machine fourfold: about one of 35 once died when it had written everything.

    EEKD_RUNS says how many runs there are.
    """
    flags = [
        "-m",
        "eekd.train",
        *SMALL,
        "--teacher.epochs",
        "1",
        "--teacher.snapshots",
        "1",
        "--students",
        "ce",
        "--student.epochs",
        "1",
        "--out",
    ]

    def run(number: int) -> str:
        start = [*TORCHRUN, "--nproc-per-node", "2", *flags, str(tmp_path / f"{number}")]
        done = subprocess.run(start, env=ENVIRONMENT, capture_output=True, text=True)
        return done.stderr[-2000:] if done.returncode or "terminate called" in done.stderr else ""

    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        died = [told for told in pool.map(run, range(int(os.environ.get("EEKD_RUNS", 20)))) if told]
    assert not died, "\n".join(died)
