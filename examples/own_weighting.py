"""A weighting of your own: for each sample, the snapshot that is surest weighs most.

eekd train --students ce uniform examples/own_weighting.py:surest
eekd compare --methods ce uniform examples/own_weighting.py:surest --seeds 3
"""

import torch


def surest(snapshot_logits, labels):
    """Log weights (B, M) from logits (M, B, C): twice the log-probability of each snapshot's first choice."""
    return 2 * torch.stack([logits.float().log_softmax(1).amax(1) for logits in snapshot_logits], 1)
