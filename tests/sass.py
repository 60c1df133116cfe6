"""Machine code of NVIDIA GPUs as cuobjdump prints it: a kernel's instructions, and its loops."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if not found:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with the CUDA toolkit or Triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@dataclass
class Instruction:
    at: int
    predicate: str | None
    name: str
    operands: str


class Code(list[Instruction]):
    def count(self, *names: str) -> int:
        """Instructions of these names, whatever follows them after a dot."""
        return sum(any(f"{i.name}.".startswith(f"{name}.") for name in names) for i in self)

    def between(self, first: int, last: int) -> "Code":
        return Code(i for i in self if first <= i.at <= last)

    def loops(self) -> list["Code"]:
        """From the target of every jump backwards to the last jump there, in the order of the code, outer ones first.

        What a loop does not jump over is in it, whether it is executed each time or not: a count is an upper bound.
        """
        ends = {}
        for i in self:
            target = re.search(r"0x([0-9a-f]+)", i.operands)
            if i.name.startswith("BRA") and target and int(target[1], 16) < i.at:
                ends[int(target[1], 16)] = i.at
        return [self.between(first, last) for first, last in sorted(ends.items(), key=lambda e: (e[0], -e[1]))]

    def blocks(self) -> list["Code"]:
        """What is always executed from its first instruction to its last, in the order of the code."""
        jumps = [i.operands for i in self if i.name.startswith("BRA")]
        targets = {int(at, 16) for operands in jumps for at in re.findall("0x([0-9a-f]+)", operands)}
        found = [Code()]
        for i in self:
            if i.at in targets:
                found.append(Code())
            found[-1].append(i)
            if i.name.startswith("BRA"):
                found.append(Code())
        return [block for block in found if block]

    def innermost_loops(self) -> list["Code"]:
        loops = self.loops()
        return [a for a in loops if not any(a is not b and a[0].at <= b[0].at and b[-1].at <= a[-1].at for b in loops)]


def kernels(file: str | Path, architecture: int | None = None) -> dict[str, Code]:
    """The code of every kernel in a file, by its mangled name."""
    options = [] if architecture is None else ["-arch", f"sm_{architecture}"]
    text = subprocess.check_output([cuobjdump(), "-sass", *options, file], text=True)
    parts = re.split(r"Function : (\S+)", text)
    return {
        name: Code(Instruction(int(at, 16), *rest) for at, *rest in INSTRUCTION.findall(body))
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
