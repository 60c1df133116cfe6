"""The logit bank: what M snapshots say about V augmented views of every training image, computed once.

`python -m eekd.bank` writes it, `LogitBank` reads it. Raw logits are stored, so temperature, fusion and
weighting are chosen later.

    BANK/
      view-0-shard-0.safetensors …   logits (rows, M, C) and, unless left out, features (rows, M, D): shard s holds
                                     the samples from s · shard_rows on; a sample is one contiguous read.
                                     Of a top-k bank: logits (rows, M, K), their classes indices (rows, K), 16 bits
                                     of an unsigned number, or int32 for more than 65,536 classes, and
                                     atoms (rows, M, 2, J) float32, see eekd.method.topk
      manifest.json                  written last, so it marks a finished bank (below)
      .lock                          held by the command that writes

manifest.json:

    format, eekd, commit, precision  of the file, 1, or 2 of a top-k bank; of the code; of the snapshots' forward
    run                              the teacher's run folder, relative to the bank
    views, samples, snapshots, classes, features    V, N, M, C, D (0: none are stored)
    top_k, atoms                     K and J; neither in a dense bank
    dtype, shard_rows                float16 or bfloat16; samples in a shard, the last one perhaps fewer
    projection                       null, or of the features, which then are u R: width (their own), seed
    teacher                          spec (of eekd.models.build), sha256 of the M snapshot files
    images                           what the snapshots saw: data, image_size, train_limit, val_fraction,
                                     split_seed, fingerprint; augment and, where they are used, auto_augment,
                                     erasing, mixup, cutmix; seed; augmented_sha256 of 16 images of view 0
    shards                           SHA-256 of every shard by the name of its file
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eekd.lazy import attach

if TYPE_CHECKING:
    from eekd.bank.reader import LogitBank
else:
    __getattr__, __dir__ = attach(__name__, {"reader": "LogitBank"}, modules=("reader", "writer"))

__all__ = ["Flags", "LogitBank"]


@dataclass(frozen=True)
class Flags:
    """Runs a teacher's snapshots over augmented views of its training images and stores their outputs.

    After a kill, the same command keeps the finished shards and continues.
    """

    teacher: str  # the run folder whose teacher to use
    views: int = 8  # augmented views of every image; in epoch e students see view e mod views
    out: str | None = None  # the bank's folder (None: RUN/bank)
    dtype: Literal["float16", "bfloat16"] = "float16"  # bfloat16: for logits above 65504
    top_k: int = 0  # store the K likeliest classes of each image and a summary of the others (0: all classes)
    auto_augment: Literal["none", "trivial", "rand"] | None = None  # of the views (None: that of the run's students)
    erasing: float | None = None  # of the views (None: that of the run's students)
    mixup: float | None = None  # of the views (None: that of the run's students)
    cutmix: float | None = None  # of the views (None: that of the run's students)
    features: str = "128"  # for weighting attention: none, all, or the largest width; wider features are projected
