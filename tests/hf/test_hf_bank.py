"""A token bank teaches as the teachers whose words it keeps, and is refused where it is of other things."""

import json

import pytest
import tiny
import torch

from eekd.hf import EEKDTrainer, Teachers, TokenBank, write_token_bank


def trainer_with(student, bank, folder, data=None, **options):
    own = "teacher_checkpoints", "teacher_base", "processing_class"
    named = {name: options.pop(name) for name in own if name in options}
    data = tiny.Texts() if data is None else data
    args = tiny.settings(folder, **options)
    return EEKDTrainer(student, args, bank=bank, train_dataset=data, data_collator=tiny.collate, **named)


@pytest.mark.parametrize("weighting", ["last", "uniform", "confidence", "attention"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi"])
def test_a_bank_of_hidden_states_teaches_as_the_teachers_do(kind, weighting, tmp_path):
    run, student = (
        tiny.save([tiny.language_model(kind, 24, s) for s in (1, 2)], tmp_path / "run"),
        tiny.language_model(kind),
    )
    write_token_bank(tmp_path / "bank", Teachers.load(run), tiny.Texts(), tiny.collate, dtype="float32", batch_size=3)
    batch = tiny.collate([tiny.Texts()[i] for i in (3, 0, 7, 5)])  # drawn and padded otherwise
    want = tiny.loss_of(tiny.trainer_of(student, run, tmp_path, weighting=weighting), batch)
    got = tiny.loss_of(trainer_with(student, tmp_path / "bank", tmp_path, weighting=weighting), batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    tiny.compare(got[1], want[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("options", [dict(weighting="attention"), dict(weighting="uniform", top_k=tiny.VOCAB)])
def test_labels_of_padding_do_not_count_with_a_bank(options, shifted, tmp_path):
    """Padded on the left, the last pad predicts the first token: the teachers say something of it, a bank nothing."""
    run, student, options = tiny.run_of("llama", tmp_path), tiny.language_model("llama"), {"top_k": 0} | options
    top_k = options.pop("top_k")
    write_token_bank(tmp_path / "bank", run, tiny.Texts(), tiny.collate, dtype="float32", top_k=top_k)
    batch = tiny.collate([tiny.Texts()[i] for i in (3, 0, 7, 5)])
    counts = batch["attention_mask"].sum(1)
    assert len(set(counts.tolist())) > 1
    batch = {
        name: torch.stack([row.roll(-int(n)) for row, n in zip(x, counts, strict=True)]) for name, x in batch.items()
    }
    mask = batch["attention_mask"].bool()
    if shifted:
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        without = batch | {"shift_labels": batch["shift_labels"].masked_fill(~mask, -100)}
    else:
        without = batch | {"labels": batch["labels"].masked_fill(~mask.roll(1, 1), -100)}
    bank = trainer_with(student, tmp_path / "bank", tmp_path, **options)
    teachers = tiny.trainer_of(student, run, tmp_path, **options)
    assert bank._eekd_items([batch]) == teachers._eekd_items([without]) < teachers._eekd_items([batch])
    got, want = tiny.loss_of(bank, batch), tiny.loss_of(teachers, without)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    tiny.compare(got[1], want[1], rtol=1e-3, atol=1e-5)


def test_a_run_from_a_bank_is_that_with_the_teachers(tmp_path):
    run = tiny.run_of("gpt2", tmp_path)
    write_token_bank(tmp_path / "bank", Teachers.load(run), tiny.Texts(), tiny.collate)
    states = []
    options = dict(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    for make, source in ((tiny.trainer_of, run), (trainer_with, tmp_path / "bank")):
        trainer = make(tiny.language_model(), source, tmp_path, **options)
        trainer.train()
        states.append({**trainer.model.state_dict(), **trainer.criterion.state_dict()})
    tiny.compare(*states, rtol=1e-2, atol=1e-3)  # float16


@pytest.mark.parametrize("options", [dict(weighting="attention"), dict(weighting="uniform", top_k=4)])
def test_a_bank_inside_autocast(options, tmp_path):
    """Transformers 4 computes the whole loss in one."""
    options, found = {"top_k": 0} | options, []
    write_token_bank(
        tmp_path / "bank", tiny.run_of("llama", tmp_path), tiny.Texts(), tiny.collate, top_k=options.pop("top_k")
    )
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    for half in (False, True):
        trainer = trainer_with(tiny.language_model("llama"), tmp_path / "bank", tmp_path, bf16=half, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(tiny.loss_of(trainer, batch)[0])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=3e-2, atol=1e-2)


@pytest.mark.bad_input
def test_hidden_states_of_several_scales_are_refused(tmp_path):
    teachers = [tiny.language_model("granite", 24, seed, logits_scaling=scale) for seed, scale in ((1, 4.0), (2, 2.0))]
    run = tiny.save(teachers, tmp_path / "run")
    with pytest.raises(ValueError, match="^teachers must have one logit scale for .*, got 0.25, 0.5: set top_k"):
        write_token_bank(tmp_path / "bank", run, tiny.Texts(), tiny.collate)
    student, batch = tiny.language_model("granite"), tiny.collate([tiny.Texts()[i] for i in range(6)])
    write_token_bank(tmp_path / "bank", run, tiny.Texts(), tiny.collate, top_k=tiny.VOCAB, dtype="float32")
    want = tiny.loss_of(tiny.trainer_of(student, run, tmp_path, weighting="uniform"), batch)
    got = tiny.loss_of(trainer_with(student, tmp_path / "bank", tmp_path, weighting="uniform"), batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


def test_a_shared_head_is_kept_once(tmp_path):
    run, _ = tiny.lora_run(tmp_path, tiny.language_model("llama", 24, 1), target_modules=["q_proj", "v_proj"])
    bank = write_token_bank(tmp_path / "bank", run, tiny.Texts(), tiny.collate)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "bank").iterdir()}
    assert 4 * tiny.VOCAB * 24 < sizes["heads.safetensors"] < 2 * 4 * tiny.VOCAB * 24
    assert len({head.weight.data_ptr() for head in bank.language_heads()}) == 1
    said = bank.manifest
    assert said.rows == sum(map(len, tiny.Texts().rows)) and said.samples == len(tiny.Texts())
    assert sizes["rows-0.safetensors"] < said.rows * 2 * 24 * 2 + 2000  # 2 H bytes a token and snapshot


@pytest.mark.parametrize("weighting", ["uniform", "entropy", "confidence"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_a_top_k_bank_of_all_tokens_teaches_as_the_teachers_do(kind, weighting, tmp_path, monkeypatch):
    monkeypatch.setattr("eekd.hf.tasks.WEIGHED", 4 * tiny.VOCAB * 5)  # five rows at a time
    run, student = (
        tiny.save([tiny.language_model(kind, 24, s) for s in (1, 2)], tmp_path / "run"),
        tiny.language_model(kind),
    )
    write_token_bank(
        tmp_path / "bank", Teachers.load(run), tiny.Texts(), tiny.collate, dtype="float32", top_k=tiny.VOCAB
    )
    batch, options = (
        tiny.collate([tiny.Texts()[i] for i in (3, 0, 7, 5)]),
        dict(weighting=weighting, temperature=2.0, alpha=0.3),
    )
    want = tiny.loss_of(tiny.trainer_of(student, run, tmp_path, **options), batch)
    got = tiny.loss_of(trainer_with(student, tmp_path / "bank", tmp_path, **options), batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    tiny.compare(got[1], want[1], rtol=1e-3, atol=1e-5)


def test_a_top_k_bank_keeps_the_likeliest_tokens_and_one_bucket(tmp_path):
    teacher, student = tiny.language_model("llama", 24, 1), tiny.language_model("llama")
    run = Teachers.load(tiny.save([teacher], tmp_path / "run"))
    write_token_bank(tmp_path / "bank", run, tiny.Texts(), tiny.collate, top_k=8, dtype="float32")
    batch = tiny.collate([tiny.Texts()[i] for i in range(6)])
    loss, got = tiny.loss_of(trainer_with(student, tmp_path / "bank", tmp_path, weighting="uniform"), batch)
    student.zero_grad()
    s, y = tiny.rows_of(student, batch)
    with torch.no_grad():
        z, _ = tiny.rows_of(teacher.eval(), batch)
    following = batch["input_ids"][:, 1:][batch["labels"][:, 1:] != -100]
    kept = (z / 2).softmax(1).scatter(1, following[:, None], torch.inf).topk(8, 1).indices
    out = torch.ones_like(z, dtype=torch.bool).scatter(1, kept, False)

    def columns(x):
        return torch.cat((x.gather(1, kept), x.masked_fill(~out, -torch.inf).logsumexp(1, keepdim=True)), 1)

    p, q = columns(z).softmax(1), columns(s).log_softmax(1)
    kl = (torch.special.xlogy(p, p) - p * q).sum()
    want = (0.5 * torch.nn.functional.cross_entropy(s, y, reduction="sum") + 0.5 * kl) / len(y)
    want.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    tiny.compare(got, tiny.gradients(student), rtol=1e-3, atol=1e-5)
    assert tiny.formula(s, [z], y, torch.ones(len(y), 1)) / len(y) > want  # the bucket knows less


def test_sequences_that_differ_in_their_types_alone_are_told_apart(tmp_path):
    run = tiny.run_of("gpt2", tmp_path)
    data = [{"input_ids": row, "token_type_ids": [t] * len(row)} for row in tiny.Texts().rows[:4] for t in (1, 2)]

    def collate(samples):
        batch = tiny.collate(samples)
        types = [sample["token_type_ids"] for sample in samples]
        types = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, types)), batch_first=True)
        places = torch.arange(types.shape[1]).expand_as(types)
        return batch | {"token_type_ids": types, "position_ids": places}

    bank = write_token_bank(tmp_path / "bank", run, data, collate, dtype="float32")
    assert (bank.manifest.samples, bank.manifest.inputs) == (8, ["input_ids", "token_type_ids"])
    batch = collate([data[i] for i in (5, 0, 1, 4)])
    want = tiny.loss_of(tiny.trainer_of(tiny.language_model(), run, tmp_path), batch)
    got = tiny.loss_of(trainer_with(tiny.language_model(), tmp_path / "bank", tmp_path, data), batch)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    tiny.compare(got[1], want[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, tiny.VOCAB])
def test_evenly_spaced_snapshots_of_a_bank(top_k, tmp_path):
    run = tiny.save([tiny.language_model("gpt2", 24, s) for s in range(1, 6)], tmp_path / "run")
    bank, pair, batch = tmp_path / "bank", tmp_path / "pair", tiny.collate([tiny.Texts()[i] for i in range(6)])
    write_token_bank(bank, run, tiny.Texts(), tiny.collate, top_k=top_k)
    write_token_bank(pair, Teachers.load(run, snapshots=2), tiny.Texts(), tiny.collate, top_k=top_k)
    options = dict(weighting="linear_increase", snapshots=2, teacher_checkpoints=run)
    found = [trainer_with(tiny.language_model(), folder, tmp_path, **options) for folder in (bank, pair)]
    assert found[0].teachers.names == [f"snapshot {m} of {bank}" for m in (2, 5)]
    torch.testing.assert_close(*(tiny.loss_of(trainer, batch)[0] for trainer in found), rtol=1e-3, atol=1e-3)
    last = trainer_with(tiny.language_model(), bank, tmp_path, **options | {"weighting": "last"})
    assert last.teachers.names == [f"snapshot 5 of {bank}"]


@pytest.mark.bad_input
def test_banks_of_other_things_are_refused(tmp_path):
    run, bank = tiny.run_of("gpt2", tmp_path), tmp_path / "bank"
    write_token_bank(bank, Teachers.load(run), tiny.Texts(), tiny.collate, processing_class=tiny.tokenizer_of())

    def refused(match, error=ValueError, student=None, bank=bank, **options):
        with pytest.raises(error, match=match) as found:
            trainer_with(student or tiny.language_model(), bank, tmp_path, **options)
        assert "\n" not in str(found.value)

    trainer_with(tiny.language_model(), bank, tmp_path, processing_class=tiny.tokenizer_of(), teacher_checkpoints=run)
    refused("must be of the trainer's tokenizer", processing_class=tiny.tokenizer_of(swapped=True))
    refused("every sample of train_dataset, got 0, which it lacks", data=tiny.Texts(seed=1))
    refused("must be of these 1 checkpoints, got one of others", teacher_checkpoints=run / "checkpoint-5")
    refused("snapshots must be from 1 to 2, the checkpoints there are, got 3", snapshots=3)
    refused("^teacher_base must be None with bank, got 'gpt2'", teacher_base="gpt2")
    refused("no bank, or one that was not finished", FileNotFoundError, bank=tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="must hold no bank yet"):
        write_token_bank(bank, Teachers.load(run), tiny.Texts(), tiny.collate)
    trainer = trainer_with(tiny.language_model(), bank, tmp_path)
    with pytest.raises(ValueError, match="every sample of a batch"):
        trainer.model.train()
        trainer.compute_loss(trainer.model, tiny.collate([tiny.Texts(seed=1)[0]]))
    for options, match in (
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"top_k": tiny.VOCAB + 1}, "top_k must be from 0"),
    ):
        with pytest.raises(ValueError, match=match):
            write_token_bank(tmp_path / "other", Teachers.load(run), tiny.Texts(), tiny.collate, **options)
    write_token_bank(tmp_path / "k", Teachers.load(run), tiny.Texts(), tiny.collate, top_k=4)
    refused("one without features for a top-k bank", bank=tmp_path / "k", weighting="attention")
    refused("must have the bank's 37 tokens, got 30", student=tiny.language_model(vocab=30), bank=tmp_path / "k",
            weighting="uniform")  # fmt: skip


@pytest.mark.bad_input
def test_a_damaged_bank_is_named(tmp_path):
    bank = tmp_path / "bank"
    write_token_bank(bank, Teachers.load(tiny.run_of("gpt2", tmp_path)), tiny.Texts(), tiny.collate)
    path = bank / "rows-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="rows-0.safetensors was changed or damaged"):
        TokenBank(bank)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="rows-0.safetensors is missing"):
        TokenBank(bank)
    for content, match in (({"format": 1}, "must have format 2, got 1"), ([], "must have format 2, got None"),
                           ({"format": 2}, "must be that of a bank, got other entries")):  # fmt: skip
        (bank / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            TokenBank(bank)
