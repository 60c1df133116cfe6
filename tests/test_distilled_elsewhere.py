"""Distilled in Hugging Face's Trainer, accelerate and Lightning, and the examples with them; torchdistill's numbers."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ENVIRONMENT, TORCHRUN
from test_distilled import Net, batch, ensemble

import eekd

pytestmark = pytest.mark.full  # they need packages that `make test` does not install
EXAMPLES = Path(__file__).parent.parent / "examples"
CPU = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}  # else accelerate starts each process by itself


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize("name", ["transformers", "accelerate", "lightning"])
def test_the_example_with(name, monkeypatch, tmp_path):
    needs(name, "accelerate" if name == "transformers" else name)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"with_{name}").main(3) > 0.6


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])  # at 0 theirs leaves the square of the temperature out
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_numbers_are_those_of_torchdistill(temperature, alpha):
    losses = pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed")
    generator = torch.Generator().manual_seed(0)
    s, z = (3 * torch.randn(2, 6, 7, generator=generator)).unbind()
    s, y = s.requires_grad_(), torch.randint(7, (6,), generator=generator)
    theirs = losses.KDLoss("s", "output", "z", "output", temperature, alpha)
    found = []
    for loss in (
        eekd.EEKDLoss("last", temperature=temperature, alpha=alpha)(s, z[None], y)[0],
        theirs({"s": {"output": s}}, {"z": {"output": z}}, y),
    ):
        found.append((loss.detach(), *torch.autograd.grad(loss, s)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# Hugging Face's Trainer


@pytest.fixture
def trainer(tmp_path):
    """Makes a Trainer of a seeded student on 16 rows, 3 of which do not count."""
    needs("transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    x, labels = batch(16)
    labels[[1, 2, 11]] = -100
    rows = [{"tokens": tokens, "labels": label} for tokens, label in zip(x, labels, strict=True)]

    def make(folder="out", data=rows, student=None, **options):
        torch.manual_seed(0)
        distilled = eekd.Distilled(student or Net(), ensemble())
        defaults = dict(report_to="none", optim="sgd", learning_rate=0.1, save_strategy="no", disable_tqdm=True)
        arguments = TrainingArguments(str(tmp_path / folder), use_cpu=True, **defaults | options)
        return Trainer(distilled, arguments, train_dataset=data, eval_dataset=data)

    return make


def state_of(trainer) -> dict:
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def test_accumulated_parts_are_one_batch(trainer):
    def trained(rows, parts):
        each = trainer(per_device_train_batch_size=rows, gradient_accumulation_steps=parts, max_steps=2)
        each.train()
        return state_of(each)

    whole, start = trained(8, 1), state_of(trainer())
    for rows, parts in ((4, 2), (2, 4), (1, 8)):
        torch.testing.assert_close(trained(rows, parts), whole, rtol=1e-5, atol=1e-6)
    assert all((whole[name] - start[name]).abs().max() > 1e-6 for name in whole)


def test_a_checkpoint_brings_the_attention_back(trainer, tmp_path):
    options = dict(per_device_train_batch_size=4, num_train_epochs=2, save_strategy="epoch")
    whole = trainer("whole", **options)
    whole.train()
    saved = torch.nn.Module.state_dict(trainer("again", **options).model)
    again = trainer("again", **options)
    with torch.no_grad():  # that nothing is right by its seed
        for parameter in again.model.parameters():
            parameter.add_(1)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    torch.testing.assert_close(state_of(again), state_of(whole), rtol=0, atol=0)
    assert not torch.equal(
        saved["criterion.attention.student.weight"], state_of(whole)["criterion.attention.student.weight"]
    )


def test_it_evaluates_and_predicts(trainer):
    each = trainer(per_device_eval_batch_size=5)
    x, labels = batch(16)
    labels[[1, 2, 11]] = -100
    predicted = each.predict(each.eval_dataset)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(predicted.predictions), each.model.student(x))
    assert predicted.label_ids.tolist() == labels.tolist()
    assert each.evaluate()["eval_loss"] > 0


@pytest.mark.bad_input
def test_label_smoothing_would_leave_the_snapshots_out(trainer):
    with pytest.raises(AttributeError, match="^Distilled must be trained without label_smoothing_factor"):
        trainer(label_smoothing_factor=0.1)


def test_a_text_classifier_with_padding_and_columns_of_no_use(trainer):
    needs("datasets")
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(BertForSequenceClassification(config))
    words = torch.randint(1, 30, (12, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 2, 4, 6] * 2)[:, None]).long()
    data = Dataset.from_dict(
        {"input_ids": words.tolist(), "attention_mask": mask.tolist(), "labels": [0, 1, 2] * 4, "title": ["a"] * 12}
    )
    each = trainer(data=data, student=nets[0], max_steps=1)
    each.model.ensemble = eekd.SnapshotEnsemble(nets[1:])
    torch.manual_seed(0)
    each.model = each.model_wrapped = eekd.Distilled(nets[0], eekd.SnapshotEnsemble(nets[1:]))
    each.train()
    output = each.model.eval()(input_ids=words, attention_mask=mask, labels=torch.tensor([0, 1, 2] * 4))
    assert type(output).__name__ == "SequenceClassifierOutput" and [*output][:2] == ["loss", "logits"]
    padded = torch.where(mask == 1, words, 29)  # what is masked matters to nobody
    other = each.model(input_ids=padded, attention_mask=mask, labels=torch.tensor([0, 1, 2] * 4))
    torch.testing.assert_close((other.loss, other.logits), (output.loss, output.logits))


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Bert"])
@pytest.mark.parametrize("as_tuples", [False, True])
def test_features_of_sequences_are_what_the_last_layer_reads(kind, as_tuples):
    """GPT-2 and Llama make logits of every token and take the last one's; BERT pools before."""
    needs("transformers")
    import transformers

    sizes = dict(
        hidden_size=16, n_embd=16, intermediate_size=16, num_hidden_layers=1, n_layer=1, num_attention_heads=2,
        n_head=2, num_key_value_heads=2, vocab_size=30, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(0)
    nets = [model(model.config_class(**sizes)).eval() for _ in range(3)]
    words = torch.randint(1, 30, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 2])[:, None]).long()
    inputs = dict(input_ids=words * mask, attention_mask=mask, return_dict=not as_tuples)
    logits, features = eekd.SnapshotEnsemble(nets)(**inputs)
    for net, z, u in zip(nets, logits, features, strict=True):
        head = net.classifier if kind == "Bert" else net.score
        torch.testing.assert_close(torch.nn.functional.linear(u, head.weight, head.bias), z)
        if kind != "Bert":
            body = net.base_model(inputs["input_ids"], attention_mask=mask).last_hidden_state
            torch.testing.assert_close(u, body[torch.arange(4), mask.sum(1) - 1])
    distilled = eekd.Distilled(nets[0].train(), eekd.SnapshotEnsemble(nets[1:]))
    output = distilled(**inputs, labels=torch.tensor([0, 1, 2, 0]))
    (output[0] if as_tuples else output.loss).backward()
    assert all(p.grad.abs().sum() > 0 for p in distilled.criterion.parameters())


