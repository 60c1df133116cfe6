"""A student as files that other programs read."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from eekd.export import FORMATS
from eekd.export.student import Student
from eekd.io.files import write_atomic

PROGRAM, ONNX, INT8 = "model.pt2", "model.onnx", "model.int8.onnx"
TOLERANCE = 1e-3  # how far a logit of an exported program may be from the network's, of the largest logit


def export(
    student: Student, folder: str | Path, to: Sequence[str] = ("safetensors",), *,
    images: Tensor | None = None, labels: Tensor | None = None, int8: bool = False,
) -> dict:  # fmt: skip
    """Writes a student to a new folder, as `eekd.export` describes it, and returns what was checked.

    "safetensors" and "hub-folder" are the same folder, which every other format adds a file to. Each program is run
    on `images` (B, C, S, S), preprocessed, by default noise, and must give the network's logits. `int8` adds an ONNX
    file whose linear layers have weights of 8 bits; with `labels` its accuracy on the images is compared.

    Returns {"images": B, "difference": {file: largest difference of a logit}, "accuracy": {file: fraction}}. Raises
    ImportError where the extra "export" is missing, RuntimeError where a program gives other logits.
    """
    if unknown := [name for name in to if name not in FORMATS]:
        raise ValueError(f"to must be of {', '.join(FORMATS)}, got {unknown[0]!r}")
    if "onnx" in to:
        _need_onnx()
    elif int8:
        raise ValueError(f"to must have onnx where int8 is asked for, got {', '.join(to)}")
    data = student.facts["preprocessing"]
    if images is None:
        shape = 4, data["channels"], data["image_size"], data["image_size"]
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, got {len(images)}")
    student = student.cpu().eval()
    with torch.inference_mode():
        logits = student(images.cpu())
    folder, checked, outputs = student.save(folder), {"images": len(images), "difference": {}, "accuracy": {}}, {}
    if "torch-export" in to:
        outputs[PROGRAM] = _torch_export(student, images, folder / PROGRAM)
    if "onnx" in to:
        outputs[ONNX] = _onnx(student, images, folder / ONNX)
    for name, got in outputs.items():
        difference = (got - logits).abs().max().item()
        checked["difference"][name] = difference
        if not difference <= TOLERANCE * logits.abs().max().item():
            (folder / name).unlink()
            raise RuntimeError(f"{folder / name} must give the network's logits, got one {difference:.3g} off")
    if int8:
        outputs[INT8] = _int8(folder / ONNX, folder / INT8, images)
        checked["difference"][INT8] = (outputs[INT8] - logits).abs().max().item()
    if labels is not None:
        for name, got in {"model.safetensors": logits, **outputs}.items():
            checked["accuracy"][name] = (got.argmax(1) == labels).double().mean().item()
    return checked


def _torch_export(student: Student, images: Tensor, path: Path) -> Tensor:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(student.network, (images[:2],), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    with torch.inference_mode():
        return _logits(program.module()(images))


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
    parts = images.cpu().tensor_split([1])
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
