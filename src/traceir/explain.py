"""What a model is given and what it makes of it: prompt, tokens, the supervised ones among them, pooling position, route."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from traceir.batch import IGNORE
from traceir.errors import InputError
from traceir.forward import TraceModel
from traceir.items import TakenRoute
from traceir.prompts import EMB, IMAGE_PAD, Prompt, Role


@dataclass(frozen=True, slots=True)
class Token:
    """One position: the token read there, the token taught to be written next (None: not supervised), whether it is pooled."""

    position: int
    id: int
    text: str
    target: str | None
    pooled: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one input is read.

    `emb_probability` is that of `<|emb|>` as the first token written, `route` what `auto` makes of it. `pooling_index` is the
    position of the embedding: of the completion where one was given, else of the direct route.
    """

    role: Role
    prompt_version: str
    pooling_position: str
    prompt: str
    completion: str | None
    tokens: tuple[Token, ...]
    pooling_index: int
    emb_probability: float
    route: TakenRoute
    cut: int


def explain(model: TraceModel, prompt: Prompt, completion: str | None = None) -> Explanation:
    """Lays a prompt out as training and serving do, with the completion as the model would be taught to write it.

    A completion of "" stands for the bypass. Raises InputError for a candidate's completion: candidates never reason.
    """
    if completion is not None and prompt.role == "candidate":
        raise InputError("a candidate has no completion, because candidates never reason; explain it as a query instead")
    layout = model.processor.forced(prompt) if completion is None else model.processor.lay_out(prompt, completion)
    probability, bypass = 1.0, True
    if not prompt.closed:  # else it is pooled at its end, and there is nothing to write
        with torch.inference_mode():
            batch = model.processor.collate([model.processor.lay_out(prompt)]).to(model.device)
            logits_V, emb = model.logits(model.hidden(batch)[0, -1]).float(), model.processor.emb_id
            probability, bypass = float(torch.softmax(logits_V, dim=-1)[emb]), int(logits_V.argmax()) == emb
    position = model.settings.pooling_position
    route: TakenRoute = "direct" if bypass or prompt.role == "candidate" or position == "last" else "reason"
    tokens = tuple(
        Token(
            number, token, _token_text(model, token), None if target == IGNORE else _token_text(model, target),
            number == layout.pooling_index,
        )
        for number, (token, target) in enumerate(zip(layout.ids.tolist(), layout.targets.tolist(), strict=True))
    )  # fmt: skip
    return Explanation(
        prompt.role, prompt.version, position, prompt.show(), completion, tokens, layout.pooling_index, probability, route,
        layout.cut,
    )  # fmt: skip


def describe(explanation: Explanation) -> str:
    """The explanation for people: one line a token, those of an image in one line."""
    lines = [
        f"{explanation.role}, prompt version {explanation.prompt_version}, pooling position {explanation.pooling_position}",
        "",
        "prompt:",
        *(f"  {line}" for line in explanation.prompt.splitlines()),
        "",
        f"{len(explanation.tokens)} tokens (* pooled, -> supervised: what the model learns to write next):",
        *_token_lines(explanation.tokens),
        "",
        f"pooling index: {explanation.pooling_index}",
        f"P({EMB}) at the first step: {explanation.emb_probability:.4f}",
        f"route: {explanation.route}",
        f"text tokens cut: {explanation.cut}",
    ]
    if explanation.route == "reason" and explanation.completion is None:
        lines.append("The model reasons first, so its own pooling position lies behind what it writes; --completion shows it.")
    return "\n".join(lines)


def _token_text(model: TraceModel, token: int) -> str:
    """The token as text; a piece of a character stands in the tokenizer's own spelling."""
    tokenizer = model.processor.tokenizer
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text or not text else text


def _token_lines(tokens: tuple[Token, ...]) -> Iterator[str]:
    for plain, group in groupby(tokens, lambda token: token.text == IMAGE_PAD and not token.pooled and token.target is None):
        run = list(group)
        if plain and len(run) > 1:
            yield f"  {run[0].position:4d}   {IMAGE_PAD} x {len(run)}"
            continue
        for token in run:
            shown = token.text if token.text.startswith("<|") else repr(token.text)
            taught = "" if token.target is None else f"  -> {token.target!r}"
            yield f"  {token.position:4d} {'*' if token.pooled else ' '} {shown}{taught}"
