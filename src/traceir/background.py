"""Queries that a collection almost surely does not answer: the background against which scores are judged (`cutoff.py`).

Built in are short texts of several unrelated things each ("a walrus tuning a harp in a car park"), drawn by a seed: parts of them
may be in a collection, which makes the background a careful one, the whole is not. A checkpoint that knows a world of its own may
bring `background.txt`, in that world's words. Better than both are queries that users of the collection asked in vain.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from traceir.errors import InputError
from traceir.index.store import Background
from traceir.items import MODALITIES, Encoding, Query, Route
from traceir.outside import lines_of
from traceir.sources import Failure, Source, find_sources

COUNT: Final = 2000
"""Queries: enough for a rate of 1 in 1000 over two modalities."""
FILE_NAME: Final = "background.txt"
AT_ONCE: Final = 64


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(";"))


THINGS: Final = _words("""walrus; harp; wheelbarrow; lighthouse keeper; cactus; accordion; typewriter; snail; chandelier;
scarecrow; pelican; telescope; violin; submarine; hedgehog; anvil; porcupine; teapot; weathervane; hammock; flamingo;
hourglass; tuba; ostrich; igloo; gargoyle; sundial; beekeeper; tractor; octopus; cuckoo clock; llama; bagpipe; windmill;
gondola; armadillo; parachute; rocking chair; compass; lobster; drawbridge; trombone; yak; loom; canoe; chess clock;
meerkat; fountain pen; kite; blacksmith; totem pole; gramophone; puppeteer; toucan; unicycle; lantern; jellyfish; mandolin;
bulldozer; peacock; waffle iron; bonsai; snowplough; moose; xylophone; stethoscope; beehive; periscope; iguana; spinning
wheel; toboggan; astronaut; marionette; platypus; jukebox; pinecone; ferret; oboe; hot-air balloon; saddle; tapir;
microscope; seahorse; cement mixer; plough; raccoon; grandfather clock; zither; heron; wheel of cheese; surveyor; boomerang;
tortoise; banjo; thimble; crane; otter; catapult; badger; dulcimer; barometer; glassblower; pumpkin; narwhal; clarinet;
sewing machine; mole; trampoline; falcon; kettle drum; chameleon; snow globe; stilt walker; dromedary; pendulum""")
DEEDS: Final = _words("""balancing on; tuning; painting; repairing; chasing; weighing; polishing; juggling; carving;
photographing; burying; hauling; sketching; wrapping; towing; decorating; measuring; rescuing; auctioning; knitting a cover
for; floating past; sleeping beside; hiding behind; dancing around; digging up; leaning against; stacking; sweeping around;
teaching; boxing with; feeding; mending; inspecting; waiting for; rolling; climbing over; staring at; parading with;
unpacking; sheltering under""")
PLACES: Final = _words("""in a car park; on a frozen lake; in a courtroom; under a motorway bridge; in an empty swimming
pool; on a tennis court; in a bakery; at a railway crossing; in a greenhouse; on a ferry; in a planetarium; at a petrol
station; in a wine cellar; on a sand dune; in a dentist's waiting room; at an airport carousel; in a paper mill; on a
volcano's rim; in a chess club; at a car wash; in a salt mine; on a fire escape; in a ballet school; at a cattle market; in
a lift; on a film set; in a cathedral crypt; at a bus depot; in a mangrove swamp; on a rooftop garden; in a printing works;
at a fishing pier; in a laundrette; on an oil rig; in a bowling alley; at a quarry; in a museum store; on a glacier; in a
brass foundry; at a harvest fair""")
FORMS: Final = ("{0} {1} {2} {3}", "{0} {1} {2}", "{0} and {2} {3}", "{0}, {2} and {4}", "{0} {3} beside {4}")


class QueryEncoder(Protocol):
    """The part of `EncoderLike` that is asked."""

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]: ...


def built_in(count: int = COUNT, seed: int = 0) -> list[Query]:
    """`count` different texts; the first n of equal seeds are equal, whatever the count. InputError for more than there are."""
    if not 1 <= count <= 100_000:
        raise InputError(f"{count} built-in queries cannot be drawn; ask for 1 to 100000")
    return [Query.of(text=text) for text in islice(_texts(seed), count)]


def _texts(seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    seen: set[str] = set()
    while True:
        one, two, three = (f"{'an' if thing[0] in 'aeio' else 'a'} {thing}" for thing in draw.sample(THINGS, 3))
        text = draw.choice(FORMS).format(one, draw.choice(DEEDS), two, draw.choice(PLACES), three)
        if text not in seen:
            seen.add(text)
            yield text


def choose_queries(
    given: Sequence[Path], model: Path, *, count: int = COUNT, instruction: str | None = None
) -> tuple[list[Query], str]:
    """The queries to calibrate with, and what they are in words.

    Texts are those given, else those of the checkpoint's own `background.txt`, else the built-in ones: the first `count` of them.
    Pictures are those given; where no query of both is, each picture is also asked beside one of the texts.
    """
    queries = [query for path in given for query in read_queries(path)]
    sources = [path.name for path in given]
    own = model / FILE_NAME
    if not any(query.modality == "text" for query in queries):
        queries += (read_queries(own) if own.is_file() else built_in(count))[:count]
        sources.append(f"{FILE_NAME} of the model" if own.is_file() else "built in")
    texts, images = ([query for query in queries if query.modality == kind] for kind in ("text", "image"))
    if not any(query.modality == "image,text" for query in queries):
        queries += [Query((*one.parts, *texts[place % len(texts)].parts)) for place, one in enumerate(images)]
    return [replace(query, instruction=instruction) for query in queries], ", ".join(sources)


def read_queries(path: Path) -> list[Query]:
    """Queries of a file or folder: a .txt file holds one text a line; all else is read as `traceir index add` reads items.

    InputError naming what of it cannot be read: a background with holes would promise another rate than it keeps.
    """
    if path.suffix.lower() == ".txt" and path.is_file():
        return _lines(path)
    queries: list[Query] = []
    for found in find_sources([path]):
        if isinstance(found, Failure):
            raise InputError(f"{found.place}: {found.reason}")
        if isinstance(found, Source):
            queries.append(_query_of(found))
    if not queries:
        raise InputError(f"{path} holds no query; give pictures, a .jsonl file, or a .txt file of one text a line")
    return queries


def _query_of(source: Source) -> Query:
    try:
        return Query(source.make_item()[0].parts, id=source.id)
    except InputError as error:
        raise InputError(f"{source.place}: {error}") from error


def _lines(path: Path) -> list[Query]:
    lines = list(dict.fromkeys(line.strip() for line in lines_of(path, "query") if line.strip()))
    if not lines:
        raise InputError(f"{path} holds no query; write one a line")
    return [Query.of(text=line) for line in lines]


def encode_background(encoder: QueryEncoder, queries: Sequence[Query], source: str, *, progress: bool = False) -> Background:
    """The background that these queries make, each encoded by the route that the model chooses."""
    from tqdm import tqdm

    vectors: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    with tqdm(total=len(queries), unit="query", desc="calibrating", disable=not progress) as bar:
        for start in range(0, len(queries), AT_ONCE):
            part = queries[start : start + AT_ONCE]
            vectors += [encoding.vector for encoding in encoder.encode_queries(part)]
            bar.update(len(part))
    by_modality = {
        modality: np.stack(own)
        for modality in MODALITIES
        if (own := [vector for vector, query in zip(vectors, queries, strict=True) if query.modality == modality])
    }
    return Background(by_modality, source, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
