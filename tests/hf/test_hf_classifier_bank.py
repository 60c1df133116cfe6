"""A classifier learns from a bank what it learns from the teachers that wrote it."""

import pytest
import tiny
import torch
import transformers

from eekd.hf import ClassifierBank, EEKDTrainer, Teachers, write_classifier_bank, write_token_bank
from eekd.hf.banks import sample_key


class Tagged(tiny.Texts):
    """Every token has a label."""

    def __getitem__(self, index):
        return {"input_ids": self.rows[index]}


def tagged(samples):
    batch = tiny.collate(samples)
    return batch | {"labels": (batch["input_ids"] % tiny.CLASSES).masked_fill(batch["attention_mask"] == 0, -100)}


def run_of(kind, folder):
    return tiny.save([tiny.classifier(kind, 24, seed) for seed in (1, 2)], folder / "run")


def data_of(kind):
    if kind == "vit":
        return tiny.Images(), transformers.default_data_collator
    return (Tagged(), tagged) if kind == "tokens" else (tiny.Texts(classes=tiny.CLASSES), tiny.collate)


def trainer_with(kind, bank, folder, **options):
    named = {name: options.pop(name) for name in ("teacher_checkpoints", "processing_class") if name in options}
    data, collator = options.pop("data", None) or data_of(kind)
    student = options.pop("student", None) or tiny.classifier(kind)
    args = tiny.settings(folder, **options)
    return EEKDTrainer(student, args, bank=bank, train_dataset=data, data_collator=collator, **named)


