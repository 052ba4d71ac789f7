"""The review page on 127.0.0.1: samples to people, their decisions to the disk.

A decision is answered with 200 only after its line is fsynced. The page loads one sample at a time. `serve.guard.Guard` lets in
only what names a loopback host and our port, and only JSON of our own page; images are named by number and handed out decoded and
encoded anew. A GET writes nothing.
"""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import webbrowser
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from traceir.cot.outcomes import CotOutcome
from traceir.cot.review.decisions import (
    MAX_REVIEWERS,
    REASONS,
    Decision,
    Journal,
    check_decision,
    check_name,
    journal_path,
    read_decisions,
    reviewers,
)
from traceir.cot.review.review import STRATA, THRESHOLD, Chosen, Order, agree, open_sample
from traceir.errors import ImageError, InputError, TraceError
from traceir.images import ImageInput
from traceir.outside import read_json
from traceir.serve.guard import Guard, Wall
from traceir.serve.wire import settings

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_BODY: Final = 256 * 1024
"""Bytes of a POST."""
MAX_SHOWN: Final = 20_000
"""Characters of one text on the page; what is longer ends in a mark that says so."""
OPEN_FILES: Final = 16
"""Reviewers whose files are open at a time."""
SIDE: Final = 1280
"""Pixels of the longer side of a picture, at most."""
STATIC: Final = {
    "review.html": "text/html; charset=utf-8",
    "review.css": "text/css; charset=utf-8",
    "review.js": "text/javascript; charset=utf-8",
}
_FIELDS: Final = ("decision", "why", "reasoning", "answer", "note")
_MARKS: Final = {"keep": "k", "drop": "d", "edit": "e"}
_logger = logging.getLogger(__name__)


