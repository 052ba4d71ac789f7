"""The objective of TRACE as pure functions on tensors (paper, section 2): L = lambda_gen * L_gen + lambda_ret * L_ret.

Shapes: B queries, N >= B candidates (candidate i belongs to query i, those behind are further negatives), D width, S supervised
tokens, V vocabulary; G queries of at most N candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


def generation_loss(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy over the supervised tokens, `<|emb|>` included; 0 where nothing is supervised.

    L_gen is this sum over all chunks and processes, divided by their number of supervised tokens.
    """
    if targets_S.numel() == 0:
        return logits_SV.sum() * 0.0
    return functional.cross_entropy(logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32)), targets_S, reduction="sum")


def retrieval_loss(
    query_BD: torch.Tensor,
    candidate_ND: torch.Tensor,
    temperature: float | torch.Tensor,
    collision_BN: torch.Tensor | None = None,
    *,
    symmetric: bool = False,
    rows_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_ret: InfoNCE of query i against all candidates, cosine similarity over `temperature`; the mean over queries.

    `collision_BN[i, j]` true marks a candidate j that is also right for query i; it is left out of i's sum instead of being
    pushed away (j = i is never left out). `symmetric` takes the mean with the other direction: candidate i < B against all
    queries. `rows_B` (bool) restricts the mean of the first direction to some queries; 0 where it names none.
    """
    query_BD, candidate_ND = functional.normalize(query_BD, dim=-1), functional.normalize(candidate_ND, dim=-1)
    scores_BN = query_BD @ candidate_ND.T / temperature
    own_B = torch.arange(len(scores_BN), device=scores_BN.device)
    if collision_BN is not None:
        left_out = collision_BN.clone()
        left_out[own_B, own_B] = False
        scores_BN = scores_BN.masked_fill(left_out, float("-inf"))
    if rows_B is not None:
        if not bool(rows_B.any()):
            return scores_BN.diagonal().sum() * 0.0
        return functional.cross_entropy(scores_BN[rows_B], own_B[rows_B])
    forward = functional.cross_entropy(scores_BN, own_B)
    if not symmetric:
        return forward
    return (forward + functional.cross_entropy(scores_BN[:, : len(own_B)].T, own_B)) / 2.0


def nested_retrieval_loss(
    query_BD: torch.Tensor,
    candidate_ND: torch.Tensor,
    temperature: float | torch.Tensor,
    collision_BN: torch.Tensor | None = None,
    *,
    widths: Mapping[int, float],
    **options: Any,
) -> torch.Tensor:
    """The sum of L_ret over the first d components of every vector, scaled to unit length again, by the weight of each d.

    Matryoshka representation learning (Kusupati et al., 2022, arXiv 2205.13147). `widths`: d to weight; empty: L_ret itself.
    """
    losses = (
        weight * retrieval_loss(query_BD[:, :width], candidate_ND[:, :width], temperature, collision_BN, **options)
        for width, weight in (widths or {query_BD.shape[1]: 1.0}).items()
    )
    return torch.stack([*losses]).sum()


def rerank_loss(groups: Sequence[torch.Tensor]) -> torch.Tensor:
    """L_rank: the sum over queries of the cross-entropy of a softmax over the scores of their candidates, the right one first.

    Not in the paper.
    """
    padded = pad_sequence(list(groups), batch_first=True, padding_value=float("-inf"))
    return functional.cross_entropy(padded, padded.new_zeros(len(groups), dtype=torch.long), reduction="sum")


def distillation_loss(direct_BD: torch.Tensor, reasoned_BD: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
    """1 - cosine between a query's prefill state and the embedding after its reasoning; the mean over `rows_B` (bool), else 0.

    The reasoned side gets no gradient: the direct route learns from it. Not in the paper.
    """
    if not bool(rows_B.any()):
        return direct_BD.sum() * 0.0
    cosine_B = functional.cosine_similarity(direct_BD[rows_B], reasoned_BD[rows_B].detach(), dim=-1)
    return (1.0 - cosine_B).mean()
