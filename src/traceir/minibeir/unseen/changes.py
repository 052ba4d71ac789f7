"""Changes to images: CIRCO (several images are right), GeneCIS (one word says what counts), stories of five images (VIST), and
garments changed over several rounds (MT-FIQ).

MiniBEIR's edits name one result and have one image. Here a change leaves something open, or only one trait is to be kept or
reached, or the query has two to four images between the words that lead from one to the next, and may look back.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from traceir.minibeir.chains import count_differences
from traceir.minibeir.drawing import COLOUR_NAMES, GARMENT_TYPES, SHAPES
from traceir.minibeir.garments import COLLARS, LENGTHS, SLEEVES, Garment
from traceir.minibeir.news import PARTS, list_others, swap_sides
from traceir.minibeir.scenes import PAIRS, SLOTS, Scene
from traceir.minibeir.sprites import Photo
from traceir.minibeir.unseen.states import ITEMS, LOOKS, Part, S, State, at, demand, depict, draw_one, list_near, name_item, tests

# --- CIRCO ------------------------------------------------------------------------------------------------------------

CONDITIONS: Final = (
    "any {shape} instead of the {place} one",
    "any {colour} object instead of the {place} one",
    "the same {place} one, but with any two {colour} objects",
    "keep the {place} one and turn the other two into a {shape} of any colour",
    "swap the {pair}, and the other one becomes any {shape}",
    "keep the {pair} and change the other one into any other object",
)
_WORDS: Final = {"place": SLOTS, "pair": tuple(PAIRS), "colour": COLOUR_NAMES, "shape": SHAPES}


def list_conditions(reference: Scene, scene: Scene) -> set[str]:
    """All conditions on a reference that another scene fulfils; no scene fulfils one on itself."""
    told: set[str] = set()
    was, now = reference.objects, scene.objects
    kept = [was[slot] == now[slot] for slot in range(3)]
    for slot, place in enumerate(SLOTS):
        one, other = (each for each in range(3) if each != slot)
        new, both = set(now[slot]) - set(was[slot]), set(now[one]) & set(now[other])
        pair = next(name for name, slots in PAIRS.items() if slots == (one, other))
        if kept[one] and kept[other]:
            told |= {f"any {value if value in SHAPES else f'{value} object'} instead of the {place} one" for value in new}
            told |= {f"keep the {pair} and change the other one into any other object"} if not kept[slot] else set()
        if kept[slot] and scene != reference:
            told |= {f"the same {place} one, but with any two {value} objects" for value in both}
            told |= {f"keep the {place} one and turn the other two into a {value} of any colour" for value in both}
        if (now[one], now[other]) == (was[other], was[one]):
            told |= {f"swap the {pair}, and the other one becomes any {value}" for value in new}
    return told


def vary(scene: Scene, places: Sequence[int]) -> Iterator[Scene]:
    """The test scenes that have any objects at these places and are like `scene` elsewhere."""
    for items in itertools.product(ITEMS, repeat=len(places)):
        varied = scene
        for place, item in zip(places, items, strict=True):
            varied = varied.put(place, item)
        if varied in tests(Scene):
            yield varied


def _draw_condition(template: str, reference: Scene, rng: random.Random) -> tuple[str, list[Scene], list[Scene]]:
    """A condition on the reference in words; the test scenes that fulfil it; some that vary in the same places and do not."""
    slots = {name: rng.choice(words) for name, words in _WORDS.items()}
    text = template.format(**slots)
    one, other = PAIRS[slots["pair"]]
    place = SLOTS.index(slots["place"])
    ground = reference.swap(one, other) if template.startswith("swap") else reference
    if "{pair}" in template:
        varied = _others(one, other)
    else:
        varied = [place] if "instead" in template else _others(place)
    scenes = [(scene, text in list_conditions(reference, scene)) for scene in vary(ground, varied)]
    return text, [scene for scene, right in scenes if right], [scene for scene, right in scenes if not right]


def _others(*places: int) -> list[int]:
    return [place for place in range(3) if place not in places]


def make_circo(count: int, rng: random.Random) -> Part:
    """`count` val queries with their answers, and a fifth as many test queries without.

    The pool holds what the queries bring: reference, two to four answers, near misses. Right is whatever in the whole pool
    fulfils the condition.
    """
    queries: list[tuple[Scene, str]] = []
    pool: dict[Scene, None] = {}
    for reference in rng.sample(list(tests(Scene)), len(tests(Scene))):
        text, right, wrong = _draw_condition(CONDITIONS[len(queries) % len(CONDITIONS)], reference, rng)
        if len(right) < 2:
            continue
        right = rng.sample(right, min(len(right), rng.randint(2, 4)))
        pool |= dict.fromkeys([reference, *right, *rng.sample(wrong, min(1, len(wrong))), *list_near(right[0], rng)[:1]])
        queries.append((reference, text))
        if len(queries) == count + max(1, count // 5):
            break
    ids = {scene: 1000 + place for place, scene in enumerate(rng.sample(list(pool), len(pool)))}
    part = Part(count, len(pool), shown={f"circo/unlabeled2017/{number:012}.jpg": scene for scene, number in ids.items()})
    for split, some in (("val", queries[:count]), ("test", queries[count:])):
        entries = part.files[f"circo/annotations/{split}.json"] = []
        for number, (reference, text) in enumerate(some):
            entry = {"id": number, "reference_img_id": ids[reference], "relative_caption": text}
            answers = sorted(ids[scene] for scene in pool if text in list_conditions(reference, scene))
            entries.append(entry | ({"target_img_id": answers[0], "gt_img_ids": answers} if split == "val" else {}))
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in sorted(ids.values())]
    part.files["circo/annotations/image_info_unlabeled2017.json"] = {"images": images}
    return part


def check_circo(part: Part) -> None:
    """At least two images are right, among them not the reference, and all that are right are told."""
    pool = {int(name[-16:-4]): scene for name, scene in part.shown.items() if isinstance(scene, Scene)}
    for split, entry in ((split, entry) for split in ("val", "test") for entry in part.files[f"circo/annotations/{split}.json"]):
        reference, text = pool[entry["reference_img_id"]], entry["relative_caption"]
        right = sorted(number for number, scene in pool.items() if text in list_conditions(reference, scene))
        told = entry["gt_img_ids"] if split == "val" else right
        good = told == right and len(right) >= 2 and entry.get("target_img_id", right[0]) in right
        demand(good, f"circo: {split} query {entry['id']}", f"right for {text!r} are {right}, not {told}")


# --- GeneCIS ----------------------------------------------------------------------------------------------------------

GALLERY: Final = {"change_object": 14, "focus_object": 14, "change_attribute": 9, "focus_attribute": 9}
"""Wrong images of each query, as published."""

Choice = tuple[str, list[State]]
"""A query of GeneCIS: the condition, and reference, right image and gallery, in the order in which crops are numbered."""


def list_traits(name: str, reference: State, other: State) -> set[str]:
    """The conditions of a file of GeneCIS that an image fulfils: it keeps what the word names, or has come to it."""
    if isinstance(reference, Scene) and isinstance(other, Scene):
        if name == "change_object":  # one object made way for the named one, and the two others stayed where they were
            new = [now for was, now in zip(reference.objects, other.objects, strict=True) if was != now]
            return {f"with {name_item(new[0])}"} if len(new) == 1 else set()
        shapes = [shape for _, shape in reference.objects]  # the very object of this shape
        return {item[1] for item in reference.objects if shapes.count(item[1]) == 1 and item in other.objects}
    if not isinstance(reference, Garment) or not isinstance(other, Garment):
        return set()
    if name == "change_attribute":
        trims = {f"{other.colour} base", other.pattern, other.slots["sleeves"], f"a {other.collar}", other.slots["belt"]}
        return trims if other.kind == reference.kind else set()
    same = {"colour": "colour", "pattern": "pattern", "sleeves": "sleeves", "neck": "collar"}
    return {word for word, field in same.items() if getattr(reference, field) == getattr(other, field)}


def _choose(name: str, text: str, reference: S, target: S, groups: Sequence[Iterable[S]]) -> Choice | None:
    """Takes wrong images from the groups by turns; None where there are too few."""
    wrong: dict[State, None] = {}
    for turn in itertools.zip_longest(*groups):
        wrong |= {each: None for each in turn if each is not None and text not in list_traits(name, reference, each)}
        wrong.pop(reference, None)
        if len(wrong) >= GALLERY[name]:
            return text, [reference, target, *itertools.islice(wrong, GALLERY[name])]
    return None


def _shuffle(states: Iterable[S], rng: random.Random) -> list[S]:
    shuffled = list(states)
    rng.shuffle(shuffled)
    return shuffled


def _focus_object(rng: random.Random) -> Choice | None:
    """The same object among unlike ones; against the same company round another object."""
    reference = draw_one(Scene, rng)
    place, held = rng.randrange(3), rng.randrange(3)
    item = reference.objects[place]
    company = {other for slot, other in enumerate(reference.objects) if slot != place}
    right = [scene for scene in vary(reference.put(held, item), _others(held)) if not company & set(scene.objects)]
    right = [scene for scene in right if item[1] in list_traits("focus_object", reference, scene)]
    if not right:
        return None
    near = list(vary(reference, [place]))
    loose = _shuffle(vary(reference, [place, rng.choice(_others(place))]), rng)
    tempting = [scene for scene in loose if item[1] in scene.attributes]
    return _choose("focus_object", item[1], reference, rng.choice(right), (near, tempting, loose))


def _change_object(rng: random.Random) -> Choice | None:
    """One object made way for the named one; against the named one in other company, and the same company without it."""
    reference, place, item = draw_one(Scene, rng), rng.randrange(3), rng.choice(ITEMS)
    target = reference.put(place, item)
    if item in reference.objects or target not in tests(Scene):
        return None
    moved = _shuffle(vary(target, [rng.choice(_others(place))]), rng)
    near = _shuffle(itertools.chain.from_iterable(vary(reference, [slot]) for slot in range(3)), rng)
    loose = _shuffle(vary(target, _others(place)), rng)
    return _choose("change_object", f"with {name_item(item)}", reference, target, (moved, near, loose))


def _list_nearest(garment: Garment, rng: random.Random) -> list[Garment]:
    """All other garments, those that share most first."""
    others = _shuffle((other for other in tests(Garment) if other != garment), rng)
    return sorted(others, key=lambda other: count_differences(garment, other))


def _focus_attribute(rng: random.Random) -> Choice | None:
    """A garment that shares the named trait and few others; against garments that share others and not the trait."""
    reference, trait = draw_one(Garment, rng), rng.choice(("colour", "pattern", "sleeves", "neck"))
    if trait == "pattern" and reference.figure is None:
        return None
    right = [other for other in tests(Garment) if trait in list_traits("focus_attribute", reference, other)]
    right = [other for other in right if count_differences(reference, other) >= 4]
    near = _list_nearest(reference, rng)
    return _choose("focus_attribute", trait, reference, rng.choice(right), (near,)) if right else None


def _change_attribute(rng: random.Random) -> Choice | None:
    """A garment of the same kind with the named value, whose other traits may differ; against the kind without the value, and
    against the value on other kinds that share less with the reference than the target does."""
    name, reference = "change_attribute", draw_one(Garment, rng)
    bases = [f"{colour} base" for colour in COLOUR_NAMES]
    trims = [*LOOKS, *SLEEVES[1:], *(f"a {collar}" for collar in COLLARS), "a belt"]
    text = rng.choice(bases if rng.random() < 0.4 else trims)
    if text in list_traits(name, reference, reference):
        return None
    near = _list_nearest(reference, rng)
    right = [other for other in near if text in list_traits(name, reference, other)]
    right = [other for other in right if count_differences(reference, other) in (2, 3)]
    if not right:
        return None
    target = rng.choice(right)
    less = [other for other in near if count_differences(reference, other) > count_differences(reference, target)]
    same = [other for other in near if other.kind == reference.kind]
    named = [other for other in less if text in list_traits(name, other, other)]
    return _choose(name, text, reference, target, (same, named))


def make_genecis(count: int, rng: random.Random) -> Part:
    """Four files of `count` queries: an object or a trait to be reached, an object or a trait to look at."""
    part = Part(4 * count, 4 * count + count * sum(GALLERY.values()))
    makers = (_change_object, _focus_object, _change_attribute, _focus_attribute)
    ids: dict[State, int] = {}
    numbers: dict[State, int] = {}
    for name, make in zip(("change_object", "focus_object", "change_attribute", "focus_attribute"), makers, strict=True):
        entries = part.files[f"genecis/annotations/{name}.json"] = []
        drawn = (make(rng) for _ in itertools.count())
        for sample, (text, states) in enumerate(itertools.islice((each for each in drawn if each), count)):
            images = []
            for crop, state in enumerate(states):
                if isinstance(state, Scene):
                    images.append({"val_image_id": ids.setdefault(state, 100 + 7 * len(ids))})
                    part.shown[f"genecis/val2017/{ids[state]:012}.jpg"] = state
                else:
                    images.append({"image_id": numbers.setdefault(state, 2_300_000 + len(numbers))})
                    part.shown[f"genecis/visual_genome/{name}/{numbers[state]}_{sample}_{crop}.jpg"] = state
            entries.append({"reference": images[0], "target": images[1], "gallery": images[2:], "condition": text})
    return part


def check_genecis(part: Part) -> None:
    """Of each gallery the target alone is right, and no image stands twice in it."""
    for name, size in GALLERY.items():
        for sample, entry in enumerate(part.files[f"genecis/annotations/{name}.json"]):
            states = []
            for crop, image in enumerate([entry["reference"], entry["target"], *entry["gallery"]]):
                file = f"visual_genome/{name}/{image.get('image_id')}_{sample}_{crop}.jpg"
                states.append(
                    part.shown["genecis/" + (file if "image_id" in image else f"val2017/{image['val_image_id']:012}.jpg")]
                )
            right = [
                crop for crop, state in enumerate(states) if crop and entry["condition"] in list_traits(name, states[0], state)
            ]
            good = right == [1] and len(set(states)) == size + 2
            demand(good, f"genecis: {name} query {sample}", f"right for {entry['condition']!r} are the images {right}")


# --- VIST -------------------------------------------------------------------------------------------------------------

IMAGES: Final = 5
"""Images of a story."""

Changes = list[tuple[str, str, Any]]
"""What may be said of the last composition, each with its kind and what it leads to."""


def list_scene_changes(story: Sequence[Scene]) -> Changes:
    """ "Old" is said only where it can mean one thing."""
    now = story[-1]
    moved = any(sum(a != b for a, b in zip(x.objects, y.objects, strict=True)) > 1 for x, y in itertools.pairwise(story))
    changes: Changes = [("swap", f"then the {pair} trade places", now.swap(*PAIRS[pair])) for pair in PAIRS]
    for slot, place in enumerate(SLOTS):
        head = f"then the {place} one"
        changes += [("colour", f"{head} becomes {value}", now.alter(slot, value)) for value in COLOUR_NAMES]
        changes += [("shape", f"{head} becomes a {value}", now.alter(slot, value)) for value in SHAPES]
        for number, trait in enumerate(("colour", "shape")):
            for other in SLOTS:
                if other != place:
                    text = f"{head} takes the {trait} of the {other} one"
                    changes.append(("copy", text, now.alter(slot, at(now, other)[number])))
            seen = list(dict.fromkeys(at(scene, place)[number] for scene in story))
            if len(seen) == 2 and at(now, place)[number] == seen[1] and not moved:
                changes.append(("return", f"{head} has its old {trait} again", now.alter(slot, seen[0])))
    return changes


def list_photo_changes(story: Sequence[Photo]) -> Changes:
    now = story[-1]
    changes: Changes = [("swap", "then the two trade places", swap_sides(now))]
    for part, words in (("time", "then it is {}"), ("place", "then they go to {}"), ("event", "then they are at a {}")):
        changes += [(part, words.format(value), replace(now, **{part: value})) for value in PARTS[part]]
    for side, old in (("left", now.left), ("right", now.right)):
        others = list_others(now, side)
        changes += [("person", f"then {new} takes the place of {old}", replace(now, **{side: new})) for new in others]
    return changes


def list_changes(story: Sequence[Any]) -> Changes:
    return list_photo_changes(story) if isinstance(story[-1], Photo) else list_scene_changes(story)


def list_sights(state: Scene | Photo) -> tuple[dict[tuple[Any, ...], str], dict[str, str]]:
    """What is seen: to begin a story with, by objects or people in an order, and to go on with, by place or person."""
    if isinstance(state, Photo):
        people = (state.left, state.right)
        first = {pair: f"one day {pair[0]} is with {pair[1]} in {state.place}" for pair in itertools.permutations(people)}
        return dict(first), {one: f"now {one} is at a {state.event} {state.slots['time']}" for one in people}
    told = "one day {} is on a table with {} and {}"
    orders = {items: told.format(*map(name_item, items)) for items in itertools.permutations(state.objects)}
    return dict(orders), {place: f"now the {place} one is {name_item(at(state, place))}" for place in SLOTS}


def _tell_sight(state: Scene | Photo, first: bool, rng: random.Random) -> str:
    begin, go_on = list_sights(state)
    order = tuple(rng.sample((state.left, state.right), 2) if isinstance(state, Photo) else rng.sample(state.objects, 3))
    place = order[0] if isinstance(state, Photo) else rng.choice(SLOTS)
    return begin[order] if first else go_on[place]


def _write_stories(kind: type[S], count: int, rng: random.Random) -> Iterator[tuple[list[S], list[str]]]:
    """Five images and their sentences; the last sentence tells a change, three in ten of the others what is seen.

    No two stories share an image, so that every last image is right once.
    """
    free = dict(tests(kind))
    starts = rng.sample(list(free), len(free))
    while count:
        start = starts.pop()
        if start not in free:
            continue
        story, texts = [start], [_tell_sight(start, True, rng)]
        while len(story) < IMAGES:
            options: defaultdict[str, list[tuple[str, S]]] = defaultdict(list)
            for name, text, state in list_changes(story):
                if state in free and state not in story:
                    options[name].append((text, state))
            if not options:
                break
            text, state = rng.choice(options[rng.choice(list(options))])
            seen = _tell_sight(state, False, rng)
            keeps = len(story) < IMAGES - 1 and rng.random() < 0.3 and seen not in texts
            story.append(state)
            texts.append(seen if keeps else text)
        if len(story) == IMAGES:
            count -= 1
            for state in story:
                del free[state]
            yield story, texts


def make_vist(count: int, rng: random.Random) -> Part:
    """Stories of five images of which the last is to be found; scenes and photos by turns, in three image formats."""
    scenes = list(_write_stories(Scene, count - count // 2, rng))
    photos = list(_write_stories(Photo, count // 2, rng))
    part = Part(count, IMAGES * count)
    annotations: list[list[dict[str, object]]] = []
    for story in range(count):
        states, texts = (scenes, photos)[story % 2][story // 2]
        for order, (state, text) in enumerate(zip(states, texts, strict=True)):
            number = str(500_000 + 3 * len(annotations))
            suffix = {7: "png", 13: "gif"}.get(len(annotations) % 20, "jpg")
            part.shown[f"vist/images/{number}.{suffix}"] = state
            line = {"story_id": str(40_000 + story), "text": text, "photo_flickr_id": number}
            annotations.append([line | {"worker_arranged_photo_order": order}])
    part.files["vist/sis/val.story-in-sequence.json"] = {"annotations": annotations}
    return part


def check_vist(part: Part) -> None:
    """Every sentence is true where it stands, and the last one leads to the last image, which stands in no other story."""
    lines = [line for (line,) in part.files["vist/sis/val.story-in-sequence.json"]["annotations"]]
    shown = {name.split("/")[-1].split(".")[0]: state for name, state in part.shown.items()}
    demand(len(set(shown.values())) == len(lines), "vist", "an image stands twice")
    for number, group in itertools.groupby(lines, key=lambda line: line["story_id"]):
        story = [(line["worker_arranged_photo_order"], line["text"], shown[line["photo_flickr_id"]]) for line in group]
        orders, texts, states = zip(*story, strict=True)
        demand(orders == tuple(range(IMAGES)) and texts[-1].startswith("then "), f"vist: story {number}", "it is out of order")
        for place, (text, state) in enumerate(zip(texts, states, strict=True)):
            led = place > 0 and (text, state) in ((words, then) for _, words, then in list_changes(states[:place]))
            seen = text in (told for sights in list_sights(state) for told in sights.values())
            demand(led or seen, f"vist: story {number}", f"{text!r} is not true of its image")


# --- multi-turn FashionIQ ---------------------------------------------------------------------------------------------


_WORN: Final = "mbeir_images/fashioniq_images"


def list_garment_changes(references: Sequence[Garment]) -> dict[str, dict[str, str]]:
    """By kind: what may be said of the last reference, and the edit that it means; "old" only where it can mean one thing."""
    changes = {
        "base": {f"has a {colour} base": f"base {colour}" for colour in COLOUR_NAMES},
        "pattern": {f"has {look}": look for look in LOOKS},
        "plain": {"has no pattern": "plain"},
        "kind": {f"is a {kind}": kind for kind in GARMENT_TYPES},
        "length": {f"is {length}": length for length in LENGTHS},
        "sleeves": {f"has {sleeves.replace('sleeveless', 'no sleeves')}": sleeves for sleeves in SLEEVES},
        "collar": {f"has a {collar}": collar for collar in COLLARS},
        "belt": {"has a belt": "belt", "has no belt": "no belt"},
    }
    for word, field, edit in (("colour", "colour", "base {}"), ("sleeves", "sleeves", "{}"), ("neck", "collar", "{}")):
        seen = list(dict.fromkeys(getattr(garment, field) for garment in references))
        if len(seen) == 2 and getattr(references[-1], field) == seen[1]:
            changes[f"old {word}"] = {f"has its old {word} again": edit.format(seen[0])}
    return changes


def _draw_round(references: Sequence[Garment], rng: random.Random) -> tuple[list[str], Garment] | None:
    """One or two changes of different attributes, and the garment they lead to; None where none was found."""
    now = references[-1]
    real = {}
    for kind, edits in list_garment_changes(references).items():
        if changing := [text for text, edit in edits.items() if now.apply(edit) != now]:
            real[kind] = changing
    for _ in range(60):
        texts = [rng.choice(real[kind]) for kind in rng.sample(list(real), rng.choice((1, 2, 2)))]
        steps = [count_differences(now, apply_round([text], references)) for text in texts]
        after = apply_round(texts, references)
        if sum(steps) == count_differences(now, after) and after in tests(Garment) and after not in references:
            return texts, after
    return None


def apply_round(texts: Sequence[str], references: Sequence[Garment]) -> Garment:
    """The garment after one round, given the references up to this round's."""
    meanings = {text: edit for edits in list_garment_changes(references).values() for text, edit in edits.items()}
    return references[-1].apply(", ".join(meanings[text] for text in texts))


