"""Students that leave the run: loaded in one line, predicting, measured, and exported.

An exported folder holds

    config.json          format, eekd; model: the arguments of eekd.models.build; classes; preprocessing, as
                         eekd.data.ImageData.preprocessing says it; sha256 of model.safetensors; provenance; results;
                         exported: size and outcome of each file below
    model.safetensors    the weights
    README.md            a card: what the student is, how to use it, and how good it is
    model.pt2            with --to torch-export: torch.export.load("model.pt2").module()(images)
    model.onnx           with --to onnx; model.int8.onnx with --int8

Both programs take images (B, C, S, S) float32, normalised, and give logits (B, classes); B may be any.
"""

from typing import TYPE_CHECKING

from eekd.lazy import attach

__all__ = ["FORMATS", "Student", "export", "load_student"]

FORMATS = "safetensors", "torch-export", "onnx", "hub-folder"

if TYPE_CHECKING:
    from eekd.export.formats import export
    from eekd.export.student import Student, load_student
else:
    __getattr__, __dir__ = attach(__name__, {"student": "Student load_student", "formats": "export"})
