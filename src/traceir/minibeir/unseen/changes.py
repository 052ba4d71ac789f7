"""Changes to images: CIRCO (several images are right), GeneCIS (one word says what counts), stories of five images (VIST), and
garments changed over several rounds (MT-FIQ). MiniBEIR's edits name one result and have one image."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from traceir.minibeir.chains import count_differences
from traceir.minibeir.drawing import COLOUR_NAMES, GARMENT_TYPES, SHAPES
from traceir.minibeir.garments import COLLARS, LENGTHS, SLEEVES, Garment
from traceir.minibeir.news import PARTS, list_others, swap_sides
from traceir.minibeir.scenes import PAIRS, SLOTS, Scene
from traceir.minibeir.sprites import Photo
from traceir.minibeir.unseen.states import ITEMS, LOOKS, S, State, StatePart, demand, depict, list_near, name_item, shuffle, tests

# --- CIRCO ------------------------------------------------------------------------------------------------------------

CONDITIONS: Final = (
    "any {shape} instead of the {place} one",
    "any {colour} object instead of the {place} one",
    "the same {place} one, but with any two {colour} objects",
    "keep the {place} one and turn the other two into a {shape} of any colour",
    "swap the {pair}, and the other one becomes any {shape}",
    "keep the {pair} and change the other one into any other object",
)


def list_conditions(reference: Scene, scene: Scene) -> set[str]:
    """All conditions on a reference that another scene fulfils; no scene fulfils one on itself."""
    fulfilled: set[str] = set()
    was, now = reference.objects, scene.objects
    for slot, where in enumerate(SLOTS):
        a, b = _others(slot)
        new, both = set(now[slot]) - set(was[slot]), set(now[a]) & set(now[b])
        pair = next(name for name, slots in PAIRS.items() if slots == (a, b))
        if (was[a], was[b]) == (now[a], now[b]) and now[slot] != was[slot]:
            fulfilled |= {f"any {value if value in SHAPES else f'{value} object'} instead of the {where} one" for value in new}
            fulfilled.add(f"keep the {pair} and change the other one into any other object")
        if was[slot] == now[slot] and was != now:
            fulfilled |= {f"the same {where} one, but with any two {value} objects" for value in both}
            fulfilled |= {f"keep the {where} one and turn the other two into a {value} of any colour" for value in both}
        if (was[a], was[b]) == (now[b], now[a]):
            fulfilled |= {f"swap the {pair}, and the other one becomes any {value}" for value in new}
    return fulfilled


def _vary(scene: Scene, *slots: int) -> Iterator[Scene]:
    """The test scenes that have any objects at these places and are like `scene` elsewhere."""
    for items in itertools.product(ITEMS, repeat=len(slots)):
        varied = scene
        for slot, item in zip(slots, items, strict=True):
            varied = varied.put(slot, item)
        if varied in tests(Scene):
            yield varied


def _others(*slots: int) -> list[int]:
    return [slot for slot in range(3) if slot not in slots]


def make_circo(count: int, rng: random.Random) -> StatePart:
    """`count` val queries with their answers, and a fifth as many test queries without.

    The pool holds what the queries bring: reference, two to four answers, near misses. Right is whatever in the whole pool
    fulfils the condition.
    """
    queries: list[tuple[Scene, str]] = []
    pool: dict[Scene, None] = {}
    starts = iter(rng.sample(list(tests(Scene)), len(tests(Scene))))
    while len(queries) < count + max(1, count // 5):
        reference, template = next(starts), CONDITIONS[len(queries) % len(CONDITIONS)]
        slots = {"place": rng.choice(SLOTS), "pair": rng.choice(tuple(PAIRS))}
        text = template.format(**slots, colour=rng.choice(COLOUR_NAMES), shape=rng.choice(SHAPES))
        pair, slot = PAIRS[slots["pair"]], SLOTS.index(slots["place"])
        varied = _others(*pair) if "{pair}" in template else [slot] if "instead" in template else _others(slot)
        scenes = list(_vary(reference.swap(*pair) if template.startswith("swap") else reference, *varied))
        right = [scene for scene in scenes if text in list_conditions(reference, scene)]
        if len(right) >= 2:
            wrong = [scene for scene in scenes if scene not in right]
            right = rng.sample(right, min(len(right), rng.randint(2, 4)))
            pool |= dict.fromkeys([reference, *right, *rng.sample(wrong, min(1, len(wrong))), *list_near(right[0], rng)[:1]])
            queries.append((reference, text))
    ids = {scene: 1000 + number for number, scene in enumerate(rng.sample(list(pool), len(pool)))}
    part = StatePart(count, len(pool), shown={f"circo/unlabeled2017/{number:012}.jpg": scene for scene, number in ids.items()})
    for split, some in (("val", queries[:count]), ("test", queries[count:])):
        entries = part.files[f"circo/annotations/{split}.json"] = []
        for number, (reference, text) in enumerate(some):
            entry = {"id": number, "reference_img_id": ids[reference], "relative_caption": text}
            answers = sorted(ids[scene] for scene in pool if text in list_conditions(reference, scene))
            entries.append(entry | ({"target_img_id": answers[0], "gt_img_ids": answers} if split == "val" else {}))
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in sorted(ids.values())]
    part.files["circo/annotations/image_info_unlabeled2017.json"] = {"images": images}
    return part


def check_circo(part: StatePart) -> None:
    """At least two images are right, among them not the reference, and all that are right are named."""
    pool = {int(name[-16:-4]): scene for name, scene in part.shown.items() if isinstance(scene, Scene)}
    for split in ("val", "test"):
        for entry in part.files[f"circo/annotations/{split}.json"]:
            reference, text = pool[entry["reference_img_id"]], entry["relative_caption"]
            right = sorted(number for number, scene in pool.items() if text in list_conditions(reference, scene))
            named = entry.get("gt_img_ids", right)
            good = named == right and len(right) >= 2 and entry.get("target_img_id", right[0]) in right
            demand(good, f"circo: {split} query {entry['id']}", f"right for {text!r} are {right}, not {named}")


# --- GeneCIS ----------------------------------------------------------------------------------------------------------

GALLERY: Final = {"change_object": 14, "focus_object": 14, "change_attribute": 9, "focus_attribute": 9}
"""Wrong images of each query, as published."""
_TRIMS: Final = (*LOOKS, *SLEEVES[1:], *(f"a {collar}" for collar in COLLARS), "a belt")

Choice = tuple[str, Any, Any, Sequence[Iterable[Any]]]
"""A query of GeneCIS: the condition, reference, right image, and groups of images from which the wrong ones are taken."""


def list_traits(name: str, reference: Any, other: Any) -> set[str]:
    """The conditions of a file of GeneCIS that an image fulfils: it keeps what the word names, or has come to it."""
    if name == "change_object":  # one object made way for the named one, and the two others stayed where they were
        new = [now for was, now in zip(reference.objects, other.objects, strict=True) if was != now]
        return {f"with {name_item(new[0])}"} if len(new) == 1 else set()
    if name == "focus_object":  # the very object of this shape
        shapes = [shape for _, shape in reference.objects]
        return {item[1] for item in reference.objects if shapes.count(item[1]) == 1 and item in other.objects}
    if name == "change_attribute":
        trims = {f"{other.colour} base", other.pattern, other.slots["sleeves"], f"a {other.collar}", other.slots["belt"]}
        return trims if other.kind == reference.kind else set()
    same = {"colour": "colour", "pattern": "pattern", "sleeves": "sleeves", "neck": "collar"}
    return {word for word, field in same.items() if getattr(reference, field) == getattr(other, field)}


def _choose_scenes(name: str, rng: random.Random) -> Choice | None:
    """The same object among unlike ones, against the same company round another object; or one object made way for the named
    one, against the named one in other company and the same company without it."""
    reference, chosen = rng.choice(list(tests(Scene))), rng.randrange(3)
    if name == "focus_object":
        held, item = rng.randrange(3), reference.objects[chosen]
        others = {other for slot, other in enumerate(reference.objects) if slot != chosen}
        right = [scene for scene in _vary(reference.put(held, item), *_others(held)) if not others & set(scene.objects)]
        right = [scene for scene in right if item[1] in list_traits(name, reference, scene)]
        if not right:
            return None
        loose = shuffle(_vary(reference, chosen, rng.choice(_others(chosen))), rng)
        tempting = [scene for scene in loose if item[1] in scene.attributes]
        return item[1], reference, right, (list(_vary(reference, chosen)), tempting, loose)
    item = rng.choice(ITEMS)
    target = reference.put(chosen, item)
    if item in reference.objects or target not in tests(Scene):
        return None
    moved = shuffle(_vary(target, rng.choice(_others(chosen))), rng)
    near = shuffle(itertools.chain.from_iterable(_vary(reference, slot) for slot in range(3)), rng)
    return f"with {name_item(item)}", reference, [target], (moved, near, shuffle(_vary(target, *_others(chosen)), rng))


def _choose_garments(name: str, rng: random.Random) -> Choice | None:
    """A garment that shares the named trait and few others, against garments that share others and not the trait; or one of the
    same kind with the named value, against the kind without it, and the value on other kinds that share less."""
    reference = rng.choice(list(tests(Garment)))
    changes = name == "change_attribute"
    if changes:
        text = rng.choice([f"{colour} base" for colour in COLOUR_NAMES] if rng.random() < 0.4 else _TRIMS)
        is_vain = text in list_traits(name, reference, reference)
    else:
        text = rng.choice(("colour", "pattern", "sleeves", "neck"))
        is_vain = text == "pattern" and reference.figure is None
    if is_vain:
        return None
    apart = {other: count_differences(reference, other) for other in tests(Garment) if other != reference}
    near = sorted(shuffle(apart, rng), key=apart.__getitem__)
    pool, wanted = (near, (2, 3)) if changes else (list(apart), (4, 5, 6, 7))
    right = [other for other in pool if apart[other] in wanted and text in list_traits(name, reference, other)]
    if not right:
        return None
    if not changes:
        return text, reference, right, (near,)
    target = rng.choice(right)
    named = [other for other in near if apart[other] > apart[target] and text in list_traits(name, other, other)]
    return text, reference, [target], ([other for other in near if other.kind == reference.kind], named)


def _draw_choice(name: str, rng: random.Random) -> tuple[str, list[State]]:
    """A condition, and reference, right image and gallery in the order in which crops are numbered; what fails is drawn again."""
    while True:
        choice = (_choose_scenes if name.endswith("object") else _choose_garments)(name, rng)
        if choice is None:
            continue
        text, reference, right, groups = choice
        target = right[0] if name.startswith("change") else rng.choice(right)
        wrong: dict[State, None] = {}
        for states in itertools.zip_longest(*groups):
            wrong |= {each: None for each in states if each is not None and text not in list_traits(name, reference, each)}
            wrong.pop(reference, None)
            if len(wrong) >= GALLERY[name]:
                return text, [reference, target, *itertools.islice(wrong, GALLERY[name])]


def make_genecis(count: int, rng: random.Random) -> StatePart:
    """Four files of `count` queries: an object or a trait to be reached, an object or a trait to look at."""
    part = StatePart(4 * count, 4 * count + count * sum(GALLERY.values()))
    ids: dict[str, dict[State, int]] = {"val_image_id": {}, "image_id": {}}
    for name in ("change_object", "focus_object", "change_attribute", "focus_attribute"):
        entries = part.files[f"genecis/annotations/{name}.json"] = []
        key, first, step = ("val_image_id", 100, 7) if name.endswith("object") else ("image_id", 2_300_000, 1)
        for sample in range(count):
            text, states = _draw_choice(name, rng)
            images = [{key: ids[key].setdefault(state, first + step * len(ids[key]))} for state in states]
            part.shown |= {_crop(name, image, sample, crop): states[crop] for crop, image in enumerate(images)}
            entries.append({"reference": images[0], "target": images[1], "gallery": images[2:], "condition": text})
    return part


def _crop(name: str, image: dict[str, int], sample: int, crop: int) -> str:
    if "val_image_id" in image:
        return f"genecis/val2017/{image['val_image_id']:012}.jpg"
    return f"genecis/visual_genome/{name}/{image['image_id']}_{sample}_{crop}.jpg"


def check_genecis(part: StatePart) -> None:
    """Of each gallery the target alone is right, and no image stands twice in it."""
    for name, size in GALLERY.items():
        for sample, entry in enumerate(part.files[f"genecis/annotations/{name}.json"]):
            images = [entry["reference"], entry["target"], *entry["gallery"]]
            states = [part.shown[_crop(name, image, sample, crop)] for crop, image in enumerate(images)]
            text, others = entry["condition"], enumerate(states[1:], start=1)
            right = [crop for crop, state in others if text in list_traits(name, states[0], state)]
            good = right == [1] and len(set(states)) == size + 2
            demand(good, f"genecis: {name} query {sample}", f"right for {text!r} are the images {right}")


# --- VIST -------------------------------------------------------------------------------------------------------------

IMAGES: Final = 5
"""Images of a story."""

Changes = Iterator[tuple[str, str, Any]]
"""What may be said of the last composition, each with its kind and what it leads to."""


def list_changes(story: Sequence[Any]) -> Changes:
    """ "Old" is said only where it can mean one thing."""
    now = story[-1]
    if isinstance(now, Photo):
        yield "swap", "then the two trade places", swap_sides(now)
        for part, words in (("time", "then it is {}"), ("place", "then they go to {}"), ("event", "then they are at a {}")):
            yield from ((part, words.format(value), replace(now, **{part: value})) for value in PARTS[part])
        for side, old in (("left", now.left), ("right", now.right)):
            for new in list_others(now, side):
                yield "person", f"then {new} takes the place of {old}", replace(now, **{side: new})
        return
    moved = any(sum(a != b for a, b in zip(x.objects, y.objects, strict=True)) > 1 for x, y in itertools.pairwise(story))
    yield from (("swap", f"then the {pair} trade places", now.swap(*PAIRS[pair])) for pair in PAIRS)
    for slot, name in enumerate(SLOTS):
        head = f"then the {name} one"
        yield from (("colour", f"{head} becomes {value}", now.alter(slot, value)) for value in COLOUR_NAMES)
        yield from (("shape", f"{head} becomes a {value}", now.alter(slot, value)) for value in SHAPES)
        for number, trait in enumerate(("colour", "shape")):
            for other in _others(slot):
                value = now.objects[other][number]
                yield "copy", f"{head} takes the {trait} of the {SLOTS[other]} one", now.alter(slot, value)
            seen = list(dict.fromkeys(scene.objects[slot][number] for scene in story))
            if len(seen) == 2 and now.objects[slot][number] == seen[1] and not moved:
                yield "return", f"{head} has its old {trait} again", now.alter(slot, seen[0])


def is_seen(text: str, state: Any) -> bool:
    """Whether a sentence tells what an image shows."""
    if isinstance(state, Photo):
        parts = re.match(r"one day (\w+) is with (\w+) in (\w+)|now (\w+) is at a (.+) (\w+ \w+)", text)
        return parts is not None and set(filter(None, parts.groups())) <= set(state.slots.values())
    if parts := re.fullmatch(r"now the (\w+) one is (.+)", text):
        return name_item(state.objects[SLOTS.index(parts[1])]) == parts[2]
    return sorted(re.findall(r"a (?!table)\w+ \w+", text)) == sorted(map(name_item, state.objects))


def _describe_seen(state: Any, first: bool, rng: random.Random) -> str:
    if isinstance(state, Photo):
        person, other = rng.sample((state.left, state.right), 2)
        now = f"now {person} is at a {state.event} {state.slots['time']}"
        return f"one day {person} is with {other} in {state.place}" if first else now
    begin = "one day {} is on a table with {} and {}".format(*map(name_item, rng.sample(state.objects, 3)))
    slot = rng.randrange(3)
    return begin if first else f"now the {SLOTS[slot]} one is {name_item(state.objects[slot])}"


def _write_stories(kind: type[S], count: int, rng: random.Random) -> Iterator[tuple[list[S], list[str]]]:
    """Five images and their sentences; the last sentence tells a change, three in ten of the others what is seen.

    No two stories share an image, so that every last image is right once.
    """
    free = dict(tests(kind))
    starts = rng.sample(list(free), len(free))
    while count:
        story, texts = [starts.pop()], list[str]()
        while story[0] in free and len(story) < IMAGES:
            texts = texts or [_describe_seen(story[0], True, rng)]
            options: dict[str, list[tuple[str, S]]] = {}
            for name, text, state in list_changes(story):
                if state in free and state not in story:
                    options.setdefault(name, []).append((text, state))
            if not options:
                break
            text, state = rng.choice(options[rng.choice(list(options))])
            seen = _describe_seen(state, False, rng)
            if len(story) < IMAGES - 1 and rng.random() < 0.3 and seen not in texts:
                text = seen
            story.append(state)
            texts.append(text)
        if len(story) == IMAGES:
            count -= 1
            for state in story:
                del free[state]
            yield story, texts


def make_vist(count: int, rng: random.Random) -> StatePart:
    """Stories of five images of which the last is to be found; scenes and photos by turns, in three image formats."""
    counts: dict[type[Any], int] = {Scene: count - count // 2, Photo: count // 2}
    worlds = [iter(list(_write_stories(kind, count, rng))) for kind, count in counts.items()]
    part = StatePart(count, IMAGES * count)
    annotations: list[list[dict[str, object]]] = []
    for story in range(count):
        for order, (state, text) in enumerate(zip(*next(worlds[story % 2]), strict=True)):
            number = str(500_000 + 3 * len(annotations))
            suffix = {7: "png", 13: "gif"}.get(len(annotations) % 20, "jpg")
            part.shown[f"vist/images/{number}.{suffix}"] = state
            line = {"story_id": str(40_000 + story), "text": text, "photo_flickr_id": number}
            annotations.append([line | {"worker_arranged_photo_order": order}])
    part.files["vist/sis/val.story-in-sequence.json"] = {"annotations": annotations}
    return part


def check_vist(part: StatePart) -> None:
    """Every sentence is true where it stands, and the last one leads to the last image, which stands in no other story."""
    lines = [line for (line,) in part.files["vist/sis/val.story-in-sequence.json"]["annotations"]]
    shown = {name.split("/")[-1].split(".")[0]: state for name, state in part.shown.items()}
    demand(len(set(shown.values())) == len(lines), "vist", "an image stands twice")
    for number, group in itertools.groupby(lines, key=lambda line: line["story_id"]):
        story = [(line["worker_arranged_photo_order"], line["text"], shown[line["photo_flickr_id"]]) for line in group]
        orders, texts, states = zip(*story, strict=True)
        demand(orders == tuple(range(IMAGES)) and texts[-1].startswith("then "), f"vist: story {number}", "it is out of order")
        for index, (text, state) in enumerate(zip(texts, states, strict=True)):
            led = text.startswith("then ") and (text, state) in (change[1:] for change in list_changes(states[:index]))
            demand(led or is_seen(text, state), f"vist: story {number}", f"{text!r} is not true of its image")


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


def apply_round(texts: Sequence[str], references: Sequence[Garment]) -> Garment:
    """The garment after one round, given the references up to this round's."""
    meanings = {text: edit for edits in list_garment_changes(references).values() for text, edit in edits.items()}
    return references[-1].apply(", ".join(meanings[text] for text in texts))


