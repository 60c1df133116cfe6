"""What cannot be distilled is refused in one sentence, before training."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from eekd.hf import EEKDConfig, EEKDTrainer, SnapshotCallback, Teachers


@pytest.mark.bad_input
def test_settings_out_of_range_are_refused(tmp_path):
    for options, match in (
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"weighting": "atention"}, "did you mean 'attention'"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"fusion": "mean"}, "fusion must be"),
        ({"snapshots": 0}, "snapshots must be"),
        ({"snapshots": 1.5}, "snapshots must be"),
        ({"temperature": "2"}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"embed_dim": 0}, "embed_dim must be"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny.settings(tmp_path, **options)
    run = tiny.run_of("gpt2", tmp_path)
    tiny.refused("snapshots must be from 1 to 2", None, run, tmp_path, snapshots=3)
    tiny.refused("teacher_checkpoints, teachers or bank must be given, got none", None, None, tmp_path)
    tiny.refused("must be folders", None, tmp_path / "nowhere", tmp_path, error=FileNotFoundError)
    with pytest.raises(TypeError, match="args must be an EEKDConfig"):
        EEKDTrainer(tiny.language_model(), transformers.TrainingArguments(str(tmp_path), use_cpu=True), teachers=[])
    with pytest.raises(ValueError, match="save_total_limit must be None"):
        tiny.trainer_of(tiny.language_model(), run, tmp_path, callbacks=[SnapshotCallback(2)], save_total_limit=1)


@pytest.mark.bad_input
def test_students_that_are_none_of_the_tasks(tmp_path):
    config = transformers.T5Config(vocab_size=tiny.VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tiny.refused(
        "the student must be a causal",
        transformers.T5ForConditionalGeneration(config),
        tiny.run_of("gpt2", tmp_path),
        tmp_path,
    )


@pytest.mark.bad_input
def test_other_tokenizers_are_refused(tmp_path):
    run = tiny.run_of("gpt2", tmp_path)
    options = dict(args=tiny.settings(tmp_path), teacher_checkpoints=run, data_collator=tiny.collate)
    for folder in run.glob("checkpoint-*"):
        tiny.tokenizer_of().save_pretrained(folder)
    EEKDTrainer(tiny.language_model(), processing_class=tiny.tokenizer_of(), **options)
    with pytest.raises(ValueError, match="must be the student's, got 't36' for id 35, where the student has 't35'"):
        tiny.tokenizer_of(swapped=True).save_pretrained(run / "checkpoint-10")
        EEKDTrainer(tiny.language_model(), processing_class=tiny.tokenizer_of(), **options)
    with pytest.raises(ValueError, match="must be the student's"):
        EEKDTrainer(tiny.language_model(vocab=40), processing_class=tiny.tokenizer_of(40), **options)
    with pytest.raises(ValueError, match="must have a row for each of 40 tokens in its head, got 37"):
        shutil.rmtree(run)
        tiny.run_of("gpt2", tmp_path)
        EEKDTrainer(tiny.language_model(vocab=40), processing_class=tiny.tokenizer_of(40), **options)


@pytest.mark.bad_input
def test_vocabularies_that_do_not_fit(tmp_path):
    run = tiny.save([tiny.language_model("gpt2", 24, 1, tiny.VOCAB + 3)], tmp_path / "run")
    tiny.refused("heads must have one number of tokens, or processing_class", None, run, tmp_path)


@pytest.mark.bad_input
def test_checkpoints_without_all_weights(tmp_path):
    run = tiny.run_of("gpt2", tmp_path)
    model = tiny.classifier("bert", 24, 1)
    model.bert.save_pretrained(tmp_path / "bare" / "checkpoint-1")
    config = json.loads((tmp_path / "bare" / "checkpoint-1" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "bare" / "checkpoint-1" / "config.json").write_text(json.dumps(config))
    tiny.refused("must hold all weights of BertForSequence", tiny.classifier("bert"), tmp_path / "bare", tmp_path)
    for path in run.glob("*/model.safetensors"):
        path.unlink()
    tiny.refused("must hold model.safetensors", None, run, tmp_path, error=FileNotFoundError)
    (run / "checkpoint-5" / "pytorch_model_fsdp_0").mkdir()
    tiny.refused("accelerate merge-weights", None, run, tmp_path, error=FileNotFoundError)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda folder: (folder / "config.json").unlink(), "checkpoint-5 must have the config.json of a model"),
        (lambda folder: (folder / "config.json").write_text("{"), "checkpoint-5 must have the config.json of a model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'), "must have the config.json of a"),
        (lambda folder: cut(folder / "model.safetensors"), "checkpoint-5 cannot be read as GPT2LMHeadModel"),
    ],
)
def test_damaged_checkpoints(change, match, tmp_path):
    run = tiny.run_of("gpt2", tmp_path)
    change(run / "checkpoint-5")
    tiny.refused(match, None, run, tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.bad_input
@pytest.mark.parametrize("teachers", [[], None, "model", [torch.nn.Linear(2, 2), 3]])
def test_teachers_that_are_no_models(teachers, tmp_path):
    teachers = tiny.language_model() if teachers is None else teachers
    with pytest.raises(ValueError, match="teachers must be a list of at least one model, got"):
        EEKDTrainer(tiny.language_model(), tiny.settings(tmp_path), teachers=teachers)


@pytest.mark.bad_input
def test_settings_of_checkpoints_beside_models(tmp_path):
    for options, match in (
        ({"snapshots": 3}, "^snapshots must be from 1 to 2, the checkpoints there are, got 3"),
        ({"teacher_base": tiny.language_model()}, "^teacher_base must be None with teachers, got a GPT2LMHeadModel"),
    ):
        base, models = options.pop("teacher_base", None), [tiny.language_model(seed=seed) for seed in (1, 2)]
        with pytest.raises(ValueError, match=match):
            EEKDTrainer(
                tiny.language_model(), tiny.settings(tmp_path, **options), teachers=models, teacher_base=base
            )  # fmt: skip


@pytest.mark.bad_input
def test_a_base_of_whole_models_is_refused(tmp_path):
    run, base = tiny.save([tiny.language_model()], tmp_path), tiny.language_model(seed=1)
    said = "^teacher_base must be None with whole models, such as .*checkpoint-5$"
    tiny.refused(said, tiny.language_model(), run, tmp_path, teacher_base=base)


@pytest.mark.bad_input
def test_adapters_that_cannot_teach_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    base = tiny.language_model("llama", 24, 1)
    run, _ = tiny.lora_run(tmp_path, base, target_modules=["q_proj"])
    for other in (tiny.language_model("llama", 32), tiny.language_model("llama", 24, num_hidden_layers=2)):
        tiny.refused("must fit its base model", tiny.language_model("llama"), run, tmp_path, teacher_base=other)
    path = run / "checkpoint-2" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "somewhere/else"}))
    tiny.refused("adapters must be of one base model", tiny.language_model("llama"), run, tmp_path)
    path.write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
    tiny.refused("must not be of prompt learning", tiny.language_model("llama"), run, tmp_path)

    path.write_text("[]")
    tiny.refused("adapter_config.json must hold a dict, got a list", tiny.language_model("llama"), run, tmp_path)
    path.write_text(json.dumps(config))
    cut(path.with_name("adapter_model.safetensors"))
    tiny.refused("checkpoint-2 must fit its base model as an adapter", tiny.language_model("llama"), run, tmp_path)
    shutil.rmtree(tmp_path / "base")
    tiny.refused("teacher_base must be the adapters' base model, got", tiny.language_model("llama"), run, tmp_path)

    run, _ = tiny.lora_run(tmp_path / "head", base, target_modules=["lm_head"])
    tiny.refused("got also base_model.model.lm_head", tiny.language_model("llama"), run, tmp_path)
    run, _ = tiny.lora_run(tmp_path / "saved", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tiny.refused("must have no adapter on its head", tiny.language_model("llama"), run, tmp_path)
    run = tiny.save([base], tmp_path / "whole")
    student = peft.get_peft_model(tiny.language_model("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    tiny.refused("the student must have no adapter on its head", student, run, tmp_path)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tiny.refused("prompt learning", peft.get_peft_model(tiny.language_model("llama"), prompts), run, tmp_path)


@pytest.mark.bad_input
def test_a_head_that_the_model_does_not_use_is_refused_on_the_first_batch(tmp_path):
    class Odd(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + output.logits.roll(1, -1)
            return output

    Odd.__name__ = "GPT2LMHeadModel"
    student = Odd(tiny.language_model().config)
    trainer = tiny.trainer_of(student, tiny.run_of("gpt2", tmp_path), tmp_path)
    with pytest.raises(ValueError, match="the student must give the logits of its head"):
        trainer.train()


@pytest.mark.bad_input
def test_a_soft_cap_that_no_configuration_states_is_refused_while_logits_are_small(tmp_path):
    class Capped(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 30 * (output.logits / 30).tanh()
            return output

    Capped.__name__ = "LlamaForCausalLM"
    student = Capped(tiny.language_model("llama").config)
    trainer = tiny.trainer_of(student, tiny.save([tiny.language_model("llama", 24, 1)], tmp_path / "run"), tmp_path)
    with pytest.raises(ValueError, match="the student must give the logits of its head"):
        trainer.train()


@pytest.mark.bad_input
def test_a_soft_cap_that_only_one_has_is_refused(tmp_path):
    student = tiny.language_model("gemma2", final_logit_softcapping=None)
    trainer = tiny.trainer_of(student, tiny.save([tiny.language_model("gemma2", 24, 1)], tmp_path / "run"), tmp_path)
    with pytest.raises(ValueError, match="soft-cap"):
        trainer.train()


@pytest.mark.bad_input
def test_places_that_are_not_one_device(tmp_path, monkeypatch):
    run, student = tiny.run_of("gpt2", tmp_path), tiny.language_model()
    student.hf_device_map = {"transformer.h.0": "cpu", "lm_head": "disk"}
    tiny.refused("the student must be on one device", student, run, tmp_path)
    teacher = tiny.language_model()
    teacher.hf_device_map = {"transformer.h.0": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="teacher 1 must be on one device"):
        EEKDTrainer(tiny.language_model(), tiny.settings(tmp_path), teachers=[teacher])
    monkeypatch.setattr(EEKDConfig, "n_gpu", property(lambda self: 2))
    tiny.refused("one process must have one GPU, got 2", None, run, tmp_path)


@pytest.mark.bad_input
@pytest.mark.parametrize("name, option", [("deepspeed", "is_deepspeed_enabled"), ("fsdp", "is_fsdp_enabled")])
def test_engines_that_split_the_student_are_refused_with_what_to_do_instead(name, option, tmp_path):
    class Engine(EEKDTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, option, True)

    with pytest.raises(ValueError, match=f"^{name} must be False to distil, .* got True: torchrun without it trains"):
        Engine(tiny.language_model(), tiny.settings(tmp_path), teachers=[tiny.language_model()])


@pytest.mark.bad_input
def test_sequences_that_are_split_are_refused(tmp_path, monkeypatch):
    class Split(EEKDTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            split = SimpleNamespace(tp_size=1, cp_size=2, sp_size=1, sp_backend=None, sp_enabled=False)
            monkeypatch.setattr(type(self.accelerator), "parallelism_config", property(lambda _: split))

    with pytest.raises(ValueError, match="^parallelism_config must be .* got .'cp_size'.: torchrun without it trains"):
        Split(tiny.language_model(), tiny.settings(tmp_path), teachers=[tiny.language_model()])


@pytest.mark.bad_input
def test_experts_whose_balance_the_models_own_loss_would_keep(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="^output_router_logits must be False to distil"):
        EEKDTrainer(transformers.MixtralForCausalLM(config), tiny.settings(tmp_path), teachers=[tiny.language_model()])


@pytest.mark.bad_input
def test_a_student_that_is_its_own_teacher(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra hf")
    student = tiny.language_model("llama")
    with pytest.raises(ValueError, match="teachers must share no weights with the student"):
        EEKDTrainer(student, tiny.settings(tmp_path), teachers=[student])
    assert all(parameter.requires_grad for parameter in student.parameters())
    run, _ = tiny.lora_run(tmp_path, tiny.language_model("llama", 24, 1), target_modules=["q_proj"])
    base = tiny.language_model("llama", 24, 1)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tiny.refused("teachers must share no weights", student, run, tmp_path, teacher_base=base)


@pytest.mark.bad_input
def test_quantised_heads(tmp_path):
    run = tiny.run_of("gpt2", tmp_path)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        student = tiny.language_model()
        student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().to(dtype), requires_grad=False)
        tiny.refused("the student must have a head", student, run, tmp_path)


@pytest.mark.bad_input
def test_more_checkpoints_than_the_ops_take(tmp_path):
    for step in range(65):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(ValueError, match="at most 64, got 65: choose some by snapshots="):
        Teachers.load(tmp_path)


@pytest.mark.bad_input
def test_the_callback_wants_enough_steps(tmp_path):
    with pytest.raises(ValueError, match="snapshots must be at least 1"):
        SnapshotCallback(0)
    trainer = tiny.trainer_of(
        tiny.language_model(), tiny.run_of("gpt2", tmp_path), tmp_path, callbacks=[SnapshotCallback(5)], max_steps=3
    )
    with pytest.raises(ValueError, match="snapshots must be at most 3"):
        trainer.train()


def test_without_transformers_one_sentence_says_what_to_install():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "transformers" else find(name)
import eekd.hf
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ImportError: eekd.hf needs transformers: pip install 'eekd[hf]'"
