"""The loss of eekd.hf is the plain formula."""

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers

from eekd.hf import EEKDTrainer


@pytest.mark.parametrize("kind", tiny.SMALL)
def test_the_loss_of_a_language_model_is_the_plain_formula(kind, tmp_path):
    teachers = [tiny.language_model(kind, 24, seed) for seed in (1, 2, 3)]
    student, shift = tiny.language_model(kind), kind != "bert"
    trainer = tiny.trainer_of(
        student, tiny.save(teachers, tmp_path / "run"), tmp_path, weighting="uniform", temperature=2.0
    )
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    loss, got = tiny.loss_of(trainer, batch)

    student.zero_grad()
    s, y = tiny.rows_of(student, batch, shift)
    with torch.no_grad():
        z = [tiny.rows_of(teacher.eval(), batch, shift)[0] for teacher in teachers]
    want = tiny.formula(s, z, y, torch.full((len(y), 3), 1 / 3), 2.0) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    tiny.compare(got, tiny.gradients(student))


@pytest.mark.parametrize("kind, option", [("cohere", "logit_scale"), ("granite", "logits_scaling")])
def test_teachers_may_scale_their_logits_otherwise(kind, option, tmp_path):
    teachers = [tiny.language_model(kind, 24, seed, **{option: 0.7}) for seed in (1, 2)]
    student = tiny.language_model(kind)
    trainer = tiny.trainer_of(student, tiny.save(teachers, tmp_path / "run"), tmp_path, weighting="confidence")
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    loss, _ = tiny.loss_of(trainer, batch)
    s, y = tiny.rows_of(student, batch)
    with torch.no_grad():
        z = [tiny.rows_of(teacher.eval(), batch)[0] for teacher in teachers]
        losses = torch.stack([F.cross_entropy(x, y, reduction="none") for x in z], 1)
        want = tiny.formula(s, z, y, 1 - losses.softmax(1)) / len(y)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["probability", "logit"])
@pytest.mark.parametrize("weighting", ["last", "linear_increase", "entropy", "confidence", "attention"])
def test_each_weighting_is_its_formula(weighting, fusion, tmp_path, monkeypatch):
    monkeypatch.setattr("eekd.hf.tasks.WEIGHED", 5 * 3 * 4 * tiny.VOCAB)  # five rows at a time
    teachers = [tiny.language_model("llama", 24, seed) for seed in (1, 2, 3)]
    student = tiny.language_model("llama")
    options = dict(weighting=weighting, fusion=fusion, alpha=0.3)
    trainer = tiny.trainer_of(student, tiny.save(teachers, tmp_path / "run"), tmp_path, **options)
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    found = []
    attention = trainer.criterion.attention
    if attention is not None:
        torch.nn.init.normal_(attention.student.weight)
        torch.nn.init.normal_(attention.snapshots.weight)
        attention.register_forward_pre_hook(lambda module, inputs: found.append(inputs))
    loss, got = tiny.loss_of(trainer, batch)

    student.zero_grad()
    s, y = tiny.rows_of(student, batch)
    with torch.no_grad():
        z = [tiny.rows_of(teacher.eval(), batch)[0] for teacher in teachers]
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
    want = tiny.formula(s, z, y, weights, 1.0, 0.3, fusion) / n
    want.backward()
    tiny.compare(got, tiny.gradients(student))
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


def test_padded_vocabularies_are_cut_to_the_smaller(tmp_path):
    teachers = [tiny.language_model("llama", 24, 1, tiny.VOCAB + 3)]
    student = tiny.language_model("llama", vocab=tiny.VOCAB + 8)
    trainer = EEKDTrainer(
        student, tiny.settings(tmp_path, weighting="uniform"), teachers=teachers, data_collator=tiny.collate,
        processing_class=tiny.tokenizer_of(),
    )  # fmt: skip
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    loss, got = tiny.loss_of(trainer, batch)
    student.zero_grad()
    s, y = tiny.rows_of(student, batch)
    with torch.no_grad():
        z, _ = tiny.rows_of(teachers[0], batch)
    want = tiny.formula(s[:, : tiny.VOCAB + 3], [z], y, torch.ones(len(y), 1)) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    tiny.compare(got, tiny.gradients(student))


