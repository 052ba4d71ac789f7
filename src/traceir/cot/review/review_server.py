"""The review page on 127.0.0.1: samples to people, their decisions to the disk.

A decision is answered with 200 only after its line is fsynced. The page loads one sample at a time. `SecurityMiddleware` lets in
only what names a loopback host and our port, and only JSON of our own page; images are named by number and handed out decoded and
encoded anew. A GET writes nothing.
"""

from __future__ import annotations

import logging
import math
import re
import socket
import webbrowser
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from traceir.cot.outcomes import CotOutcome, read_outcomes
from traceir.cot.plan import read_config
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
from traceir.cot.review.review import THRESHOLD, Chosen, Sampling, agree, open_sample
from traceir.errors import ImageError, InputError, TraceError
from traceir.images import ImageInput, file_bytes
from traceir.outside import read_json
from traceir.serve.connections import settings
from traceir.serve.security import AccessRules, SecurityMiddleware

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
"""Pixels of the longer side of an image, at most."""
STATIC: Final = Path(__file__).parent / "static"
_FIELDS: Final = ("decision", "why", "reasoning", "answer", "note")
_MARKS: Final = {"keep": "k", "drop": "d", "edit": "e"}
_logger = logging.getLogger(__name__)


class ReviewSession:
    """The list and the journals behind a page. Thread-safe."""

    def __init__(self, out: Path, chosen: Sequence[Chosen], reviewer: str = "") -> None:
        self.out, self.chosen = out, chosen
        self.reviewer = check_name(reviewer) if reviewer else ""
        self._numbers = {sample.outcome.case.record.qid: number for number, sample in enumerate(chosen)}
        self._journals: OrderedDict[str, Journal] = OrderedDict()
        self._lock = Lock()

    def overview(self, reviewer: str) -> dict[str, Any]:
        """Everything but the samples: one mark a sample (k, d, e, or . while undecided), strata, agreement."""
        with self._lock:
            mine = self._valid(reviewer)
            decisions = read_decisions(self.out)
        strata: dict[str, dict[str, Any]] = {}
        for number, own in enumerate(self.chosen):
            about = {"name": own.stratum, "size": own.size, "how": own.how, "numbers": []}
            strata.setdefault(own.stratum, about)["numbers"].append(number)
        pairs = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(p).items()} for p in agree(decisions)
        ]
        return {
            "build": self.out.resolve().name,
            "reviewer": reviewer,
            "marks": "".join(_MARKS[mine[qid].decision] if qid in mine else "." for qid in self._numbers),
            "strata": list(strata.values()),
            "reasons": list(REASONS),
            "reviewers": {name: sum(map(self._is_current, own.values())) for name, own in decisions.items()},
            "agreement": pairs,
        }

    def sample(self, number: int, reviewer: str) -> dict[str, Any]:
        """One sample with all that the page shows, and this reviewer's decision on it, or None."""
        chosen = self._at(number)
        outcome, case = chosen.outcome, chosen.outcome.case
        with self._lock:
            mine = self._valid(reviewer).get(case.record.qid)
        images = [
            f"/api/picture/{number}/{position}?v={chosen.sample}" if path else "" for position, path in enumerate(chosen.images)
        ]
        plain = ("z", "confidence", "status", "rule", "verdict", "verdict_confidence", "reasoning", "answer")
        cut = ("assessment", "raw", "detail", "verdict_reason", "provenance")
        return {
            **{name: getattr(outcome, name) for name in plain},
            **{name: _cut(getattr(outcome, name)) for name in cut},
            "number": number,
            "qid": case.record.qid,
            "task": case.task,
            "stratum": chosen.stratum,
            "how": chosen.how,
            "sample": chosen.sample,
            "instruction": _cut(case.instruction),
            "query": {"text": _cut(case.record.text), "picture": images[0]},
            "targets": [
                {"did": target.did, "text": _cut(target.text), "picture": image}
                for target, image in zip(case.positives, images[1:], strict=True)
            ],
            "mine": {name: getattr(mine, name) for name in _FIELDS} if mine else None,
        }

    def decide(self, posted: dict[str, Any]) -> dict[str, Any]:
        """Checks and saves the decision of a POST; on the disk when this returns."""
        number, reviewer = posted.get("number"), posted.get("reviewer")
        texts = {name: posted.get(name, "") for name in (*_FIELDS, "sample")}
        if type(number) is not int or not all(isinstance(value, str) for value in (reviewer, *texts.values())):
            raise InputError("a decision needs number (an integer), reviewer, decision and sample, and texts where it has any")
        chosen = self._at(number)
        if texts["sample"] != chosen.sample:
            raise InputError("the sample is not the one that was shown; load the page again")
        if texts["decision"] != "edit":
            texts |= {"reasoning": "", "answer": ""}
        if texts["decision"] != "drop":
            texts["why"] = ""
        decision = Decision(qid=chosen.outcome.case.record.qid, task=chosen.outcome.case.task, how=chosen.how, **texts)
        check_decision(decision, chosen.outcome)
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

    def image(self, number: int, position: int) -> bytes:
        """The query's image (position 0) or that of a positive (1, 2, ...), as JPEG. Raises ImageError and InputError."""
        chosen = self._at(number)
        path = chosen.images[position] if position < len(chosen.images) else None
        if path is None:
            raise InputError(f"sample {number} has no image {position}")
        image = ImageInput.open(chosen.outcome.case.root / path).load(shrink_to=SIDE)
        return file_bytes(image, side=SIDE, quality=92, subsampling=0)

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
        return {qid: decision for qid, decision in latest.items() if self._is_current(decision)}

    def _is_current(self, decision: Decision) -> bool:
        number = self._numbers.get(decision.qid)
        return number is not None and self.chosen[number].sample == decision.sample


