"""eekd.hf: checkpoints of Hugging Face's Trainer teach. Tiny models with random weights; nothing is downloaded."""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra hf")
transformers.utils.logging.disable_progress_bar()
pytest.importorskip("accelerate", reason="needs accelerate, of the extra hf")

from eekd.hf import EEKDArguments, EEKDConfig, EEKDMixin, EEKDTrainer, SnapshotCallback, Teachers  # noqa: E402
from eekd.hf.checkpoints import checkpoint_folders  # noqa: E402
from eekd.io.tensors import load_tensors, save_tensors  # noqa: E402

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
VOCAB, LENGTH, CLASSES = 37, 10, 3
SMALL = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel,
             dict(n_positions=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, dict()),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM,
               dict(head_dim=4, query_pre_attn_scalar=4, final_logit_softcapping=2.0)),
    "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM, dict(logit_scale=0.25)),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, dict(logits_scaling=4.0)),
    "phi": (transformers.PhiConfig, transformers.PhiForCausalLM,  # a head with a bias
            dict(resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM,
             dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
}  # fmt: skip


def language_model(kind="gpt2", width=16, seed=0, vocab=VOCAB, **options):
    torch.manual_seed(seed)
    config, model, own = SMALL[kind]
    sizes = dict(n_embd=width) if kind == "gpt2" else dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    made = model(
        config(vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **{**sizes, **own, **options})
    )
    with torch.no_grad():
        for parameter in made.parameters():  # so that predictions differ, and biases are not zero
            parameter += 0.3 * torch.randn_like(parameter)
    return made


class Texts(Dataset):
    """Sequences of unequal lengths."""

    def __init__(self, count=16, seed=0, vocab=VOCAB, classes=None):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, LENGTH + 1, (count,), generator=generator).tolist()
        self.rows = [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]
        self.classes = classes

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"input_ids": row} if self.classes is None else {"input_ids": row, "labels": sum(row) % self.classes}


def collate(samples):
    """Padded on the right; labels of padding, and of every fifth token, are -100; or one label a sample."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
    ids = torch.tensor(rows)
    mask = torch.tensor([[i < len(sample["input_ids"]) for i in range(longest)] for sample in samples]).long()
    if "labels" in samples[0]:
        labels = torch.tensor([sample["labels"] for sample in samples])
    else:
        labels = ids.masked_fill(mask == 0, -100).masked_fill(ids % 5 == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def save(models, folder):
    """The folders of a run whose checkpoints the models are."""
    for m, model in enumerate(models, 1):
        model.save_pretrained(folder / f"checkpoint-{m * 5}")
    return folder


def settings(folder, **options):
    common = dict(
        per_device_train_batch_size=8, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", temperature=1.0,
    )  # fmt: skip
    return EEKDConfig(str(folder / "student-run"), **{**common, **options})


def trainer_of(student, run, folder, data=None, callbacks=None, collator=collate, teacher_base=None, **options):
    return EEKDTrainer(
        model=student,
        args=settings(folder, **options),
        teacher_checkpoints=run,
        train_dataset=Texts() if data is None else data,
        data_collator=collator,
        callbacks=callbacks,
        teacher_base=teacher_base,
    )


def rows_of(model, batch, shift=True):
    """Logits (N, C) and labels (N) of what counts in a batch, by the model's own forward."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = batch["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    return logits[kept].float(), labels[kept]


def formula(s, z, y, weights, temperature=1.0, alpha=0.5, fusion="probability"):
    """L of the rows, summed: s (N, C), z M times (N, C), y (N), weights (N, M)."""
    if fusion == "probability":
        p = sum(w[:, None] * (x / temperature).softmax(1) for w, x in zip(weights.T, z, strict=True))
    else:
        p = (sum(w[:, None] * x for w, x in zip(weights.T, z, strict=True)) / temperature).softmax(1)
    kl = (torch.special.xlogy(p, p) - p * (s / temperature).log_softmax(1)).sum()
    return alpha * F.cross_entropy(s, y, reduction="sum") + (1 - alpha) * temperature**2 * kl


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(got, want, rtol=2e-4, atol=2e-6):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def loss_of(trainer, batch, items=None):
    """Loss and gradients of a batch, by the trainer."""
    trainer.model.zero_grad()
    trainer.criterion.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


# The loss