def make_multiturn(count: int, rng: random.Random) -> Part:
    """Two or three rounds of changes to a garment; the pool holds references, targets and garments near the targets."""
    entries: list[dict[str, object]] = []
    part = Part(count, 0)
    names: dict[Garment, str] = {}
    for start in rng.sample(list(tests(Garment)), len(tests(Garment))):
        states, rounds = [start], []
        for _ in range(2 + len(entries) % 2):
            if drawn := _draw_round(states, rng):
                rounds.append(drawn[0])
                states.append(drawn[1])
        if len(rounds) < 2 + len(entries) % 2:
            continue
        for garment in (*states, *list_near(states[-1], rng)[:2]):
            names[garment] = depict(garment).key
        reference = [[turn, texts, names[state]] for turn, (texts, state) in enumerate(zip(rounds, states, strict=False))]
        entries.append({"reference": reference, "target": [len(rounds), names[states[-1]]]})
        if len(entries) == count:
            break
    part.candidates = len(names)
    part.files["multiturnfashion/data/all.val.json"] = entries
    part.files["multiturnfashion/image_splits/split.all.val.json"] = sorted(names.values())
    part.shown |= {f"{_WORN}/{name}.jpg": garment for garment, name in names.items()}
    return part


def check_multiturn(part: Part) -> None:
    """Every round leads to the next garment, which is none of those before."""
    demand(len(set(part.shown.values())) == len(part.shown), "multiturnfashion", "a garment stands twice in the pool")
    for number, entry in enumerate(part.files["multiturnfashion/data/all.val.json"]):
        names = [name for _, _, name in entry["reference"]] + [entry["target"][1]]
        states = [part.shown[f"{_WORN}/{name}.jpg"] for name in names]
        garments = [state for state in states if isinstance(state, Garment)]
        for turn, texts, _ in entry["reference"]:
            after = apply_round(texts, garments[: turn + 1])
            good = after == garments[turn + 1] and after not in garments[: turn + 1]
            demand(good, f"multiturnfashion: query {number}", f"round {turn} leads to {after}")
