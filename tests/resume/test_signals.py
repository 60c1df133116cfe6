"""A signal saves the run, and says how to go on."""

import dataclasses
import os
import signal

import pytest
import torch
from killed import check_files, check_same

from eekd.io.files import read_json
from eekd.train import __main__ as cli
from eekd.train import screen, teacher, trainer
from eekd.train.checkpoints import Checkpoints
from eekd.train.signals import Stopped, signals


def shout(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # until the interpreter has seen it
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["step", "last step", "validation", "diagnosis", "between"])
def test_a_signal_saves_and_says_how_to_go_on(run, tmp_path, monkeypatch, capsys, number, where):
    session, undisturbed = run
    config = dataclasses.replace(session.config, save_every=300.0)
    (tmp_path / "config.json").write_text(config.to_json())
    sent = []

    def send(here):
        if here and not sent:
            sent.append(number)
            shout(number)

    def progress(self, phase, done, total, known):
        send(phase == "ce" and (where, done) in (("step", 2), ("last step", 4)) and "val_loss" not in known)
        send(where == "between" and phase == "teacher" and done == 8 and "val_loss" in known)

    monkeypatch.setattr(screen.Display, "__call__", progress)
    for place, name, here in ((trainer, "evaluate", "validation"), (teacher, "diagnose", "diagnosis")):

        def watched(*args, here=here, then=vars(place)[name]):  # noqa: B008
            send(where == here)
            return then(*args)

        monkeypatch.setattr(place, name, watched)
    out = tmp_path / "run"
    assert cli.main(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 128 + number
    told = capsys.readouterr().err
    assert told == f"stopped by {number.name}; continue with: python -m eekd.train --resume {out}\n"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    saved = Checkpoints(out / ("students/ce" if "step" in where else "teacher"), {}, torch.device("cpu"))
    if where != "diagnosis":
        known = read_json(max(saved.folder.glob("*.json"), key=lambda path: int(path.stem)))
        place = {"step": (0, 3), "last step": (0, 4), "validation": (0, 4), "between": (2, 0)}[where]
        assert (known["epoch"], known["batch"]) == place
    check_files(out)
    assert cli.main(["--resume", str(out)]) == 0
    check_same(undisturbed, out)


@pytest.mark.parametrize("when", ["while agreeing", "in another process", "in another at the end of an epoch"])
def test_a_signal_is_agreed_on_and_not_lost(run, tmp_path, monkeypatch, when):
    session, undisturbed = run
    (tmp_path / "config.json").write_text(dataclasses.replace(session.config, save_every=300.0).to_json())
    sent = []

    def largest(*numbers):
        here = numbers == ((0,) if "epoch" in when else (0, False))
        if here and not sent:
            sent.append(here)
            if "another" in when:
                return [signal.SIGTERM, *numbers[1:]]
            shout(signal.SIGTERM)
        return [*numbers]

    monkeypatch.setattr(trainer.parallel, "max_across_processes", largest)
    out = tmp_path / "run"
    assert cli.main(["--config", str(tmp_path / "config.json"), "--out", str(out)]) == 128 + signal.SIGTERM
    [known] = map(read_json, (out / "teacher/checkpoints").glob("*.json"))
    place = {"while agreeing": (0, 2), "in another process": (0, 1)}.get(when, (1, 0))
    assert (known["epoch"], known["batch"]) == place
    assert cli.main(["--resume", str(out)]) == 0
    check_same(undisturbed, out)


def test_a_second_signal_is_not_held():
    with pytest.raises(KeyboardInterrupt) as stop, signals, signals.held():
        shout(signal.SIGINT)
        assert signals.received == signal.SIGINT
        shout(signal.SIGINT)
    assert type(stop.value) is KeyboardInterrupt


def test_under_torchrun_a_signal_comes_twice(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(Stopped) as stop, signals, signals.held():
            shout(signal.SIGTERM)
            shout(signal.SIGTERM)
        assert stop.value.args == (signal.SIGTERM,)
        shout(signal.SIGTERM)  # while Python ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