class ReviewSession:
    """The list and the journals behind a page. Thread-safe."""

    def __init__(self, out: Path, chosen: Sequence[Chosen], reviewer: str = "") -> None:
        self.out, self.chosen = out, chosen
        self.reviewer = check_name(reviewer) if reviewer else ""
        self._numbers = {one.outcome.case.record.qid: number for number, one in enumerate(chosen)}
        self._samples = {one.outcome.case.record.qid: one.sample for one in chosen}
        self._journals: OrderedDict[str, Journal] = OrderedDict()
        self._lock = Lock()

    def overview(self, reviewer: str) -> dict[str, Any]:
        """Everything but the samples: one mark a sample (k, d, e, or . while undecided), strata, agreement."""
        with self._lock:
            mine = self._valid(reviewer)
            decisions = read_decisions(self.out)
        marks = "".join(_MARKS[mine[qid].decision] if qid in mine else "." for qid in self._numbers)
        strata: dict[str, dict[str, Any]] = {}
        for one in self.chosen:
            strata.setdefault(one.stratum, {"name": one.stratum, "size": one.size, "how": one.how, "numbers": []})
        for number, one in enumerate(self.chosen):
            strata[one.stratum]["numbers"].append(number)
        judged = {name: sum(self._samples.get(qid) == one.sample for qid, one in d.items()) for name, d in decisions.items()}
        pairs = [{key: None if _is_nan(value) else value for key, value in asdict(one).items()} for one in agree(decisions)]
        return {
            "build": self.out.resolve().name,
            "reviewer": reviewer,
            "marks": marks,
            "strata": list(strata.values()),
            "reasons": list(REASONS),
            "reviewers": judged,
            "agreement": pairs,
        }

    def sample(self, number: int, reviewer: str) -> dict[str, Any]:
        """One sample with all that the page shows, and this reviewer's decision on it, or None."""
        one = self._at(number)
        outcome, record = one.outcome, one.outcome.case.record
        with self._lock:
            mine = self._valid(reviewer).get(record.qid)
        base = f"/api/picture/{number}"
        targets = [
            {
                "did": target.did,
                "text": _cut(target.text),
                "picture": f"{base}/{place}?v={one.sample}" if target.image_path else "",
            }
            for place, target in enumerate(outcome.case.positives, 1)
        ]
        told = {key: getattr(outcome, key) for key in ("z", "confidence", "status", "rule", "verdict", "verdict_confidence")}
        texts = {key: _cut(getattr(outcome, key)) for key in ("assessment", "raw", "detail", "verdict_reason", "provenance")}
        return {
            **told,
            **texts,
            "reasoning": outcome.reasoning,
            "answer": outcome.answer,
            "number": number,
            "qid": record.qid,
            "task": outcome.case.task,
            "stratum": one.stratum,
            "how": one.how,
            "sample": one.sample,
            "instruction": _cut(outcome.case.instruction),
            "query": {"text": _cut(record.text), "picture": f"{base}/0?v={one.sample}" if record.image_path else ""},
            "targets": targets,
            "mine": {key: getattr(mine, key) for key in _FIELDS} if mine else None,
        }

    def decide(self, told: dict[str, Any]) -> dict[str, Any]:
        """Checks and saves the decision of a POST; on the disk when this returns."""
        number, reviewer = told.get("number"), told.get("reviewer")
        texts = {key: told.get(key, "") for key in (*_FIELDS, "sample")}
        if type(number) is not int or not all(isinstance(value, str) for value in (reviewer, *texts.values())):
            raise InputError("a decision needs number (an integer), reviewer, decision and sample, and texts where it has any")
        one = self._at(number)
        if texts["sample"] != one.sample:
            raise InputError("the sample is not the one that was shown; load the page again")
        record = one.outcome.case.record
        if texts["decision"] != "edit":
            texts |= {"reasoning": "", "answer": ""}
        if texts["decision"] != "drop":
            texts["why"] = ""
        decision = Decision(qid=record.qid, task=one.outcome.case.task, how=one.how, **texts)
        check_decision(decision, one.outcome)
        with self._lock:
            self._journal(str(reviewer)).add(decision)
        return {"number": number, "mark": _MARKS[decision.decision]}

    def undo(self, reviewer: object) -> dict[str, Any]:
        """Takes back the reviewer's newest decision; `number` is its sample, -1 where there was none."""
        if not isinstance(reviewer, str):
            raise InputError("undo needs the reviewer, a text")
        with self._lock:
            last = self._journal(reviewer).undo(self._numbers) if self._is_known(reviewer) else None
            stands = self._valid(reviewer).get(last.qid) if last else None
        number = self._numbers[last.qid] if last else -1
        return {"number": number, "mark": _MARKS[stands.decision] if stands else "."}

    def image(self, number: int, place: int) -> bytes:
        """The query's picture (place 0) or that of a positive (1, 2, ...), as JPEG. Raises ImageError and InputError."""
        case = self._at(number).outcome.case
        paths = [case.record.image_path, *(target.image_path for target in case.positives)]
        path = paths[place] if place < len(paths) else None
        if path is None:
            raise InputError(f"sample {number} has no picture {place}")
        return _as_jpeg(case.root / path)

    def close(self) -> None:
        with self._lock:
            for journal in self._journals.values():
                journal.close()

    def _at(self, number: int) -> Chosen:
        if not 0 <= number < len(self.chosen):
            raise InputError(f"there is no sample {str(number)[:20]}; the list has {len(self.chosen)}, counted from 0")
        return self.chosen[number]

    def _journal(self, reviewer: str) -> Journal:
        """The reviewer's open file; of more than OPEN_FILES the one that was used longest ago is closed."""
        if reviewer not in self._journals:
            if not self._is_known(reviewer) and len(reviewers(self.out)) >= MAX_REVIEWERS:
                raise InputError(f"{MAX_REVIEWERS} reviewers have decided on this build; take one of their names")
            while len(self._journals) >= OPEN_FILES:
                self._journals.popitem(last=False)[1].close()
            self._journals[reviewer] = Journal(self.out, reviewer)
        self._journals.move_to_end(reviewer)
        return self._journals[reviewer]

    def _is_known(self, reviewer: str) -> bool:
        """Whether the reviewer has a file. Looking and undoing begin none."""
        return journal_path(self.out, reviewer).exists()

    def _valid(self, reviewer: str) -> dict[str, Decision]:
        """The reviewer's standing decisions on the samples of the list as they are now."""
        latest = self._journal(reviewer).latest() if self._is_known(reviewer) else {}
        return {qid: one for qid, one in latest.items() if self._samples.get(qid) == one.sample}