@pytest.mark.bad_input
def test_a_model_of_two_heads_is_asked_which(tmp_path):
    """A distilled DeiT says the mean of both: the attention must not read one of the two without a word."""
    needs("transformers")
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    net = DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)).eval()
    images = torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match="got the mean of 'cls_classifier' and 'distillation_classifier'; name"):
        eekd.SnapshotEnsemble([net])(images)
    logits, features = eekd.SnapshotEnsemble([net], layer="cls_classifier")(images)
    with torch.no_grad():
        torch.testing.assert_close(features[0], net.deit(images).last_hidden_state[:, 0])
        torch.testing.assert_close(logits[0], net(images).logits)
    assert eekd.SnapshotEnsemble([net], features=False)(images)[0].shape == (1, 4, 3)


# Several processes

TWO = """
import os, sys, warnings
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from accelerate import Accelerator
from test_distilled import Net, batch, ensemble
import eekd

accelerator = Accelerator(cpu=True)
rank, size = accelerator.process_index, accelerator.num_processes
assert size == 2
torch.manual_seed(0)
student = Net()
capture = eekd.LastFeatures(student)
prepared = accelerator.prepare(student)
try:
    capture(batch()[0])
except RuntimeError as error:
    assert "past which no gradient is averaged" in str(error)
else:
    raise AssertionError("the forward past DistributedDataParallel was not noticed")

torch.manual_seed(0)
distilled = eekd.Distilled(Net(), ensemble())
alone = eekd.Distilled(Net(), ensemble())
alone.load_state_dict(distilled.state_dict())
late = eekd.LastFeatures(distilled.student)
late(batch()[0])  # before anybody wraps it
wrapped = accelerator.prepare(distilled)
try:
    for _ in range(3):
        late(batch()[0])
except RuntimeError as error:
    assert "past which" in str(error)
else:
    raise AssertionError("the forward past a DistributedDataParallel made later was not noticed")
try:
    distilled(batch()[0], labels=batch()[1])
except RuntimeError as error:
    assert "past which" in str(error)
else:
    raise AssertionError("Distilled past its DistributedDataParallel was not noticed")

x, labels = batch(9)
labels[[0, 2, 4]] = -100
mine = slice(rank, None, size)
count = int((labels != -100).sum())
loss = wrapped(x[mine], labels=labels[mine], num_items_in_batch=count).loss * size
accelerator.backward(loss)
alone(x, labels=labels).loss.backward()
for (name, p), q in zip(distilled.named_parameters(), alone.parameters()):
    torch.testing.assert_close(p.grad, q.grad, msg=name)
assert accelerator.unwrap_model(wrapped).student is distilled.student
dist.barrier()

if {trainer}:
    from transformers import Trainer, TrainingArguments
    rows = [dict(tokens=t, labels=l) for t, l in zip(*batch(16))]
    for row in (1, 2, 11):
        rows[row]["labels"] = torch.tensor(-100)
    torch.manual_seed(0)
    distilled = eekd.Distilled(Net(), ensemble())
    options = dict(report_to="none", optim="sgd", learning_rate=0.1, save_strategy="no", use_cpu=True)
    Trainer(distilled, TrainingArguments({folder!r}, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=2, ddp_backend="gloo", **options), train_dataset=rows).train()
    if rank == 0:
        torch.save(distilled.state_dict(), {folder!r} + "/two.pt")
accelerator.end_training()
"""