def app_of(session: ReviewSession, port: int) -> SecurityMiddleware:
    """The page as an ASGI application that answers to a loopback name with this port alone."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    def image(request: Request) -> Response:
        data = session.image(_number(request, "number"), _number(request, "place"))
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    def overview(request: Request) -> Response:
        return JSONResponse(session.overview(request.query_params.get("reviewer", "")))

    def sample(request: Request) -> Response:
        return JSONResponse(session.sample(_number(request, "number"), request.query_params.get("reviewer", "")))

    async def decide(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.decide, await _posted(request)))

    async def undo(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.undo, (await _posted(request)).get("reviewer")))

    def problem(_: Request, error: Exception) -> Response:
        status = 404 if isinstance(error, ImageError) else 400 if isinstance(error, InputError) else 507
        return JSONResponse({"error": str(error)}, status)

    routes = [
        Route("/", lambda _: FileResponse(STATIC / "review.html")),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Mount("/static", StaticFiles(directory=STATIC, packages=[("traceir.serve", "static")])),
        Route("/api/start", lambda _: JSONResponse({"reviewer": session.reviewer})),
        Route("/api/review", overview),
        Route("/api/sample/{number}", sample),
        Route("/api/picture/{number}/{place}", image),
        Route("/api/decide", decide, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]
    return SecurityMiddleware(
        Starlette(routes=routes, exception_handlers={TraceError: problem}), AccessRules.of("127.0.0.1", port=port)
    )


def serve_review(
    out: Path,
    sampling: Sampling | None = None,
    *,
    port: int = 8890,
    reviewer: str = "",
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
        outcomes, threshold = read_outcomes(out), read_config(out).verify_above
    if reviewer:
        check_name(reviewer)
    try:
        listener = socket.create_server(("127.0.0.1", port), backlog=128)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} cannot be used: {error}; choose another with --port, or 0 for any") from error
    with listener:
        chosen = open_sample(out, outcomes, sampling or Sampling(), threshold)
        taken = int(listener.getsockname()[1])
        address = f"http://127.0.0.1:{taken}/"
        with closing(ReviewSession(out, chosen, reviewer)) as session, suppress(KeyboardInterrupt):
            app = app_of(session, taken)
            config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False, **settings())
            announce(f"{len(chosen)} samples to review at {address}; Ctrl-C ends it, and every decision is already saved")
            if open_browser:
                webbrowser.open(address)  # the socket listens already
            uvicorn.Server(config).run(sockets=[listener])


async def _posted(request: Request) -> dict[str, Any]:
    """The JSON object of a POST. Raises InputError for anything else and for more than MAX_BODY bytes."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise InputError(f"the request has more than {MAX_BODY:,} bytes; shorten the texts")
    try:
        content = read_json(body)
    except ValueError as error:
        raise InputError(f"the request is not JSON ({str(error)[:80]}); load the page again") from error
    if not isinstance(content, dict):
        raise InputError("the request is not a JSON object; load the page again")
    return content


def _number(request: Request, name: str) -> int:
    """A number from the path. Raises InputError."""
    text = str(request.path_params[name])
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise InputError(f"{name} is {text[:20]!r}; it must be a number from 0")
    return int(text)


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} … ({len(text) - MAX_SHOWN:,} characters more)"