def app_of(session: ReviewSession, port: int) -> Guard:
    """The page as an ASGI application that answers to a loopback name with this port alone."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answer(body: Callable[..., Any]) -> Callable[[Request], Any]:
        """An endpoint that runs `body(request, posted object)` in a thread, and tells our errors as JSON."""
        from starlette.concurrency import run_in_threadpool

        async def endpoint(request: Request) -> Response:
            try:
                posted = await _posted(request) if request.method == "POST" else {}
                found = await run_in_threadpool(body, request, posted)
            except (InputError, ImageError) as error:
                return JSONResponse({"error": str(error)}, 404 if isinstance(error, ImageError) else 400)
            except TraceError as error:
                return JSONResponse({"error": str(error)}, 507)
            return found if isinstance(found, Response) else Response(json.dumps(found), media_type="application/json")

        return endpoint

    def page(request: Request, _: object) -> Response:
        name = request.path_params.get("name", "review.html")
        if name not in STATIC:
            return JSONResponse({"error": f"there is no file {name[:60]!r}"}, 404)
        return Response((Path(__file__).parent / "static" / name).read_bytes(), media_type=STATIC[name])

    def image(request: Request, _: object) -> Response:
        data = session.image(_number(request, "number"), _number(request, "place"))
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    def start(_: Request, __: object) -> Any:
        return {"reviewer": session.reviewer}

    def overview(request: Request, _: object) -> Any:
        return session.overview(request.query_params.get("reviewer", ""))

    def sample(request: Request, _: object) -> Any:
        return session.sample(_number(request, "number"), request.query_params.get("reviewer", ""))

    routes = [
        Route("/", answer(page)),
        Route("/favicon.ico", answer(lambda _, __: Response(status_code=204))),
        Route("/static/{name}", answer(page)),
        Route("/api/start", answer(start)),
        Route("/api/review", answer(overview)),
        Route("/api/sample/{number}", answer(sample)),
        Route("/api/picture/{number}/{place}", answer(image)),
        Route("/api/decide", answer(lambda _, posted: session.decide(posted)), methods=["POST"]),
        Route("/api/undo", answer(lambda _, posted: session.undo(posted.get("reviewer"))), methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), Wall.of("127.0.0.1", port=port))


def serve_review(
    out: Path,
    *,
    port: int = 8890,
    reviewer: str = "",
    per_stratum: int = 20,
    order: Order = "random",
    strata: Sequence[str] = STRATA,
    seed: int = 0,
    open_browser: bool = False,
    outcomes: Iterable[CotOutcome] | None = None,
    announce: Callable[[str], None] = _logger.info,
) -> None:
    """Serves the page on 127.0.0.1 until interrupted. Port 0 takes any that is free; `announce` gets the address.

    `outcomes` default to those of the build in `out`. Raises InputError for a taken port, a name that is none, or missing
    packages; DataError where there is nothing to review.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise InputError(
            "the review page needs starlette and uvicorn; install them with `pip install 'traceir[serve]'`"
        ) from error
    threshold = THRESHOLD
    if outcomes is None:
        from traceir.cot.outcomes import read_outcomes
        from traceir.cot.plan import read_config

        outcomes, threshold = read_outcomes(out), read_config(out).verify_above
    if reviewer:
        check_name(reviewer)
    with _listen(port) as listener:
        chosen = open_sample(out, outcomes, per_stratum=per_stratum, order=order, strata=strata, seed=seed, threshold=threshold)
        session = ReviewSession(out, chosen, reviewer)
        taken = int(listener.getsockname()[1])
        address = f"http://127.0.0.1:{taken}/"
        config = uvicorn.Config(app_of(session, taken), log_level="warning", access_log=False, server_header=False, **settings())
        announce(f"{len(chosen)} samples to review at {address}; Ctrl-C ends it, and every decision is already saved")
        if open_browser:
            webbrowser.open(address)  # the socket listens already
        try:
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            session.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"port {port} cannot be used: {error}; choose another with --port, or 0 for any") from error
    return listener


async def _posted(request: Request) -> dict[str, Any]:
    """The JSON object of a POST. Raises InputError for anything else and for more than MAX_BODY bytes."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise InputError(f"the request has more than {MAX_BODY:,} bytes; shorten the texts")
    try:
        found = read_json(body)
    except ValueError as error:
        raise InputError(f"the request is not JSON ({str(error)[:80]}); load the page again") from error
    if not isinstance(found, dict):
        raise InputError("the request is not a JSON object; load the page again")
    return found


def _number(request: Request, name: str) -> int:
    """A number from the path. Raises InputError."""
    told = str(request.path_params[name])
    if not re.fullmatch(r"[0-9]{1,9}", told):
        raise InputError(f"{name} is {told[:20]!r}; it must be a number from 0")
    return int(told)


def _as_jpeg(path: Path) -> bytes:
    """A picture file, upright and RGB, at most SIDE pixels wide and high, as JPEG. Raises ImageError."""
    image = ImageInput.open(path).load(shrink_to=SIDE)
    image.thumbnail((SIDE, SIDE))
    stream = BytesIO()
    image.save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} … ({len(text) - MAX_SHOWN:,} characters more)"


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
