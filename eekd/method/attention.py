"""The student's attention over the snapshots of its teacher."""

from torch import Tensor, nn
from torch.nn import functional as F


class SnapshotAttention(nn.Module):
    """Computes a query of the student and keys of the snapshots; their products weigh the snapshots for each sample.

        e_bm = scale · (W_s v_b) · (W_t u_mb),    w_bm = softmax_m(e_bm)

    v (B, student_dim) and u (M, B, snapshot_dim) are last features. W_s and W_t are linear maps to `embed_dim` without
    bias; all snapshots share W_t. `normalize` puts a layer norm without parameters before both maps.
    `scale` None is 1/sqrt(embed_dim). The maps start at standard deviation 0.02, so the weights start nearly
    uniform. `normalize=False, scale=1.0` is the paper's literal form.

    forward(student_features, snapshot_features) gives the query (B, embed_dim), which includes the scale, and
    the keys (M, B, embed_dim); `ensemble_kd` takes both and does the rest. Features of any floating dtype are
    cast to that of the maps.

    Raises ValueError for sizes below 1, a scale that is not above 0, and features of other shapes.
    Source: Wang et al., arXiv 2202.12488, which gives neither `embed_dim` nor scale nor initialisation.
    """

    def __init__(
        self,
        student_dim: int,
        snapshot_dim: int,
        embed_dim: int = 8,
        normalize: bool = True,
        scale: float | None = None,
    ):
        super().__init__()
        sizes = {"student_dim": student_dim, "snapshot_dim": snapshot_dim, "embed_dim": embed_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
            raise ValueError(f"scale must be a number above 0, or None for 1/sqrt(embed_dim), got {scale!r}")
        self.student = nn.Linear(student_dim, embed_dim, bias=False)
        self.snapshots = nn.Linear(snapshot_dim, embed_dim, bias=False)
        self.normalize = normalize
        self.scale = embed_dim**-0.5 if scale is None else scale
        for linear in (self.student, self.snapshots):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, student_features: Tensor, snapshot_features: Tensor) -> tuple[Tensor, Tensor]:
        v, u = student_features, snapshot_features
        if v.ndim != 2 or v.shape[1] != self.student.in_features:
            want = f"(B, {self.student.in_features})"
            raise ValueError(f"student_features must have shape {want}, got {tuple(v.shape)}")
        if u.ndim != 3 or u.shape[1] != v.shape[0] or u.shape[2] != self.snapshots.in_features:
            want = f"(M, {v.shape[0]}, {self.snapshots.in_features})"
            raise ValueError(f"snapshot_features must have shape {want}, got {tuple(u.shape)}")
        return self._embed(self.student, v) * self.scale, self._embed(self.snapshots, u)

    def _embed(self, linear: nn.Linear, features: Tensor) -> Tensor:
        features = features.to(linear.weight.dtype)
        return linear(F.layer_norm(features, features.shape[-1:]) if self.normalize else features)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, scale={self.scale:.4g}"
