"""What is validated and kept can be an average of the weights, which goes on to the same bits."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from killed import EVERY_STEP, NETS, Killed, check_same, go_on, killer
from recipes import config_of

from eekd.io.files import read_json
from eekd.io.tensors import load_tensors
from eekd.snapshots import SnapshotEnsemble
from eekd.train import __main__ as cli
from eekd.train import prepare, train
from eekd.train.average import WeightAverage
from eekd.train.metrics import evaluate


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_average_forgets_its_start_and_follows_the_weights():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
    average, trainer = WeightAverage(network, 0.9), SimpleNamespace(network=network, step=0, skipped=0)
    assert not any(p.requires_grad for p in average.network.parameters()) and not average.network.training
    want = network[0].weight.detach().clone()
    with average.running(trainer):
        for step in range(1, 200):
            trainer.step = step
            with torch.no_grad():
                network[0].weight.fill_(float(step))
            network[1].num_batches_tracked.fill_(step)
            average.on_step_end(trainer)
            decay = min(0.9, (1 + step) / (10 + step))
            want = decay * want + (1 - decay) * step
            torch.testing.assert_close(average.network[0].weight, want)
            assert average.network[1].num_batches_tracked == step
        trainer.step, trainer.skipped = 200, 1  # a step that was left out
        average.on_step_end(trainer)
        torch.testing.assert_close(average.network[0].weight, want)


@pytest.fixture(scope="module")
def averaged(nets, tmp_path_factory):
    session = prepare(config_of(nets, {"ema": 0.9}))
    return session, train(session.config, tmp_path_factory.mktemp("averaged") / "whole", session=session)


def test_what_is_validated_and_kept_is_the_average(averaged, nets, tmp_path):
    session, out = averaged
    plain = train(config_of(nets, {}), tmp_path / "plain")
    for name in ("teacher", "students/ce"):  # the average changes nothing in how a network trains
        assert [r["train_loss"] for r in rows(out / name)] == [r["train_loss"] for r in rows(plain / name)]
    for folder in ("teacher", "students/ce", "students/attention"):
        ours, theirs = (rows(run / folder)[-1]["val_loss"] for run in (out, plain))
        assert ours != theirs
    one, two = (load_tensors(run / "students/ce/student.safetensors") for run in (out, plain))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    network = session.build(session.spec(session.config.student))
    network.load_state_dict(one)
    found = evaluate(session, network, session.loader("val", session.config.student))
    assert found["loss"] == pytest.approx(rows(out / "students/ce")[-1]["val_loss"], rel=1e-6)
    record = read_json(out / "students/ce/student.json")
    assert record["ema"] == 0.9 and read_json(plain / "students/ce/student.json")["ema"] is None
    ensemble = SnapshotEnsemble.load(out / "teacher", features=False)
    assert ensemble.models[-1].state_dict().keys() == load_tensors(out / "teacher/snapshot-2.safetensors").keys()
    found = evaluate(session, ensemble.models[-1], session.loader("val", session.config.teacher))
    assert found["loss"] == pytest.approx(rows(out / "teacher")[-1]["val_loss"], rel=1e-6)


def test_an_average_goes_on_to_the_same_bits(averaged, tmp_path):
    session, undisturbed = averaged
    session.config = dataclasses.replace(session.config, save_every=EVERY_STEP)
    progress = killer(*range(1, 1000))
    with pytest.raises(Killed):
        train(session.config, tmp_path / "run", session=session, progress=progress)
    go_on(tmp_path / "run", session, progress)
    check_same(undisturbed, tmp_path / "run")


def test_what_is_kept_is_said(nets, capsys):
    flags = f"--dry-run --teacher.model {nets}:net --student.model {nets}:small --student.ema 0.99 --train-limit 200"
    assert cli.main(flags.split()) == 0
    said = "The students that are validated, saved and exported are averages of the weights (ema 0.99)."
    assert said in " ".join(capsys.readouterr().out.split())
