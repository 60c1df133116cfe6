"""Processes join, are counted, leave, and are refused where they could not work together."""

import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from processes import ENVIRONMENT, TORCHRUN, launch

import eekd.bank.__main__ as writer
import eekd.compare.__main__ as comparison
from eekd import parallel
from eekd.parallel.process_group import _of_the_living
from eekd.train.__main__ import main
from eekd.train.session import _device


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
    with pytest.raises(ValueError, match="device cuda must have a GPU for each process of this machine, got 1: "):
        _device("cuda")


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