def _draw_round(references: Sequence[Garment], rng: random.Random) -> tuple[list[str], Garment] | None:
    """One or two changes of different attributes, and the garment they lead to; None where none was found."""
    now, every = references[-1], list_garment_changes(references).values()
    real = [changing for edits in every if (changing := [text for text, edit in edits.items() if now.apply(edit) != now])]
    for _ in range(60):
        texts = [rng.choice(changing) for changing in rng.sample(real, rng.choice((1, 2, 2)))]
        steps = sum(count_differences(now, apply_round([text], references)) for text in texts)
        after = apply_round(texts, references)
        if steps == count_differences(now, after) and after in tests(Garment) and after not in references:
            return texts, after
    return None


def make_multiturn(count: int, rng: random.Random) -> StatePart:
    """Two or three rounds of changes to a garment; the pool holds references, targets and garments near the targets."""
    entries: list[dict[str, object]] = []
    names: dict[Garment, str] = {}
    starts = iter(rng.sample(list(tests(Garment)), len(tests(Garment))))
    while len(entries) < count:
        wanted = 2 + len(entries) % 2
        states, rounds = [next(starts)], list[list[str]]()
        for _ in range(wanted):
            if drawn := _draw_round(states, rng):
                rounds.append(drawn[0])
                states.append(drawn[1])
        if len(rounds) == wanted:
            names |= {garment: depict(garment).key for garment in (*states, *list_near(states[-1], rng)[:2])}
            reference = [[number, texts, names[states[number]]] for number, texts in enumerate(rounds)]
            entries.append({"reference": reference, "target": [wanted, names[states[-1]]]})
    part = StatePart(count, len(names), shown={f"{_WORN}/{name}.jpg": garment for garment, name in names.items()})
    part.files["multiturnfashion/data/all.val.json"] = entries
    part.files["multiturnfashion/image_splits/split.all.val.json"] = sorted(names.values())
    return part


def check_multiturn(part: StatePart) -> None:
    """Every round leads to the next garment, which is none of those before."""
    demand(len(set(part.shown.values())) == len(part.shown), "multiturnfashion", "a garment stands twice in the pool")
    for number, entry in enumerate(part.files["multiturnfashion/data/all.val.json"]):
        names = [name for _, _, name in entry["reference"]] + [entry["target"][1]]
        garments: list[Any] = [part.shown[f"{_WORN}/{name}.jpg"] for name in names]
        for index, texts, _ in entry["reference"]:
            after = apply_round(texts, garments[: index + 1])
            good = after == garments[index + 1] and after not in garments[: index + 1]
            demand(good, f"multiturnfashion: query {number}", f"round {index} leads to {after}")
