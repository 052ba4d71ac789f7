"""What a reranker reads: query and candidate at once, the query first (`render_asked`, then `render_offered`: one prompt in two
halves), or a candidate that is to be put in words."""

from __future__ import annotations

from typing import Final

from traceir.items import Item, Query
from traceir.prompts import ENDING, Prompt, PromptVersion, Span, UserText, contents, normalise, opening

RERANK: Final = "rerank-1"
"""The version of the two halves that a reranker reads."""
DESCRIBE: Final = "describe-1"
"""The version of what a candidate is asked that is to be put in words."""
ANSWERS: Final = ("yes", "no")
"""What it is asked for; the first token of each counts."""


def render_asked(query: Query, version: PromptVersion, reasoning: str = "") -> Prompt:
    """What a reranker reads first: the question, the query, and what the query's encoder wrote of the target."""
    system = (
        "Judge whether the candidate is what the query looks for. Compare every detail that the query names. "
        f"Answer only {' or '.join(ANSWERS)}."
    )
    brief = f"query {query.modality.replace(',', ' ')} find {(query.target or 'any').replace(',', ' ')}. "
    pieces = opening(version, system, brief) + contents(query.parts, query.instruction)
    if reasoning := normalise(reasoning):
        pieces += [Span(("\nTarget: " if version == "trace-1" else "find ",)), Span((UserText(reasoning),))]
    return Prompt(tuple(pieces), "query", version)


def render_offered(item: Item, version: PromptVersion) -> Prompt:
    """What a reranker reads next, for each candidate: its images and text, and where the answer begins."""
    begins = "\nCandidate: " if version == "trace-1" else f"candidate {item.modality.replace(',', ' ')}. "
    return Prompt((Span((begins,)), *contents(item.parts), *ENDING), "candidate", version)


def asked_to_describe(item: Item) -> Query:
    """A candidate as a query that is answered by putting it in words."""
    return Query((*item.parts, "name it"))
