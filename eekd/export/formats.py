"""A student as files that other programs read."""

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from eekd.export import FORMATS
from eekd.export.student import WEIGHTS, Student
from eekd.io.files import write_atomic

PROGRAM, ONNX, INT8 = "model.pt2", "model.onnx", "model.int8.onnx"
TOLERANCE = 1e-3  # how far a logit of an exported program may be from the network's, of the largest logit


def export(
    student: Student, folder: str | Path, to: Sequence[str] = ("safetensors",), *,
    images: Tensor | None = None, labels: Tensor | None = None, int8: bool = False, what: str | None = None,
) -> dict:  # fmt: skip
    """Writes a student to a new folder, as `eekd.export` describes it, and returns what was checked.

    "safetensors" and "hub-folder" are the same folder, which every other format adds a file to. Each program is run
    on `images` (B, C, S, S), preprocessed, by default noise, and must give the network's logits. `int8` adds an ONNX
    file whose linear layers have weights of 8 bits; with `labels` its accuracy on the images is compared. `what` says
    which images they are. config.json and the card get the outcome.

    Returns {"images": B, "what": what, "files": {file: {"bytes": ..., "difference": largest difference of a logit,
    "accuracy": fraction, with labels}}}. If anything fails nothing is left: ImportError where the extra "export" is
    missing, RuntimeError where a program gives other logits.
    """
    if unknown := [name for name in to if name not in FORMATS]:
        raise ValueError(f"to must be of {', '.join(FORMATS)}, got {unknown[0]!r}")
    if "onnx" in to:
        _need_onnx()
    elif int8:
        raise ValueError(f"to must have onnx where int8 is asked for, got {', '.join(to)}")
    data, what = student.facts["preprocessing"], what or ("noise" if images is None else "images")
    if images is None:
        shape = 4, data["channels"], data["image_size"], data["image_size"]
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    elif len(images) < 2:
        raise ValueError(f"images must be at least 2, got {len(images)}")
    student, images = student.cpu().eval(), images.cpu()
    folder = student.save(folder)
    try:
        checked = {"images": len(images), "what": what, "files": {}}
        outputs = _outputs(student, folder, to, images, int8)
        for name, got in outputs.items():
            facts: dict = {"bytes": (folder / name).stat().st_size}
            facts["difference"] = (got - outputs[WEIGHTS]).abs().max().item()
            if labels is not None:
                facts["accuracy"] = (got.argmax(1) == labels.cpu()).double().mean().item()
            checked["files"][name] = facts
        student.facts = {**student.facts, "exported": checked}
        student.describe(folder)
    except BaseException:
        shutil.rmtree(folder)  # which was new, or empty
        raise
    return checked


def _outputs(student: Student, folder: Path, to: Sequence[str], images: Tensor, int8: bool) -> dict[str, Tensor]:
    """Writes the programs and returns the logits of each file in the folder."""
    with torch.inference_mode():
        outputs = {WEIGHTS: student(images)}
    if "torch-export" in to:
        outputs[PROGRAM] = _torch_export(student, images, folder / PROGRAM)
    if "onnx" in to:
        outputs[ONNX] = _onnx(student, images, folder / ONNX)
    for name, got in outputs.items():
        difference, largest = (x.abs().max().item() for x in (got - outputs[WEIGHTS], outputs[WEIGHTS]))
        if not difference <= TOLERANCE * largest:
            raise RuntimeError(f"{folder / name} must give the network's logits, got one {difference:.3g} off")
    if int8:
        outputs[INT8] = _int8(folder / ONNX, folder / INT8, images)
    return outputs


def _torch_export(student: Student, images: Tensor, path: Path) -> Tensor:
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros_like(images[:2])  # which the file keeps
    program = torch.export.export(student.network, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    run = program.module()
    with torch.inference_mode():
        return torch.cat([_logits(run(part)) for part in images.tensor_split([1])])  # see _run


def _onnx(student: Student, images: Tensor, path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations within the exporter
        program = torch.onnx.export(
            student, (images[:2],), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
    write_atomic(path, program.model_proto.SerializeToString())
    return _run(path, images)


def _int8(source: Path, path: Path, images: Tensor) -> Tensor:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # advice to shape the graph first, which does not matter to linear layers
    try:
        quantize_dynamic(source, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return _run(path, images)


def _run(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # In two batches of unlike size, which a file with a fixed batch would refuse.
    parts = images.tensor_split([1])
    return torch.cat([torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in parts])


def _logits(output):
    return getattr(output, "logits", output)


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the format onnx needs {error.name}: pip install 'eekd[export]'") from None
