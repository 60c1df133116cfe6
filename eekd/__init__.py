"""Experience Ensemble Knowledge Distillation.

While a teacher trains, M snapshots of it are saved. A student then learns from all of them: self-attention
weighs the snapshots for each sample, their temperature-softened predictions are fused into one target, and the
student minimises

    L = α CE(s, y) + (1 - α) τ² KL(p || softmax(s / τ)),    p = Σ_m w_m softmax(z_m / τ)

Letters used everywhere: B rows (samples or tokens), M snapshots, C classes, D embedding width, τ temperature.
Source: Wang, Zhang, Song, Huang, "Learn From the Past: Experience Ensemble Knowledge Distillation",
arXiv 2202.12488 (2022).
"""

from typing import TYPE_CHECKING

from eekd.lazy import attach

__version__ = "0.1.0"

__all__ = [
    "AttentionDISTLoss",
    "AttentionDKDLoss",
    "Distilled",
    "EEKDLoss",
    "EnsembleKD",
    "LastFeatures",
    "LogitBank",
    "SnapshotAttention",
    "SnapshotEnsemble",
    "SnapshotRecorder",
    "TopKLogits",
    "ensemble_kd",
    "linear_ensemble_kd",
    "load_student",
    "sparse_ensemble_kd",
    "top_k_logits",
    "use_backend",
]

if TYPE_CHECKING:
    from eekd.bank import LogitBank
    from eekd.distilled import Distilled
    from eekd.export.student import load_student
    from eekd.method.attention import SnapshotAttention
    from eekd.method.losses import EEKDLoss
    from eekd.method.rival_losses import AttentionDISTLoss, AttentionDKDLoss
    from eekd.method.topk import TopKLogits, top_k_logits
    from eekd.ops import EnsembleKD, ensemble_kd, linear_ensemble_kd, sparse_ensemble_kd, use_backend
    from eekd.snapshots import SnapshotEnsemble, SnapshotRecorder
    from eekd.snapshots.features import LastFeatures
else:  # torch takes seconds to import: it comes with the first name that needs it
    __getattr__, __dir__ = attach(
        __name__,
        {
            "bank": "LogitBank",
            "distilled": "Distilled",
            "export.student": "load_student",
            "method.attention": "SnapshotAttention",
            "method.losses": "EEKDLoss",
            "method.rival_losses": "AttentionDISTLoss AttentionDKDLoss",
            "method.topk": "TopKLogits top_k_logits",
            "ops": "EnsembleKD ensemble_kd linear_ensemble_kd sparse_ensemble_kd use_backend",
            "ops.backend": "_C",  # which imports torch first, and says what to do where there is none
            "snapshots": "SnapshotEnsemble SnapshotRecorder",
            "snapshots.features": "LastFeatures",
        },
        modules=("bank", "data", "export", "io", "method", "models", "ops", "parallel", "snapshots", "train"),
    )
