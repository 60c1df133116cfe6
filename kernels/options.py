"""The flags of the benchmark, apart from it, so that a mistake or a call for help needs no torch."""

import argparse
import re
from pathlib import Path

LETTERS = {"ensemble_kd": "B,M,C", "sparse_ensemble_kd": "B,M,C,K"}  # what a shape is
CONTENDERS = "native", "triton", "eager", "compile", "liger"
DTYPES = "float32", "bfloat16", "float16"


def shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"must be B,M,C in positive numbers, got {text}")
    return tuple(map(int, text.split(",")))


PARSER = argparse.ArgumentParser(prog="eekd bench", description="Checks an op, then times it against others.")
PARSER.add_argument("--op", default="ensemble_kd", choices=list(LETTERS))
PARSER.add_argument("--shape", type=shape, action="append", metavar="B,M,C[,K]", help="repeatable; default: several")
PARSER.add_argument(
    "--dtype", action="append", choices=DTYPES, help="repeatable; default: float32 on a CPU, bfloat16 on a GPU"
)
PARSER.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU, else cpu")
PARSER.add_argument("--seconds", type=float, help="per contender and shape; default: 1 on a CPU, 0.5 on a GPU")
PARSER.add_argument("--threads", type=int, help="default: torch's own number")
PARSER.add_argument("--avx2", action="store_true", help="run eekd, eager and compile without AVX-512")
PARSER.add_argument("--seed", type=int, default=0)
PARSER.add_argument("--contender", action="append", choices=CONTENDERS, help="time only this and the copy; repeatable")
PARSER.add_argument("--quick", action="store_true", help="a smoke test: small shapes, one mode of compile")
PARSER.add_argument("--full", action="store_true", help="ensemble_kd: all shapes, dtypes and layouts, an hour")
PARSER.add_argument("--json", type=Path, help="write the results to this file, row by row")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of a command line; a mistake ends the process with one sentence."""
    args = PARSER.parse_args(argv)
    letters = LETTERS[args.op]
    for wrong in args.shape or ():
        if len(wrong) != len(letters.split(",")) or wrong[3:] >= wrong[2:3]:
            below = ", K below C" * letters.endswith("K")
            got = ",".join(map(str, wrong))
            PARSER.error(f"argument --shape: must be {letters} in positive numbers{below}, got {got}")
    return args
