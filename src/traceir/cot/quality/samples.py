"""Every outcome of a build as one row of measures in a DuckDB file of its own, which is asked for the figures by SQL.

The file lies in a temporary folder and goes with it; DuckDB holds at most MEMORY of it at a time.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Final

from traceir.cot.outcomes import CotOutcome
from traceir.cot.quality.texts import Words, holds, introduced, longest_copy
from traceir.cot.review.decisions import Decision
from traceir.cot.review.review import Settled, sample_hash
from traceir.cot.rules import RULES, count_tokens, words_of
from traceir.data.mbeir import EVAL_ROWS
from traceir.errors import DataError
from traceir.outside import valid_all

DROPPED_BY: Final = ("teacher", *RULES, "verifier", "reviewer")
FUNNEL: Final = ("queries", "complex", "reasoned", "passed_rules", "verified", "kept", "curated")
"""All; z = 1; with a reply; through the rules on single replies; yes with enough confidence; no duplicates; after review."""
MEASURES: Final = ("reasoning_words", "reasoning_tokens", "answer_words", "answer_tokens")
LONGEST: Final = 10_000
"""Lengths above are counted as this one."""
OPENING: Final = 4
"""Words of an opening."""
COPIED: Final = 8
"""Words in a row from which a run counts as copied from the target."""
SHORT_TARGET: Final = 3
"""Words from which a target counts as copied whole; a name of one or two words is the answer itself."""
TARGETS: Final = 8
"""Positives whose texts are compared."""
BINS: Final = 20
"""Of the verifier's confidence."""
SHOWN: Final = 400
"""Characters of a text in an example."""
MEMORY: Final = "128MB"