def test_two_processes(trainer, tmp_path):
    needs("accelerate")
    program = tmp_path / "two.py"
    program.write_text(TWO.format(tests=str(Path(__file__).parent), trainer=True, folder=str(tmp_path)))
    command = [*TORCHRUN, "--nproc-per-node", "2", program]
    done = subprocess.run([*map(str, command)], env=CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    one = trainer(per_device_train_batch_size=8, max_steps=2)
    one.train()
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), state_of(one), rtol=1e-4, atol=1e-5)


def test_the_example_with_accelerate_in_two_processes():
    needs("accelerate")
    command = [*TORCHRUN, "--nproc-per-node", "2", EXAMPLES / "with_accelerate.py", 3]
    done = subprocess.run([*map(str, command)], env=CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(re.fullmatch(r"validation accuracy ([\d.]+)%\n", done.stdout)[1]) > 50


# Lightning


def test_lightnings_checkpoint_brings_the_attention_back(tmp_path):
    needs("lightning")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.distilled = eekd.Distilled(Net(), ensemble())

        def training_step(self, batch, number):
            return self.distilled(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = [{"tokens": t, "labels": y} for t, y in zip(*batch(8), strict=True)]
    options = dict(logger=False, enable_progress_bar=False, default_root_dir=tmp_path, accelerator="cpu")

    def fit(module, epochs, **more):
        trainer = lightning.Trainer(max_epochs=epochs, **options)
        trainer.fit(module, torch.utils.data.DataLoader(rows, 4), **more)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.distilled.state_dict()

    whole = fit(Module(), 2)
    fit(Module(), 1)
    module = Module()
    with torch.no_grad():
        module.distilled.student.head.weight.add_(1)
    again = fit(module, 2, ckpt_path=tmp_path / "1.ckpt", **({"weights_only": False} if _asks() else {}))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def _asks() -> bool:
    import inspect

    import lightning

    return "weights_only" in inspect.signature(lightning.Trainer.fit).parameters