def test_logits_of_all_tokens_are_never_in_memory(tmp_path):
    vocab, student = 5000, tiny.language_model("llama", vocab=5000)
    teachers = [tiny.language_model("llama", 24, s, vocab) for s in (1, 2)]
    trainer = EEKDTrainer(
        model=student, args=tiny.settings(tmp_path, weighting="uniform"), teachers=teachers, data_collator=tiny.collate
    )
    batch = {"input_ids": torch.randint(1, vocab, (64, 30))}
    batch |= {"attention_mask": torch.ones(64, 30, dtype=torch.long), "labels": batch["input_ids"]}
    tiny.loss_of(trainer, batch)  # the heads are compared on the first batch
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple | list) else [result])
                         if isinstance(x, torch.Tensor))  # fmt: skip
            return result

    with Sizes():
        tiny.loss_of(trainer, batch)
    assert max(sizes) < 64 * 29 * vocab / 4


@pytest.mark.parametrize("weighting", ["uniform", "attention"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "tokens", "vit"])
def test_the_loss_of_a_classifier_is_the_plain_formula(kind, weighting, tmp_path):
    teachers = [tiny.classifier(kind, 24, seed) for seed in (1, 2, 3)]
    student = tiny.classifier(kind)
    run = tiny.save(teachers, tmp_path / "run")
    trainer = tiny.trainer_of(student, run, tmp_path, weighting=weighting, temperature=None)
    batch = tiny.batch_for(kind)
    loss, got = tiny.loss_of(trainer, batch)

    student.zero_grad()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    kept = batch["labels"] != -100
    s, y = student(**inputs).logits[kept], batch["labels"][kept]
    with torch.no_grad():
        z = [teacher.eval()(**inputs).logits[kept] for teacher in teachers]
    want = tiny.formula(s, z, y, torch.full((len(y), 3), 1 / 3), 5.0) / len(y)
    want.backward()
    # an attention that has not learnt yet weighs nearly alike
    tiny.compare(got, tiny.gradients(student), **(dict(rtol=2e-2, atol=2e-4) if weighting == "attention" else {}))
    if weighting == "uniform":
        torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    else:
        assert all(p.grad.abs().sum() > 0 for p in trainer.criterion.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_features_are_pooled_as_the_head_pools(kind, tmp_path):
    teacher, student = tiny.classifier(kind, 24, 1), tiny.classifier(kind)
    trainer = tiny.trainer_of(student, tiny.save([teacher], tmp_path / "run"), tmp_path, weighting="attention")
    batch = tiny.batch_for(kind)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    said = trainer.task.teach(batch, trainer.accelerator.autocast)
    base = teacher.eval().base_model(**inputs).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(said["features"][0], base[torch.arange(len(last)), last], rtol=1e-4, atol=1e-5)


def test_a_classifier_with_two_heads_is_taken_with_both(tmp_path):
    teachers, student = [tiny.classifier("deit", 24, seed) for seed in (1, 2)], tiny.classifier("deit")
    run, batch = tiny.save(teachers, tmp_path / "run"), tiny.batch_for("deit")
    trainer = tiny.trainer_of(student, run, tmp_path, weighting="uniform")
    said = trainer.task.teach(batch, trainer.accelerator.autocast)
    want = [teacher.eval()(batch["pixel_values"]).logits for teacher in teachers]  # the mean of both heads
    torch.testing.assert_close(said["logits"], want)
    trainer = tiny.trainer_of(student, run, tmp_path, weighting="attention")
    with pytest.raises(ValueError, match="feature_layer"):
        tiny.loss_of(trainer, batch)
    trainer = tiny.trainer_of(student, run, tmp_path, weighting="attention", feature_layer="cls_classifier")
    loss, _ = tiny.loss_of(trainer, batch)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", ["bert", "tokens"])
def test_models_that_return_tuples(kind, tmp_path):
    teachers, student = [tiny.classifier(kind, 24, seed) for seed in (1, 2)], tiny.classifier(kind, return_dict=False)
    trainer = tiny.trainer_of(student, tiny.save(teachers, tmp_path / "run"), tmp_path, weighting="attention")
    loss, _ = tiny.loss_of(trainer, tiny.batch_for(kind))
    assert torch.isfinite(loss)


def test_packed_sequences_teach_as_padded_ones_do(tmp_path):
    teachers = [tiny.language_model("llama", 24, seed) for seed in (1, 2)]
    student, samples = tiny.language_model("llama"), [tiny.Texts()[i] for i in range(5)]
    trainer = tiny.trainer_of(student, tiny.save(teachers, tmp_path / "run"), tmp_path, weighting="uniform")
    padded = tiny.collate(samples)
    padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    packed = transformers.DataCollatorWithFlattening()(samples)
    assert packed["input_ids"].shape == (1, sum(len(sample["input_ids"]) for sample in samples))
    want, got = tiny.loss_of(trainer, padded), tiny.loss_of(trainer, packed)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    tiny.compare(got[1], want[1])


def test_labels_that_are_shifted_already_are_taken_as_they_are(tmp_path):
    trainer = tiny.trainer_of(tiny.language_model(), tiny.run_of("gpt2", tmp_path), tmp_path, weighting="uniform")
    batch = tiny.collate([tiny.Texts()[i] for i in range(5)])
    want = tiny.loss_of(trainer, batch)
    got = tiny.loss_of(trainer, batch | {"shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)})
    torch.testing.assert_close(got[0], want[0])
    tiny.compare(got[1], want[1])


def test_a_batch_in_which_no_label_counts_adds_nothing(tmp_path):
    for kind in ("gpt2", "tokens"):
        make = tiny.language_model if kind == "gpt2" else tiny.classifier
        run = tiny.save([make(kind, 24, 1), make(kind, 24, 2)], tmp_path / kind)
        batch = tiny.batch_for(kind) if kind == "tokens" else tiny.collate([tiny.Texts()[i] for i in range(3)])
        trainer = tiny.trainer_of(make(kind), run, tmp_path, weighting="attention")
        loss, got = tiny.loss_of(trainer, batch | {"labels": torch.full_like(batch["labels"], -100)}, torch.tensor(5.0))
        assert loss == 0 and all((g == 0).all() for g in got.values())


def test_the_teachers_get_columns_that_the_student_lacks(tmp_path):
    """A DistilBERT takes no token types: its teacher, a BERT, gets them all the same."""
    config = transformers.DistilBertConfig(
        vocab_size=tiny.VOCAB, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    student, teacher = transformers.DistilBertForSequenceClassification(config), tiny.classifier("bert", 24, 1)
    rows = [{"input_ids": [i, 3, 4, 5], "token_type_ids": [0, 0, 1, 1], "labels": i % 3} for i in range(1, 9)]
    given = []
    run, data = tiny.save([teacher], tmp_path / "run"), datasets_of(rows)
    trainer = tiny.trainer_of(student, run, tmp_path, data=data, collator=transformers.default_data_collator)
    model = trainer.teachers.models[0]
    model.register_forward_pre_hook(lambda m, args, named: given.append(named), with_kwargs=True)
    trainer.train()
    assert given and all(named["token_type_ids"].tolist()[0] == [0, 0, 1, 1] for named in given)
    assert trainer.evaluate(data)["eval_loss"] > 0


def datasets_of(rows):
    return pytest.importorskip("datasets", reason="needs datasets, of the extra data").Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert", "roberta", "vit"])
def test_bfloat16_is_near_float32(kind, tmp_path):
    make, batch = tiny.language_model, tiny.collate([tiny.Texts()[i] for i in range(6)])
    if kind in ("roberta", "vit"):
        make, batch = tiny.classifier, tiny.batch_for(kind)
    teachers, found = [make(kind, 24, seed) for seed in (1, 2)], []
    for half in (False, True):
        student = make(kind)
        trainer = tiny.trainer_of(
            student, tiny.save(teachers, tmp_path / "run"), tmp_path, bf16=half, per_device_train_batch_size=6
        )
        if half:
            student = trainer.accelerator.prepare(student)
        found.append(tiny.loss_of(trainer, batch))
    assert found[1][0].dtype == torch.float32
    torch.testing.assert_close(found[1][0], found[0][0], rtol=3e-2, atol=1e-2)
    for name, gradient in found[0][1].items():
        if gradient.norm() > 1e-4:  # that of BERT's key bias is rounding alone
            assert F.cosine_similarity(gradient.flatten(), found[1][1][name].flatten(), 0) > 0.98, name