TABLES: Final = tomllib.loads((Path(__file__).parent / "tables.toml").read_text(encoding="utf-8"))
"""The columns of the table, and SQL by name."""


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The view `samples` of all rows, and their `tasks` as M-BEIR orders them. `place` orders rows by task, then as they came."""

    connection: Any
    tasks: list[str]

    def rows(self, name: str) -> list[tuple[Any, ...]]:
        """What a query of TABLES gives."""
        rows: list[tuple[Any, ...]] = self.connection.execute(TABLES[name]).fetchall()
        return rows

    def choose(self, task: str | None) -> None:
        """Makes the view `chosen` the rows of one task, or all."""
        self.connection.execute("SET VARIABLE task = $task", {"task": task})


@contextmanager
def sample_table(rows: Iterable[dict[str, Any]]) -> Iterator[SampleTable]:
    """The rows of `measures_of`, on the disk as JSON lines first. Raises DataError where DuckDB or room is missing."""
    try:
        import duckdb
    except ImportError as error:
        raise DataError("the report needs the package duckdb; pip install 'traceir[reasoning]'") from error
    try:
        with TemporaryDirectory(prefix="traceir-quality-") as folder:
            file = Path(folder) / "samples.jsonl"
            with file.open("w", encoding="utf-8") as stream:
                for number, row in enumerate(rows):
                    stream.write(json.dumps(valid_all({"number": number, **row}), ensure_ascii=False) + "\n")
            settings: dict[str, Any] = {"memory_limit": MEMORY, "threads": 1, "temp_directory": folder}
            with duckdb.connect(Path(folder) / "samples.duckdb", config=settings) as connection:
                read = "read_json($file, columns = $columns, format = 'newline_delimited')"
                connection.execute(f"CREATE TABLE outcomes AS FROM {read}", {"file": str(file), "columns": TABLES["columns"]})
                names = [name for (name,) in connection.execute("SELECT DISTINCT task FROM outcomes").fetchall()]
                tasks = sorted(names, key=lambda name: (EVAL_ROWS.index(name) if name in EVAL_ROWS else len(EVAL_ROWS), name))
                ranks = "SELECT unnest($tasks) AS task, unnest(range(len($tasks))) AS rank"
                connection.execute(f"CREATE TABLE ranks AS {ranks}", {"tasks": tasks})
                connection.execute(
                    "CREATE VIEW samples AS SELECT *, rank << 40 | number AS place FROM outcomes JOIN ranks USING (task)"
                )
                connection.execute("CREATE VIEW chosen AS FROM samples WHERE coalesce(task = getvariable('task'), true)")
                connection.execute("SET VARIABLE least_copied = $least", {"least": COPIED})
                yield SampleTable(connection, tasks)
    except (OSError, duckdb.Error) as error:
        raise DataError(
            f"{gettempdir()}: no figures can be made there ({error}); make room, or set TMPDIR to a folder"
        ) from error


def measures_of(
    outcome: CotOutcome, settled: Settled | None, votes: Sequence[Decision], captions: Mapping[str, str], tokenizer: str
) -> dict[str, Any]:
    """The row of an outcome. `settled` is what people have settled on it, `votes` are their decisions, on whatever text."""
    settled = settled if outcome.status != "direct" else None
    curated = settled.decision == "keep" if settled else outcome.status == "kept"
    row = {"qid": outcome.case.record.qid, "task": outcome.case.task, "stage": _stage(outcome), "curated": curated}
    row |= {"kept": outcome.status == "kept"} | _provenance(outcome)
    if outcome.status == "kept" and votes:
        row |= _review_of(vote for vote in votes if vote.sample == sample_hash(outcome))
    if outcome.status != "direct" and not curated:
        reply = outcome.raw or outcome.reasoning
        row |= {"rule": "reviewer" if settled else outcome.rule, "detail": outcome.detail[:SHOWN], "reply": reply[:SHOWN]}
    if outcome.verdict is not None and outcome.verdict_confidence >= 0.0 and outcome.rule != "teacher":
        row |= {
            "verdict": "yes" if outcome.verdict else "no",
            "bin": min(int(outcome.verdict_confidence * BINS + 1e-9), BINS - 1),
        }
    if curated:
        row |= _text_measures(outcome, (settled or outcome).reasoning, (settled or outcome).answer, captions, tokenizer)
    return row


def _review_of(votes: Iterable[Decision]) -> dict[str, bool]:
    """What the decisions on one kept sample say of it; where there are several, half of them are enough against it."""
    drawn = [vote for vote in votes if vote.how == "random"]
    hallucinated = sum(vote.decision == "drop" and vote.why == "hallucination" for vote in drawn)
    faulty = sum(vote.decision in ("drop", "edit") for vote in drawn)
    against = {"hallucinated": 2 * hallucinated >= len(drawn), "faulty": 2 * faulty >= len(drawn)}
    return {"reviewed": bool(drawn)} | (against if drawn else dict.fromkeys(against, False))


def _stage(outcome: CotOutcome) -> int:
    """The last stage of FUNNEL that a sample came through, people aside."""
    if not outcome.z or outcome.status == "direct":
        return 0
    if outcome.rule == "teacher" and outcome.verdict is None:
        return 1
    if outcome.rule in RULES and outcome.rule != "duplicate":
        return 2
    if outcome.rule not in ("", "duplicate"):
        return 3
    return 5 if outcome.status == "kept" else 4


def _provenance(outcome: CotOutcome) -> dict[str, Any]:
    made = json.loads(outcome.provenance or "{}")
    names = {name: str(made[name]) for name in ("teacher", "verifier", "prompts") if made.get(name)}
    return names | {name: int(made.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")}


def _text_measures(
    outcome: CotOutcome, reasoning: str, answer: str, captions: Mapping[str, str], tokenizer: str
) -> dict[str, Any]:
    """What a curated sample says, held against all that the data told the teacher."""
    case, record = outcome.case, outcome.case.record
    texts = [words_of(reasoning), words_of(answer)]
    query = f"{record.text or ''}\n{captions.get(record.image_path or '', '')}\n{case.instruction}"
    targets = [target.text for target in case.positives if target.text]
    known = [*targets, *filter(None, (captions.get(target.image_path or "", "") for target in case.positives))]
    terms = introduced(f"{reasoning}\n{answer}", "\n".join([query, *known]))
    sizes = (len(texts[0]), count_tokens(reasoning, tokenizer), len(texts[1]), count_tokens(answer, tokenizer))
    draw = hashlib.blake2b(f"{case.task} {record.qid}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    row = {"words": " ".join(texts[0]), "opening": " ".join(texts[0][:OPENING]), "draw": int.from_bytes(draw)}
    row |= {name: min(length, LONGEST) for name, length in zip(MEASURES, sizes, strict=True)}
    row |= {"told": "told" if known else "untold"}
    row |= {"terms": [{"group": term.group, "term": term.name, "words": words[:SHOWN]} for term, words in terms.items()]}
    return row | (_copy(texts, [words_of(target) for target in targets[:TARGETS]], words_of(query)) if targets else {})


def _copy(texts: Sequence[Words], targets: Iterable[Words], query: Words) -> dict[str, Any]:
    targets = list(targets)
    run = max((longest_copy(texts, target, query) for target in targets), key=len)
    short = (target for target in targets if SHORT_TARGET <= len(target) < COPIED)
    whole = next((target for target in short if holds(texts, target) and not holds([query], target)), None)
    copied = run if len(run) >= COPIED else whole
    shown = " ".join(copied)[:SHOWN] if copied else None
    return {"longest_copy": min(len(run), LONGEST), "whole": whole is not None, "copied": shown}
