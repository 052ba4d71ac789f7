"""The objective of TRACE as pure functions on tensors (paper, section 2): L = lambda_gen * L_gen + lambda_ret * L_ret.

Shapes: B pairs, D width, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def generation_loss(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """L_gen: mean cross-entropy over the supervised tokens, `<|emb|>` included; 0 where nothing is supervised."""
    if targets_S.numel() == 0:
        return logits_SV.sum() * 0.0
    return functional.cross_entropy(logits_SV.float(), targets_S)


def retrieval_loss(
    query_BD: torch.Tensor, candidate_BD: torch.Tensor, temperature: float, collision_BB: torch.Tensor | None = None
) -> torch.Tensor:
    """L_ret: InfoNCE of query i against all candidates of the batch, cosine similarity over `temperature`.

    `collision_BB[i, j]` true (off the diagonal) marks a candidate j that is also right for query i; it is left out of i's sum
    instead of being pushed away.
    """
    query_BD, candidate_BD = functional.normalize(query_BD, dim=-1), functional.normalize(candidate_BD, dim=-1)
    scores_BB = query_BD @ candidate_BD.T / temperature
    if collision_BB is not None:
        own = torch.eye(len(scores_BB), dtype=torch.bool, device=scores_BB.device)
        scores_BB = scores_BB.masked_fill(collision_BB & ~own, float("-inf"))
    return functional.cross_entropy(scores_BB, torch.arange(len(scores_BB), device=scores_BB.device))
