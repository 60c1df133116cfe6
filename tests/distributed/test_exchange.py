"""What processes hand each other: numbers, batch norm's statistics, snapshots, and steps to leave out."""

import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import ENVIRONMENT, TORCHRUN
from torch import nn

from eekd import models
from eekd.parallel import convert_sync_batchnorm
from eekd.parallel.sync_batchnorm import SyncBatchNorm


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