@pytest.mark.parametrize("kind", SMALL)
def test_the_loss_of_a_language_model_is_the_plain_formula(kind, tmp_path):
    teachers = [language_model(kind, 24, seed) for seed in (1, 2, 3)]
    student, shift = language_model(kind), kind != "bert"
    trainer = trainer_of(student, save(teachers, tmp_path / "run"), tmp_path, weighting="uniform", temperature=2.0)
    batch = collate([Texts()[i] for i in range(6)])
    loss, got = loss_of(trainer, batch)

    student.zero_grad()
    s, y = rows_of(student, batch, shift)
    with torch.no_grad():
        z = [rows_of(teacher.eval(), batch, shift)[0] for teacher in teachers]
    want = formula(s, z, y, torch.full((len(y), 3), 1 / 3), 2.0) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    compare(got, gradients(student))


@pytest.mark.parametrize("fusion", ["probability", "logit"])
@pytest.mark.parametrize("weighting", ["last", "linear_increase", "entropy", "confidence", "attention"])
def test_each_weighting_is_its_formula(weighting, fusion, tmp_path, monkeypatch):
    monkeypatch.setattr("eekd.hf.tasks.WEIGHED", 5 * 3 * 4 * VOCAB)  # five rows at a time
    teachers = [language_model("llama", 24, seed) for seed in (1, 2, 3)]
    student = language_model("llama")
    options = dict(weighting=weighting, fusion=fusion, alpha=0.3)
    trainer = trainer_of(student, save(teachers, tmp_path / "run"), tmp_path, **options)
    batch = collate([Texts()[i] for i in range(6)])
    found = []
    attention = trainer.criterion.attention
    if attention is not None:
        torch.nn.init.normal_(attention.student.weight)
        torch.nn.init.normal_(attention.snapshots.weight)
        attention.register_forward_pre_hook(lambda module, inputs: found.append(inputs))
    loss, got = loss_of(trainer, batch)

    student.zero_grad()
    s, y = rows_of(student, batch)
    with torch.no_grad():
        z = [rows_of(teacher.eval(), batch)[0] for teacher in teachers]
        p = [x.softmax(1) for x in z]
    n = len(y)
    if weighting == "last":
        weights = torch.tensor([0.0, 0.0, 1.0]).expand(n, 3)
    elif weighting == "linear_increase":
        weights = torch.tensor([1 / 6, 2 / 6, 3 / 6]).expand(n, 3)
    elif weighting == "entropy":
        entropies = torch.stack([torch.special.entr(x).sum(1) for x in p], 1)
        weights = (1 - entropies / entropies.sum(1, keepdim=True)) / 2
    elif weighting == "confidence":
        losses = torch.stack([-x.log().gather(1, y[:, None])[:, 0] for x in p], 1)
        weights = (1 - losses.softmax(1)) / 2
    else:
        query, keys = attention(*(x.detach() for x in found[0]))
        weights = torch.einsum("nd,mnd->nm", query, keys).softmax(1).detach()
        assert weights.std(1).mean() > 0.05
    want = formula(s, z, y, weights, 1.0, 0.3, fusion) / n
    want.backward()
    compare(got, gradients(student))
    if weighting != "attention":
        torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    else:
        scores = torch.einsum("nd,mnd->nm", query, keys)
        if fusion == "probability":
            mixed = sum(w[:, None] * x for w, x in zip(scores.softmax(1).T, p, strict=True)).log()
        else:
            mixed = sum(w[:, None] * x for w, x in zip(scores.softmax(1).T, z, strict=True)).log_softmax(1)
        extra = F.nll_loss(mixed, y)
        torch.testing.assert_close(loss, (want + extra).detach(), rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad(extra, list(attention.parameters()))
        for parameter, gradient in zip(attention.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def classifier(kind, width=16, seed=0, **options):
    """Of sequences, of tokens or of images."""
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2, num_labels=CLASSES,
    )  # fmt: skip
    text = dict(vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=40)
    image = dict(image_size=8, patch_size=4, num_channels=1)
    dropouts = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    gpt2 = dict(
        n_positions=32, n_layer=1, n_head=2, n_embd=width, vocab_size=VOCAB, pad_token_id=0, num_labels=CLASSES,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    name, config = {
        "gpt2": ("GPT2ForSequenceClassification", gpt2),
        "llama": ("LlamaForSequenceClassification", sizes | text | dict(num_key_value_heads=2)),
        "roberta": ("RobertaForSequenceClassification", sizes | text | dropouts),
        "bert": ("BertForSequenceClassification", sizes | text | dropouts),
        "tokens": ("BertForTokenClassification", sizes | text | dropouts),
        "vit": ("ViTForImageClassification", sizes | image | dropouts),
        "deit": ("DeiTForImageClassificationWithTeacher", sizes | image | dropouts),
    }[kind]
    model = getattr(transformers, name)
    return model(model.config_class(**config | options))


def batch_for(kind, count=6):
    if kind in ("vit", "deit"):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 1, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": torch.randint(CLASSES, (count,), generator=generator)}
    batch = collate([Texts(classes=CLASSES)[i] for i in range(count)])
    if kind == "tokens":
        batch["labels"] = (batch["input_ids"] % CLASSES).masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("weighting", ["uniform", "attention"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "tokens", "vit"])
def test_the_loss_of_a_classifier_is_the_plain_formula(kind, weighting, tmp_path):
    teachers = [classifier(kind, 24, seed) for seed in (1, 2, 3)]
    student = classifier(kind)
    run = save(teachers, tmp_path / "run")
    trainer = trainer_of(student, run, tmp_path, weighting=weighting, temperature=None)
    batch = batch_for(kind)
    loss, got = loss_of(trainer, batch)

    student.zero_grad()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    kept = batch["labels"] != -100
    s, y = student(**inputs).logits[kept], batch["labels"][kept]
    with torch.no_grad():
        z = [teacher.eval()(**inputs).logits[kept] for teacher in teachers]
    want = formula(s, z, y, torch.full((len(y), 3), 1 / 3), 5.0) / len(y)
    want.backward()
    # an attention that has not learnt yet weighs nearly alike
    compare(got, gradients(student), **(dict(rtol=2e-2, atol=2e-4) if weighting == "attention" else {}))
    if weighting == "uniform":
        torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    else:
        assert all(p.grad.abs().sum() > 0 for p in trainer.criterion.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_features_are_pooled_as_the_head_pools(kind, tmp_path):
    teacher, student = classifier(kind, 24, 1), classifier(kind)
    trainer = trainer_of(student, save([teacher], tmp_path / "run"), tmp_path, weighting="attention")
    batch = batch_for(kind)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    said = trainer.task.teach(batch, trainer.accelerator.autocast)
    base = teacher.eval().base_model(**inputs).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(said["features"][0], base[torch.arange(len(last)), last], rtol=1e-4, atol=1e-5)


def test_a_classifier_with_two_heads_is_taken_with_both(tmp_path):
    teachers, student = [classifier("deit", 24, seed) for seed in (1, 2)], classifier("deit")
    run, batch = save(teachers, tmp_path / "run"), batch_for("deit")
    trainer = trainer_of(student, run, tmp_path, weighting="uniform")
    said = trainer.task.teach(batch, trainer.accelerator.autocast)
    want = [teacher.eval()(batch["pixel_values"]).logits for teacher in teachers]  # the mean of both heads
    torch.testing.assert_close(said["logits"], want)
    trainer = trainer_of(student, run, tmp_path, weighting="attention")
    with pytest.raises(ValueError, match="feature_layer"):
        loss_of(trainer, batch)
    trainer = trainer_of(student, run, tmp_path, weighting="attention", feature_layer="cls_classifier")
    loss, _ = loss_of(trainer, batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", ["bert", "tokens"])
def test_models_that_return_tuples(kind, tmp_path):
    teachers, student = [classifier(kind, 24, seed) for seed in (1, 2)], classifier(kind, return_dict=False)
    trainer = trainer_of(student, save(teachers, tmp_path / "run"), tmp_path, weighting="attention")
    loss, _ = loss_of(trainer, batch_for(kind))
    assert torch.isfinite(loss)


# The Trainer


def trained(folder, student, run, **options):
    """The student's weights after a training, and what was logged."""
    trainer = trainer_of(student, run, folder, **options)
    trainer.train()
    return trainer


def after_updates(folder, kind, weighting, size, steps, **options):
    """Weights and what was logged after two updates of 8 samples, in `steps` parts of each process."""
    data, collator = data_for(kind)
    trainer = trained(
        folder, language_model() if kind == "gpt2" else classifier(kind), folder / "run", data=data, collator=collator,
        weighting=weighting, max_steps=2, logging_steps=1, per_device_train_batch_size=size,
        gradient_accumulation_steps=steps, **options,
    )  # fmt: skip
    names = ["loss", "distillation_loss", "weight_1", "weight_2"]
    logged = {f"{name} {i}": torch.tensor(trainer.state.log_history[i][name]) for name in names for i in range(2)}
    return {**trainer.model.state_dict(), **trainer.criterion.state_dict(), **logged}


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
@pytest.mark.parametrize("weighting", ["uniform", "attention"])
def test_an_update_is_the_same_however_it_is_accumulated(kind, weighting, tmp_path):
    run_of(kind, tmp_path)
    states = [after_updates(tmp_path, kind, weighting, *parts) for parts in ((8, 1), (2, 4), (1, 8))]
    for state in states[1:]:
        compare(state, states[0], rtol=1e-4, atol=1e-5)
    before = (language_model() if kind == "gpt2" else classifier(kind)).state_dict()
    assert any(not torch.equal(before[name], states[0][name]) for name in before)


@pytest.mark.parametrize(
    "kind, weighting", [("gpt2", "attention"), pytest.param("vit", "attention", marks=pytest.mark.full)]
)
def test_two_processes_make_the_update_of_one(kind, weighting, tmp_path):
    run_of(kind, tmp_path)
    want = after_updates(tmp_path, kind, weighting, 8, 1)
    command = [*TORCHRUN, "--nproc-per-node", "2", __file__, tmp_path, kind, weighting]
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [load_tensors(tmp_path / f"process-{rank}.safetensors") for rank in range(2)]
    weights = {name for name in want if "." in name}
    compare(*({name: state[name] for name in weights} for state in states), rtol=0, atol=0)
    compare(states[0], want, rtol=1e-4, atol=1e-5)


def process():
    """One of two processes of the test above."""
    folder, (kind, weighting) = Path(sys.argv[1]), sys.argv[2:]
    state = after_updates(folder, kind, weighting, 2, 2, ddp_backend="gloo")
    save_tensors(folder / f"process-{torch.distributed.get_rank()}.safetensors", state)


def run_of(kind, folder):
    models = [language_model(kind, 24, s) if kind in SMALL else classifier(kind, 24, s) for s in (1, 2)]
    return save(models, folder / "run")


class Images(Dataset):
    def __init__(self):
        self.batch = batch_for("vit", 16)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


def data_for(kind):
    return (Images(), transformers.default_data_collator) if kind == "vit" else (Texts(), collate)


def test_the_log_says_what_the_teachers_did(tmp_path):
    trainer = trained(tmp_path, language_model(), run_of("gpt2", tmp_path), max_steps=3, logging_steps=1)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["distillation_loss"] + entry["attention_loss"], rel=1e-5)
    assert entry["weight_1"] + entry["weight_2"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_a_resumed_run_goes_on_to_the_same_bits(kind, tmp_path):
    run, data, collator = run_of(kind, tmp_path), *data_for(kind)
    dropout = dict(resid_pdrop=0.2) if kind == "gpt2" else dict(hidden_dropout_prob=0.2)

    def student():
        return language_model(**dropout) if kind == "gpt2" else classifier(kind, **dropout)

    options = dict(
        data=data, collator=collator, max_steps=6, save_strategy="steps", save_steps=2, optim="adamw_torch",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01,
    )  # fmt: skip
    whole = trained(tmp_path, student(), run, **options)
    middle = tmp_path / "student-run" / "checkpoint-4"
    assert (middle / "eekd_attention.safetensors").is_file()
    trainer = trainer_of(student(), run, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(middle))
    for module in ("model", "criterion"):
        states = [getattr(t, module).state_dict() for t in (whole, trainer)]
        compare(*states, rtol=0, atol=0)
    assert trainer.state.global_step == 6

    (middle / "eekd_attention.safetensors").rename(middle / "gone")
    trainer = trainer_of(student(), run, tmp_path, **options)
    with pytest.raises(ValueError, match="weighting must be that of .*checkpoint-4"):
        trainer.train(resume_from_checkpoint=str(middle))


def test_the_attention_learns_without_weight_decay(tmp_path):
    trainer = trained(tmp_path, language_model(), run_of("gpt2", tmp_path), max_steps=2, optim="adamw_torch")
    fresh = trainer_of(language_model(), tmp_path / "run", tmp_path).criterion
    for parameter, before in zip(trainer.criterion.parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(parameter, before)
    groups = [g for g in trainer.optimizer.param_groups if any(p is trainer.criterion.attention.student.weight
                                                               for p in g["params"])]  # fmt: skip
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0


def test_saved_students_load_as_any_model(tmp_path):
    trainer = trained(tmp_path, language_model(), run_of("gpt2", tmp_path), max_steps=1)
    trainer.save_model(str(tmp_path / "out"))
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    compare(model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_evaluation_is_that_of_a_plain_trainer(kind, tmp_path):
    data, collator = data_for(kind)
    student = language_model() if kind == "gpt2" else classifier(kind)
    trainer = trainer_of(student, run_of(kind, tmp_path), tmp_path, data=data, collator=collator)
    plain = transformers.Trainer(
        student,
        transformers.TrainingArguments(str(tmp_path / "plain"), use_cpu=True, report_to="none"),
        data_collator=collator,
    )
    got, want = (t.predict(data) for t in (trainer, plain))
    assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(got.predictions), torch.tensor(want.predictions))
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-6)


def test_logits_of_all_tokens_are_never_in_memory(tmp_path):
    vocab, student = 5000, language_model("llama", vocab=5000)
    teachers = [language_model("llama", 24, s, vocab) for s in (1, 2)]
    trainer = EEKDTrainer(
        model=student, args=settings(tmp_path, weighting="uniform"), teachers=teachers, data_collator=collate
    )
    batch = {"input_ids": torch.randint(1, vocab, (64, 30))}
    batch |= {"attention_mask": torch.ones(64, 30, dtype=torch.long), "labels": batch["input_ids"]}
    loss_of(trainer, batch)  # the heads are compared on the first batch
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple | list) else [result])
                         if isinstance(x, torch.Tensor))  # fmt: skip
            return result

    with Sizes():
        loss_of(trainer, batch)
    assert max(sizes) < 64 * 29 * vocab / 4


# Teachers


def test_checkpoints_come_in_the_order_of_their_numbers(tmp_path):
    for step in (10, 9, 100):
        language_model(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [path.name for path in checkpoint_folders(tmp_path, 2)] == ["checkpoint-9", "checkpoint-100"]
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoint-9")] == ["checkpoint-9"]
    assert len(Teachers.load(tmp_path, last=True)) == 1


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_teachers_are_the_models_that_were_saved(kind, tmp_path):
    run, models = run_of(kind, tmp_path), [language_model(kind, 24, s) if kind in SMALL else classifier(kind, 24, s)
                                           for s in (1, 2)]  # fmt: skip
    teachers = Teachers.load(run)
    for got, want in zip(teachers, models, strict=True):
        compare(got.state_dict(), want.state_dict(), rtol=0, atol=0)
        assert not got.training and not any(p.requires_grad for p in got.parameters())


def test_a_sharded_checkpoint_is_read_and_a_missing_shard_is_named(tmp_path):
    model = language_model("llama", 24, 1)
    model.save_pretrained(tmp_path / "checkpoint-1", max_shard_size="4KB")
    shards = sorted((tmp_path / "checkpoint-1").glob("model-*.safetensors"))
    assert len(shards) > 1
    compare(next(iter(Teachers.load(tmp_path))).state_dict(), model.state_dict(), rtol=0, atol=0)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        Teachers.load(tmp_path)


def test_the_callback_saves_evenly_spaced_snapshots_which_then_teach(tmp_path):
    args = transformers.TrainingArguments(
        str(tmp_path / "teacher"), max_steps=10, save_strategy="steps", save_steps=4, use_cpu=True, report_to="none",
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        language_model("gpt2", 24), args, train_dataset=Texts(), data_collator=collate, callbacks=[SnapshotCallback(3)]
    ).train()
    there = sorted(path.name for path in (tmp_path / "teacher").glob("checkpoint-*"))
    assert there == ["checkpoint-10", "checkpoint-3", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    names = [path.name for path in checkpoint_folders(tmp_path / "teacher")]
    assert names == ["checkpoint-3", "checkpoint-6", "checkpoint-10"]
    trained(tmp_path, language_model(), tmp_path / "teacher", max_steps=1)
    shutil.rmtree(tmp_path / "teacher" / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match=r"got none of 6\b"):
        Teachers.load(tmp_path / "teacher")


def test_training_args_are_never_unpickled(tmp_path, monkeypatch):
    run = run_of("gpt2", tmp_path)
    for folder in run.iterdir():
        (folder / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    assert len(Teachers.load(run)) == 2


def tokenizer_of(vocab=VOCAB, swapped=False):
    """A tokenizer of words t0, t1, ...; `swapped` gives the last two each other's id."""
    tokenizers = pytest.importorskip("tokenizers")
    ids = {f"t{i}": i for i in range(vocab)}
    if swapped:
        ids |= {f"t{vocab - 1}": vocab - 2, f"t{vocab - 2}": vocab - 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0", eos_token="t0")


def test_padded_vocabularies_are_cut_to_the_smaller(tmp_path):
    teachers = [language_model("llama", 24, 1, VOCAB + 3)]
    student = language_model("llama", vocab=VOCAB + 8)
    trainer = EEKDTrainer(
        student, settings(tmp_path, weighting="uniform"), teachers=teachers, data_collator=collate,
        processing_class=tokenizer_of(),
    )  # fmt: skip
    batch = collate([Texts()[i] for i in range(6)])
    loss, got = loss_of(trainer, batch)
    student.zero_grad()
    s, y = rows_of(student, batch)
    with torch.no_grad():
        z, _ = rows_of(teachers[0], batch)
    want = formula(s[:, : VOCAB + 3], [z], y, torch.ones(len(y), 1)) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    compare(got, gradients(student))


@pytest.mark.bad_input
def test_other_tokenizers_are_refused(tmp_path):
    run = run_of("gpt2", tmp_path)
    options = dict(args=settings(tmp_path), teacher_checkpoints=run, data_collator=collate)
    for folder in run.glob("checkpoint-*"):
        tokenizer_of().save_pretrained(folder)
    EEKDTrainer(language_model(), processing_class=tokenizer_of(), **options)
    with pytest.raises(ValueError, match="must be the student's, got 't36' for id 35, where the student has 't35'"):
        tokenizer_of(swapped=True).save_pretrained(run / "checkpoint-10")
        EEKDTrainer(language_model(), processing_class=tokenizer_of(), **options)
    with pytest.raises(ValueError, match="must be the student's"):
        EEKDTrainer(language_model(vocab=40), processing_class=tokenizer_of(40), **options)
    with pytest.raises(ValueError, match="must have a row for each of 40 tokens in its head, got 37"):
        shutil.rmtree(run)
        run_of("gpt2", tmp_path)
        EEKDTrainer(language_model(vocab=40), processing_class=tokenizer_of(40), **options)


def test_the_mixin_makes_an_sft_trainer_one_too(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl, which CI has not")
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra data")

    @dataclasses.dataclass
    class Config(EEKDArguments, trl.SFTConfig):
        pass

    class SFT(EEKDMixin, trl.SFTTrainer):
        pass

    texts = [" ".join(f"t{i}" for i in Texts()[n]["input_ids"]) for n in range(16)]
    states, losses = [], []
    for size, steps in ((8, 1), (2, 4)):
        args = Config(
            str(tmp_path / "sft"), max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            use_cpu=True, report_to="none", save_strategy="no", max_length=32, learning_rate=0.1, optim="sgd",
            max_grad_norm=0.0, bf16=False, lr_scheduler_type="constant", weighting="uniform", logging_steps=1,
            eos_token="t0",
        )  # fmt: skip
        student = language_model("llama")
        trainer = SFT(
            student, args, train_dataset=datasets.Dataset.from_dict({"text": texts}), processing_class=tokenizer_of(),
            eval_dataset=datasets.Dataset.from_dict({"text": texts}), teachers=[language_model("llama", 24, 1)],
        )  # fmt: skip
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        states.append(student.state_dict())
        losses.append(trainer.state.log_history[0]["distillation_loss"])
    compare(*states, rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Examples


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


@pytest.mark.full
def test_a_student_of_a_real_text_gains_by_the_snapshots(example, tmp_path):
    if not shutil.which("bible"):
        pytest.skip("needs the text of Debian's bible-kjv")
    text = tmp_path / "text.txt"
    text.write_bytes(subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True).stdout)
    found = example("hf_causal_lm.py", text)
    assert found["student by EEKD"] < found["student by cross-entropy"] < 100


# Adapters


def lora_run(folder, base, count=2, **options):
    """The folders of a run that trained an adapter; the models with each merged, for comparison."""
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    base.save_pretrained(folder / "base")
    merged = []
    for m in range(1, count + 1):
        model = peft.get_peft_model(
            type(base).from_pretrained(folder / "base"), peft.LoraConfig(r=2, lora_alpha=4, **options)
        )
        torch.manual_seed(m)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) / 2)
        model.save_pretrained(folder / "run" / f"checkpoint-{m}")
        merged.append(model.merge_and_unload().eval())
    return folder / "run", merged


@pytest.mark.parametrize("fusion", ["probability", "logit"])
def test_adapters_of_one_base_teach_as_merged_models_do(fusion, tmp_path):
    run, merged = lora_run(tmp_path, language_model("llama", 24, 1), target_modules=["q_proj", "v_proj", "up_proj"])
    student, options = language_model("llama"), dict(weighting="linear_increase", fusion=fusion)
    batch = collate([Texts()[i] for i in range(6)])
    got = loss_of(adapters := trainer_of(student, run, tmp_path, **options), batch)
    assert len(adapters.teachers) == 2 and len(adapters.teachers.models) == 1
    assert not any(p.requires_grad for p in adapters.teachers.models[0].parameters())
    assert all(head is adapters.task.heads[0] for head in adapters.task.heads)  # one projection for all
    whole = EEKDTrainer(student, settings(tmp_path, **options), teachers=merged, data_collator=collate)
    want = loss_of(whole, batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    compare(got[1], want[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(t.task.teach(batch, t.accelerator.autocast)["hidden"] for t in (adapters, whole)),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_adapters_of_a_classifier_bring_heads_of_their_own(tmp_path):
    run, merged = lora_run(tmp_path, classifier("bert", 24, 1), target_modules=["query"], task_type="SEQ_CLS")
    student, batch = classifier("bert"), batch_for("bert")
    trainer = trainer_of(student, run, tmp_path, weighting="attention")
    loss_of(trainer, batch)
    said = trainer.task.teach(batch, trainer.accelerator.autocast)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        want = [model(**inputs).logits for model in merged]
        features = [model.bert(**inputs).pooler_output for model in merged]
    torch.testing.assert_close(said["logits"], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said["features"], torch.stack(features), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want[0], want[1], atol=1e-2)


def test_adapters_need_the_memory_of_one_model(tmp_path):
    run, _ = lora_run(tmp_path, language_model("llama", 64, 1), 4, target_modules=["q_proj", "v_proj"])
    teachers = Teachers.load(run)
    base = sum(p.numel() for p in language_model("llama", 64, 1).parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for model in teachers.models
                for p in model.parameters()}  # fmt: skip
    assert 4 * base < sum(storages.values()) < 4 * base * 1.3  # float32


def test_a_student_with_an_adapter_trains_it_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    student = peft.get_peft_model(
        language_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: p.clone() for name, p in student.named_parameters()}
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer = trained(tmp_path, student, save([language_model("llama", 24, 1)], tmp_path / "run"), **options)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    state = {k: v.clone() for k, v in student.state_dict().items()}
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.zero_()
    again = trainer_of(student, tmp_path / "run", tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "student-run" / "checkpoint-2"))
    compare(student.state_dict(), state, rtol=0, atol=0)
    compare(again.criterion.state_dict(), trainer.criterion.state_dict(), rtol=0, atol=0)


@pytest.mark.bad_input
def test_adapters_that_cannot_teach_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    base = language_model("llama", 24, 1)
    run, _ = lora_run(tmp_path, base, target_modules=["q_proj"])
    for other in (language_model("llama", 32), language_model("llama", 24, num_hidden_layers=2)):
        refused("must fit its base model", language_model("llama"), run, tmp_path, teacher_base=other)
    path = run / "checkpoint-2" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "somewhere/else"}))
    refused("adapters must be of one base model", language_model("llama"), run, tmp_path)
    path.write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
    refused("must not be of prompt learning", language_model("llama"), run, tmp_path)

    run, _ = lora_run(tmp_path / "head", base, target_modules=["lm_head"])
    refused("got also base_model.model.lm_head", language_model("llama"), run, tmp_path)
    run, _ = lora_run(tmp_path / "saved", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    refused("must have no adapter on its head", language_model("llama"), run, tmp_path)
    run = save([base], tmp_path / "whole")
    student = peft.get_peft_model(language_model("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    refused("the student must have no adapter on its head", student, run, tmp_path)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused("prompt learning", peft.get_peft_model(language_model("llama"), prompts), run, tmp_path)


# Bad input


def refused(match, student=None, run=None, folder=None, error=ValueError, **options):
    with pytest.raises(error, match=match) as found:
        trainer_of(student or language_model(), run, folder, **options)
    assert "\n" not in str(found.value)


@pytest.mark.bad_input
def test_settings_out_of_range_are_refused(tmp_path):
    for options, match in (
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"weighting": "atention"}, "did you mean 'attention'"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"fusion": "mean"}, "fusion must be"),
        ({"snapshots": 0}, "snapshots must be"),
    ):
        with pytest.raises(ValueError, match=match):
            settings(tmp_path, **options)
    run = run_of("gpt2", tmp_path)
    refused("snapshots must be from 1 to 2", None, run, tmp_path, snapshots=3)
    refused("torch_compile must be False", None, run, tmp_path, torch_compile=True)
    refused("teacher_checkpoints or teachers must be given, got none", None, None, tmp_path)
    refused("must be folders", None, tmp_path / "nowhere", tmp_path, error=FileNotFoundError)
    with pytest.raises(TypeError, match="args must be an EEKDConfig"):
        EEKDTrainer(language_model(), transformers.TrainingArguments(str(tmp_path), use_cpu=True), teachers=[])
    with pytest.raises(ValueError, match="save_total_limit must be None"):
        trainer_of(language_model(), run, tmp_path, callbacks=[SnapshotCallback(2)], save_total_limit=1)


@pytest.mark.bad_input
def test_students_that_are_none_of_the_tasks(tmp_path):
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(
        "the student must be a causal",
        transformers.T5ForConditionalGeneration(config),
        run_of("gpt2", tmp_path),
        tmp_path,
    )


@pytest.mark.bad_input
def test_vocabularies_that_do_not_fit(tmp_path):
    run = save([language_model("gpt2", 24, 1, VOCAB + 3)], tmp_path / "run")
    refused("heads must have one number of tokens, or processing_class", None, run, tmp_path)


@pytest.mark.bad_input
def test_checkpoints_without_all_weights(tmp_path):
    run = run_of("gpt2", tmp_path)
    model = classifier("bert", 24, 1)
    model.bert.save_pretrained(tmp_path / "bare" / "checkpoint-1")
    config = json.loads((tmp_path / "bare" / "checkpoint-1" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "bare" / "checkpoint-1" / "config.json").write_text(json.dumps(config))
    refused("must hold all weights of BertForSequence", classifier("bert"), tmp_path / "bare", tmp_path)
    for path in run.glob("*/model.safetensors"):
        path.unlink()
    refused("must hold model.safetensors", None, run, tmp_path, error=FileNotFoundError)
    (run / "checkpoint-5" / "pytorch_model_fsdp_0").mkdir()
    refused("accelerate merge-weights", None, run, tmp_path, error=FileNotFoundError)


@pytest.mark.bad_input
def test_classes_that_are_others(tmp_path):
    student = classifier("bert", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    names = dict(id2label={0: "b", 1: "a", 2: "c"}, label2id={"b": 0, "a": 1, "c": 2})
    run = save([classifier("bert", 24, 1, **names)], tmp_path / "run")
    refused("must have the student's classes, got 'b' for class 0", student, run, tmp_path)
    run = save([classifier("bert", 24, 1)], tmp_path / "other")
    refused("classify into one of several", classifier("bert", problem_type="regression"), run, tmp_path)


@pytest.mark.bad_input
def test_a_head_that_the_model_does_not_use_is_refused_on_the_first_batch(tmp_path):
    class Odd(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits.roll(1, -1)
            return output

    Odd.__name__ = "GPT2LMHeadModel"
    student = Odd(language_model().config)
    trainer = trainer_of(student, run_of("gpt2", tmp_path), tmp_path)
    with pytest.raises(ValueError, match="the student must give the logits of its head"):
        trainer.train()


@pytest.mark.bad_input
def test_a_soft_cap_that_only_one_has_is_refused(tmp_path):
    student = language_model("gemma2", final_logit_softcapping=None)
    trainer = trainer_of(student, save([language_model("gemma2", 24, 1)], tmp_path / "run"), tmp_path)
    with pytest.raises(ValueError, match="soft-cap"):
        trainer.train()


@pytest.mark.bad_input
def test_batches_without_labels(tmp_path):
    trainer = trainer_of(
        language_model(), run_of("gpt2", tmp_path), tmp_path,
        collator=lambda samples: {k: v for k, v in collate(samples).items() if k != "labels"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="a batch must have labels"):
        trainer.train()


if __name__ == "__main__":
    process()
