"""What must fit between a student and its teachers before anything is trained."""

from pathlib import Path

import transformers
from torch import nn

from eekd.hf.heads import LanguageHead
from eekd.io.state_dicts import some

TOKENIZER = "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"


def check_trainer(trainer) -> None:
    """ValueError, one sentence, for settings under which the loss would be wrong or the method is not there yet."""
    args, model = trainer.args, trainer.model
    settings = {
        "label_smoothing_factor": (args.label_smoothing_factor, 0, "the teachers' targets are smooth themselves"),
        "use_liger_kernel": (getattr(args, "use_liger_kernel", False), False, "it replaces the model's own loss"),
        "compute_loss_func": (trainer.compute_loss_func, None, "the loss is this project's"),
        "deepspeed": (bool(trainer.is_deepspeed_enabled), False, "the attention's parameters stay outside its engine"),
        "fsdp": (bool(trainer.is_fsdp_enabled), False, "heads are read whole"),
    }
    for name, (got, wanted, why) in settings.items():
        if got != wanted and not (got is None and not wanted):
            raise ValueError(f"{name} must be {wanted} to distil, for {why}, got {got!r}")
    if args.n_gpu > 1:
        raise ValueError(f"one process must have one GPU, got {args.n_gpu}: start one process for each by torchrun")
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if trainer.is_model_parallel or len(devices) > 1:
        raise ValueError(f"the student must be on one device, got its layers on {some(sorted(devices))}")
    if any(getattr(c, "is_prompt_learning", False) for c in (getattr(model, "peft_config", None) or {}).values()):
        raise ValueError("the student must not be of prompt learning, for its rows are not those of the labels")


def check_apart(student: nn.Module, teachers: list[nn.Module]) -> None:
    """ValueError where a teacher is the student, or has its weights: it would be frozen, or learn."""
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for teacher in teachers for parameter in teacher.parameters()):
        raise ValueError("teachers must share no weights with the student, got one that does: give a copy")


def check_tokenizers(folders: list[str], own) -> None:
    """ValueError where a teacher's tokenizer gives an id another token than the student's does."""
    if own is None or not hasattr(own, "get_vocab"):
        return
    vocabulary = {index: token for token, index in own.get_vocab().items()}
    for folder in folders:
        if not any((Path(folder) / name).is_file() for name in TOKENIZER):
            continue
        other = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
        for token, index in sorted(other.items(), key=lambda entry: entry[1]):
            if vocabulary.get(index) != token:
                raise ValueError(
                    f"the tokenizer of {folder} must be the student's, got {token!r} for id {index}, where the student "
                    f"has {vocabulary.get(index)!r}"
                )
        if lacking := sorted(set(vocabulary) - set(other.values())):
            raise ValueError(
                f"the tokenizer of {folder} must be the student's, got none of its tokens "
                f"{some(vocabulary[i] for i in lacking)}"
            )


def check_vocabularies(heads: dict[str, LanguageHead], tokenizer) -> None:
    """ValueError where heads of several sizes cannot be cut to one vocabulary."""
    sizes = {name: len(head.weight) for name, head in heads.items()}
    least = min(sizes, key=lambda name: sizes[name])
    if tokenizer is not None and hasattr(tokenizer, "get_vocab"):
        highest = max(tokenizer.get_vocab().values(), default=-1) + 1
        if highest > sizes[least]:
            raise ValueError(f"{least} must have a row for each of {highest} tokens in its head, got {sizes[least]}")
    elif len(set(sizes.values())) > 1:
        raise ValueError(
            f"heads must have one number of tokens, or processing_class be given, the tokenizer that says how many are "
            f"real; got {', '.join(f'{size} of {name}' for name, size in sizes.items())[:300]}"
        )


def check_classes(student: nn.Module, teachers: list[tuple[str, nn.Module]]) -> None:
    """ValueError where a teacher has other classes, or names them otherwise, or the task is no classification."""
    own = student.config
    if own.problem_type not in (None, "single_label_classification") or own.num_labels < 2:
        got = own.problem_type or f"{own.num_labels} label"
        raise ValueError(f"the student must classify into one of several classes, got {got}")
    for name, teacher in teachers:
        config = teacher.config
        if config.num_labels != own.num_labels:
            raise ValueError(f"{name} must have the student's {own.num_labels} classes, got {config.num_labels}")
        given = [c.id2label for c in (config, own)]
        if any(all(str(x) == f"LABEL_{i}" for i, x in labels.items()) for labels in given):
            continue
        pairs = [(i, given[0].get(i), given[1].get(i)) for i in range(own.num_labels)]
        if differs := [(i, a, b) for i, a, b in pairs if a != b]:
            i, a, b = differs[0]
            raise ValueError(f"{name} must have the student's classes, got {a!r} for class {i}, where it has {b!r}")
