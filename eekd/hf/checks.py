"""What must fit between a student and its teachers before anything is trained."""

import json
from collections.abc import Mapping
from pathlib import Path

import transformers
from torch import nn

from eekd.hf.heads import LanguageHead, StoredHead
from eekd.io.files import read_json
from eekd.io.state_dicts import some

PARALLEL = "deepspeed", "fsdp", "parallelism_config"  # what DistributedDataParallel stands in for
PROCESSOR = "preprocessor_config.json"
SHOWN = "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"  # what of it changes pixels
TOKENIZER = "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"


def check_trainer(trainer) -> None:
    """ValueError, one sentence, for settings under which the loss would be wrong or the method is not there yet."""
    args, model = trainer.args, trainer.model
    settings = {
        "label_smoothing_factor": (args.label_smoothing_factor, 0, "the teachers' targets are smooth themselves"),
        "use_liger_kernel": (getattr(args, "use_liger_kernel", False), False, "it replaces the model's own loss"),
        "output_router_logits": (_routes(model), False, "the balancing loss of experts is not added to it"),
        "loss_type": (getattr(args, "loss_type", "nll").removeprefix("chunked_"), "nll", "the loss is this project's"),
        "compute_loss_func": (trainer.compute_loss_func, None, "the loss is this project's"),
        "deepspeed": (bool(trainer.is_deepspeed_enabled), False, "the attention's parameters stay outside its engine"),
        "fsdp": (bool(trainer.is_fsdp_enabled), False, "heads are read whole"),
        "parallelism_config": (_split(trainer), [], "heads and sequences are read whole"),
    }
    for name, (got, wanted, why) in settings.items():
        if got != wanted and not (got is None and not wanted):
            instead = ": torchrun without it trains a copy on each GPU" if name in PARALLEL else ""
            raise ValueError(f"{name} must be {wanted} to distil, for {why}, got {got!r}{instead}")
    if args.n_gpu > 1:
        raise ValueError(f"one process must have one GPU, got {args.n_gpu}: start one process for each by torchrun")
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if trainer.is_model_parallel or len(devices) > 1:
        raise ValueError(f"the student must be on one device, got its layers on {some(sorted(devices))}")
    if any(getattr(c, "is_prompt_learning", False) for c in (getattr(model, "peft_config", None) or {}).values()):
        raise ValueError("the student must not be of prompt learning, for its rows are not those of the labels")


def _split(trainer) -> list[str]:
    """The ways in which a model or a sequence is split over processes, other than by FSDP."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return [name for name in ("tp_size", "cp_size", "sp_size") if getattr(config, name, 1) > 1]


def _routes(model: nn.Module) -> bool:
    """Whether the model's own loss would balance its experts, too."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(config, "output_router_logits", False))


def check_apart(student: nn.Module, teachers: list[nn.Module]) -> None:
    """ValueError where a teacher is the student, or has its weights: it would be frozen, or learn."""
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for teacher in teachers for parameter in teacher.parameters()):
        raise ValueError("teachers must share no weights with the student, got one that does: give a copy")


def check_tokenizers(folders: list[Path], own) -> None:
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


def check_processors(folders: list[Path], own) -> None:
    """ValueError where a teacher's image processor scales or normalises images otherwise than the student's."""
    if not hasattr(own, "image_mean"):
        return
    mine = json.loads(own.to_json_string())
    for folder in folders:
        path = Path(folder) / PROCESSOR
        theirs = read_json(path) if path.is_file() else {}
        for name in SHOWN:
            if name in theirs and theirs[name] != mine.get(name):
                raise ValueError(
                    f"{path} must have the student's {name} {mine.get(name)}, for both see the same images, "
                    f"got {theirs[name]}"
                )


def check_vocabularies(heads: Mapping[str, LanguageHead | StoredHead], tokenizer) -> None:
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


def check_classes(own, teachers: dict) -> None:
    """ValueError where a teacher has other classes, or names them otherwise, or the task is no classification.

    `own` is the student's configuration, `teachers` are theirs by name.
    """
    for name, config in ({"the student": own} | teachers).items():
        if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
            got = config.problem_type or f"{config.num_labels} label"
            raise ValueError(f"{name} must classify into one of several classes, got {got}")
        if config.num_labels != own.num_labels:
            raise ValueError(f"{name} must have the student's {own.num_labels} classes, got {config.num_labels}")
        given = [c.id2label for c in (config, own)]
        if any(all(str(x) == f"LABEL_{i}" for i, x in labels.items()) for labels in given):
            continue
        pairs = [(i, given[0].get(i), given[1].get(i)) for i in range(own.num_labels)]
        if differs := [(i, a, b) for i, a, b in pairs if a != b]:
            i, a, b = differs[0]
            raise ValueError(f"{name} must have the student's classes, got {a!r} for class {i}, where it has {b!r}")