@pytest.mark.parametrize("weighting", ["last", "uniform", "confidence", "attention"])
@pytest.mark.parametrize("kind", ["bert", "llama", "tokens", "vit"])
def test_a_bank_teaches_as_the_teachers_do(kind, weighting, tmp_path):
    run, (data, collator) = run_of(kind, tmp_path), data_of(kind)
    write_classifier_bank(tmp_path / "bank", Teachers.load(run), data, collator, dtype="float32", batch_size=3)
    batch = collator([data[i] for i in (3, 0, 7, 5)])  # drawn and padded otherwise
    found = [
        tiny.loss_of(trainer, batch)
        for trainer in (
            tiny.trainer_of(tiny.classifier(kind), run, tmp_path, data=data, collator=collator, weighting=weighting),
            trainer_with(kind, tmp_path / "bank", tmp_path, weighting=weighting),
        )
    ]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    tiny.compare(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_labels_of_padding_do_not_count_with_a_bank(tmp_path):
    run, (data, collator) = run_of("tokens", tmp_path), data_of("tokens")
    write_classifier_bank(tmp_path / "bank", run, data, collator, dtype="float32")
    batch = collator([data[i] for i in (3, 0, 7, 5)])
    assert (batch["labels"] == -100).any()
    bank = trainer_with("tokens", tmp_path / "bank", tmp_path)
    want = tiny.loss_of(tiny.trainer_of(tiny.classifier("tokens"), run, tmp_path, data=data, collator=collator), batch)
    got = tiny.loss_of(bank, batch | {"labels": batch["labels"].clamp(min=0)})
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    tiny.compare(got[1], want[1], rtol=1e-4, atol=1e-6)


def test_samples_that_differ_in_any_input_are_told_apart(tmp_path):
    """Two documents of the same words in other places, of which the bank held the first alone."""
    run = tiny.save([tiny.classifier("boxes", 24, seed, initializer_range=0.5) for seed in (1, 2)], tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(8):
        sample = tiny.Texts(classes=tiny.CLASSES)[i // 2]
        boxes = torch.randint(100, (len(sample["input_ids"]), 4), generator=generator).sort().values  # right of left
        data.append(sample | {"bbox": boxes.tolist()})

    def collator(samples):
        batch = tiny.collate(samples)
        boxes = [torch.tensor(sample["bbox"]) for sample in samples]
        return batch | {"bbox": torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)}

    bank = write_classifier_bank(tmp_path / "bank", run, data, collator, dtype="float32", batch_size=3)
    assert (bank.manifest.samples, bank.manifest.inputs) == (8, ["input_ids", "bbox"])
    batch = collator([data[i] for i in (5, 0, 1, 4)])
    trainer = tiny.trainer_of(tiny.classifier("boxes"), run, tmp_path, data=data, collator=collator)
    want = tiny.loss_of(trainer, batch)
    got = tiny.loss_of(trainer_with("boxes", tmp_path / "bank", tmp_path, data=(data, collator)), batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    tiny.compare(got[1], want[1], rtol=1e-4, atol=1e-6)


def test_a_key_is_that_of_the_sample_however_it_is_padded():
    names = ["input_ids", "bbox", "pixel_values"]
    sample = {"input_ids": torch.tensor([1, 2]), "bbox": torch.ones(2, 4).long(), "pixel_values": torch.rand(3, 4, 4)}
    padded = sample | {
        "input_ids": torch.tensor([0, 1, 2]), "bbox": torch.ones(3, 4).long(), "attention_mask": torch.tensor([0, 1, 1])
    }  # fmt: skip
    padded["bbox"][0] = 0
    assert sample_key(sample, names) == sample_key(padded, names)
    for name in names:
        assert sample_key(sample, names) != sample_key(sample | {name: 0 * sample[name]}, names)


def test_adapters_fill_a_bank_too(tmp_path):
    run, _ = tiny.lora_run(tmp_path, tiny.classifier("bert", 24, 1), target_modules=["query"], task_type="SEQ_CLS")
    data, collator = data_of("bert")
    write_classifier_bank(tmp_path / "bank", Teachers.load(run), data, collator, dtype="float32")
    batch = collator([data[i] for i in range(6)])
    want = tiny.loss_of(tiny.trainer_of(tiny.classifier("bert"), run, tmp_path, data=data), batch)
    got = tiny.loss_of(trainer_with("bert", tmp_path / "bank", tmp_path), batch)
    tiny.compare(got[1], want[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_run_from_a_bank_is_that_with_the_teachers(kind, tmp_path):
    run, (data, collator) = run_of(kind, tmp_path), data_of(kind)
    write_classifier_bank(tmp_path / "bank", Teachers.load(run), data, collator)
    options, states = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2), []
    for trainer in (
        tiny.trainer_of(tiny.classifier(kind), run, tmp_path, data=data, collator=collator, **options),
        trainer_with(kind, tmp_path / "bank", tmp_path, **options),
    ):
        trainer.train()
        states.append({**trainer.model.state_dict(), **trainer.criterion.state_dict()})
    tiny.compare(*states, rtol=1e-2, atol=1e-3)  # float16


def test_a_bank_inside_autocast(tmp_path):
    """Transformers 4 computes the whole loss in one."""
    (data, collator), found = data_of("bert"), []
    write_classifier_bank(tmp_path / "bank", run_of("bert", tmp_path), data, collator)
    batch = collator([data[i] for i in range(6)])
    for half in (False, True):
        trainer = trainer_with("bert", tmp_path / "bank", tmp_path, bf16=half)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(tiny.loss_of(trainer, batch)[0])
    torch.testing.assert_close(*found, rtol=3e-2, atol=1e-2)


def test_a_bank_takes_the_bytes_that_are_documented(tmp_path):
    run, (data, collator) = run_of("bert", tmp_path), data_of("bert")
    sizes = {}
    for features in (True, False):
        bank = write_classifier_bank(tmp_path / f"{features}", Teachers.load(run), data, collator, features=features)
        sizes[features] = (tmp_path / f"{features}" / "rows-0.safetensors").stat().st_size
        assert (len(bank), bank.manifest.rows, bank.manifest.width) == (2, len(data), 24 if features else 0)
    assert sizes[True] - sizes[False] - 2 * 2 * 24 * len(data) < 100
    assert sizes[False] < len(data) * (2 * 2 * tiny.CLASSES + 16 + 8) + 1000


def test_columns_of_no_use_and_data_padded_beforehand(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra data")
    run = run_of("bert", tmp_path)
    longest = max(map(len, tiny.Texts().rows))
    rows = [
        {
            "text": "a", "input_ids": row + [0] * (longest - len(row)), "label": sum(row) % tiny.CLASSES,
            "attention_mask": [1] * len(row) + [0] * (longest - len(row)),
        }
        for row in tiny.Texts().rows
    ]  # fmt: skip
    data = datasets.Dataset.from_list(rows), transformers.DataCollatorWithPadding(tiny.tokenizer_of())
    write_classifier_bank(tmp_path / "bank", Teachers.load(run), *data)
    trainer_with("bert", tmp_path / "bank", tmp_path, data=data).train()
    run = tiny.save([tiny.language_model("gpt2", 24, 1)], tmp_path / "texts")
    write_token_bank(tmp_path / "tokens", Teachers.load(run), *data)
    EEKDTrainer(tiny.language_model(), tiny.settings(tmp_path), bank=tmp_path / "tokens", train_dataset=data[0])


@pytest.mark.bad_input
def test_banks_of_other_things_are_refused(tmp_path):
    run, bank, (data, collator) = run_of("bert", tmp_path), tmp_path / "bank", data_of("bert")
    layer = "bert.pooler.dense"
    write_classifier_bank(bank, Teachers.load(run), data, collator, processing_class=tiny.tokenizer_of())

    def refused(match, kind="bert", error=ValueError, bank=bank, **options):
        with pytest.raises(error, match=match) as found:
            trainer_with(kind, bank, tmp_path, **options)
        assert "\n" not in str(found.value)

    trainer_with("bert", bank, tmp_path, processing_class=tiny.tokenizer_of(), teacher_checkpoints=run)
    refused("must be of the trainer's tokenizer", processing_class=tiny.tokenizer_of(swapped=True))
    refused("of train_dataset, got 0, which it lacks", data=(tiny.Texts(seed=1, classes=tiny.CLASSES), tiny.collate))
    refused("must be of these 1 checkpoints, got one of others", teacher_checkpoints=run / "checkpoint-5")
    refused("the student must be a classifier for this bank, got a BertForTokenCl", "tokens")
    refused("the student must be a classifier for this bank, got a GPT2LMHead", student=tiny.language_model())
    refused("must have the student's 4 classes, got 3", student=tiny.classifier("bert", num_labels=4))
    names = {0: "a", 1: "b", 2: "c"}
    named = tiny.classifier("bert", 24, 1, id2label=names, label2id={name: i for i, name in names.items()})
    tiny.save([named], tmp_path / "named")
    write_classifier_bank(tmp_path / "n", Teachers.load(tmp_path / "named"), data, collator)
    other = {0: "b", 1: "a", 2: "c"}
    student = tiny.classifier("bert", id2label=other, label2id={name: i for i, name in other.items()})
    refused("must have the student's classes, got 'a' for class 0", student=student, bank=tmp_path / "n")
    write_classifier_bank(tmp_path / "bare", Teachers.load(run), data, collator, features=False)
    refused("must hold features for this weighting", bank=tmp_path / "bare")
    trainer_with("bert", tmp_path / "bare", tmp_path, weighting="uniform")
    refused("^.*bank must hold features of feature_layer 'bert.pooler.dense', got those of None", feature_layer=layer)
    write_classifier_bank(tmp_path / "layer", Teachers.load(run), data, collator, feature_layer=layer)
    trainer_with("bert", tmp_path / "layer", tmp_path, feature_layer=layer)
    trainer_with("bert", tmp_path / "layer", tmp_path)
    other = dict(bank=tmp_path / "layer", feature_layer="classifier")
    refused("must hold features of feature_layer 'classifier', got those of 'bert.pooler.dense'", **other)
    with pytest.raises(FileExistsError, match="must hold no bank yet"):
        write_classifier_bank(bank, Teachers.load(run), data, collator)
    with pytest.raises(ValueError, match="dtype must be one of"):
        write_classifier_bank(tmp_path / "other", Teachers.load(run), data, collator, dtype="int8")
    with pytest.raises(ValueError, match="^token_type_ids must have a row for each of 6 samples of a batch, got 1$"):
        types = {"token_type_ids": torch.zeros(1, 10).long()}
        shared = [data[i] for i in range(6)], lambda samples: tiny.collate(samples) | types
        write_classifier_bank(tmp_path / "other", Teachers.load(run), *shared)
    with pytest.raises(ValueError, match="must have input_ids or pixel_values"):
        write_classifier_bank(tmp_path / "other", Teachers.load(run), [{"x": 1}], lambda rows: {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="checkpoint-5 must give logits of its 2 classes, got 37"):
        texts = Teachers.load(tiny.save([tiny.language_model("gpt2", 24, 1)], tmp_path / "texts"))
        write_classifier_bank(tmp_path / "other", texts, data, collator, features=False)
    (bank / "rows-0.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="was changed or damaged"):
        ClassifierBank(bank)


@pytest.mark.bad_input
def test_images_that_differ_each_time_are_refused(tmp_path):
    run, (data, collator) = run_of("vit", tmp_path), data_of("vit")
    write_classifier_bank(tmp_path / "bank", Teachers.load(run), data, collator)

    class Noisy(tiny.Images):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"pixel_values": sample["pixel_values"] + torch.randn(1)}

    with pytest.raises(ValueError, match="every sample of train_dataset, got 0, which it lacks"):
        trainer_with("vit", tmp_path / "bank", tmp_path, data=(Noisy(), collator))


@pytest.mark.bad_input
def test_teachers_that_say_something_of_each_token_are_refused_for_samples(tmp_path):
    run = tiny.save([tiny.classifier("tokens", 24, 1)], tmp_path / "run")
    trainer = tiny.trainer_of(tiny.classifier("bert"), run, tmp_path, weighting="uniform")
    with pytest.raises(ValueError, match="checkpoint-5 must give logits .6, 3., a row for each label, got"):
        tiny.loss_of(trainer, tiny.batch_for("bert"))
