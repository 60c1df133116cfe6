"""Differentiable ops: each checks its arguments, calls a backend and wires autograd."""

from eekd.ops.backend import use_backend
from eekd.ops.ensemble_kd import EnsembleKD, ensemble_kd
from eekd.ops.linear_ensemble_kd import linear_ensemble_kd
from eekd.ops.sparse_ensemble_kd import sparse_ensemble_kd

__all__ = ["EnsembleKD", "ensemble_kd", "linear_ensemble_kd", "sparse_ensemble_kd", "use_backend"]
