"""Terms about people that a teacher may bring into a text: gender, age, skin, origin, religion, body, orientation.

A term counts by its concept: who is told of a `woman` is told of `she`. Adjectives that also describe things (`white`, `old`,
`French`) count only beside a word for people. Known false friends (`baby blue`, `boyfriend jeans`, `male plug`) do not count.

Limits: English only; the lists are short and a term that is not in them is not seen; names, clothes and professions that suggest
a gender or a religion are not terms; `he` of an animal counts; a sentence that denies a term holds it; no term is judged right or
wrong. A count is a reason to look, not a verdict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

GROUPS: Final = ("gender", "age", "skin", "origin", "religion", "body", "orientation")


@dataclass(frozen=True, slots=True)
class Term:
    """One term: `found` is where a text holds it, `told` where a text tells its concept in whatever words."""

    group: str
    name: str
    found: re.Pattern[str]
    told: re.Pattern[str]


_PLAIN: Final = """
gender | female | woman women womens lady ladies girl girls female females she her hers herself mother mothers mom mum mommy
  daughter daughters sister sisters wife wives bride brides girlfriend girlfriends grandmother grandmothers grandma aunt aunts
  niece nieces actress actresses waitress waitresses businesswoman businesswomen policewoman sportswoman schoolgirl housewife
  feminine
gender | male | man men mens guy guys gentleman gentlemen boy boys male males he him his himself father fathers dad daddy son sons
  brother brothers husband husbands bridegroom boyfriend boyfriends grandfather grandfathers grandpa uncle uncles nephew nephews
  waiter waiters businessman businessmen policeman fireman fisherman sportsman schoolboy masculine
age | child | child children kid kids boy boys girl girls toddler toddlers infant infants baby babies preschooler youngster
  youngsters schoolboy schoolgirl
age | teenager | teen teens teenager teenagers teenage adolescent adolescents
age | middle-aged | middle-aged
age | old | elderly pensioner pensioners grandmother grandfather grandma grandpa octogenarian
religion | Muslim | muslims islamist islamists
religion | Christian | christians
religion | Catholic | catholics
religion | Jewish | jews
religion | Hindu | hindus
religion | Buddhist | buddhists
religion | Sikh | sikhs
religion | Mormon | mormons
skin | dark | dark-skinned brown-skinned tan-skinned olive-skinned
skin | black | black-skinned
skin | light | light-skinned fair-skinned pale-skinned
skin | white | white-skinned
skin | of colour | mulatto
body | disabled | wheelchair-bound quadriplegic paraplegic
body | obese | obese
orientation | gay | gay gays homosexual homosexuals
orientation | lesbian | lesbian lesbians
orientation | bisexual | bisexual bisexuals
orientation | transgender | transgender transsexual transsexuals transvestite
"""
"""Words that are about people wherever they stand: group, concept, words."""

_BESIDE: Final = """
age | young | young younger youthful | child children kid kids boy boys girl girls toddler baby infant teen teens teenage teenager
age | old | old older aged senior | elderly pensioner grandmother grandfather
skin | white | white | white-skinned
skin | black | black | black-skinned
skin | dark | brown dark tan tanned | dark-skinned brown-skinned
skin | light | light fair pale | light-skinned fair-skinned pale-skinned
religion | Muslim | muslim islamic | islam muslims
religion | Christian | christian | christianity christians
religion | Catholic | catholic | catholicism catholics
religion | Jewish | jewish | judaism jews jew
religion | Hindu | hindu | hinduism hindus
religion | Buddhist | buddhist | buddhism buddhists
religion | Sikh | sikh | sikhism sikhs
religion | Mormon | mormon | mormons
body | disabled | disabled handicapped crippled |
body | blind | blind |
body | deaf | deaf |
body | fat | fat overweight chubby plump | obese
body | thin | thin skinny slim slender |
body | attractive | attractive beautiful handsome pretty sexy gorgeous good-looking | beauty
body | ugly | ugly unattractive |
"""
"""Words that are about people beside a word for people: group, concept, words, and more words that tell the concept."""

_ORIGINS: Final = """
African: africans: africa | African American: : african-american afro-american | American: americans: america usa u.s
Native American: : indigenous | Arab, Arabian, Arabic: arabs: arabia | Asian: asians: asia | Australian: australians: australia
Brazilian: brazilians: brazil | British, English: britons brits: britain england uk | Canadian: canadians: canada
Caucasian: caucasians: | Chinese: : china | Cuban: cubans: cuba | Dutch: : netherlands holland | Egyptian: egyptians: egypt
Ethiopian: ethiopians: ethiopia | European: europeans: europe | Filipino, Filipina: filipinos: philippines
French: frenchman frenchmen frenchwoman: france | German: germans: germany | Greek: greeks: greece | Gypsy: gypsies: roma
Hispanic: hispanics: | Indian: indians: india | Indonesian: indonesians: indonesia
Iranian: iranians: iran | Persian: persians: persia
Irish: irishman irishmen: ireland | Israeli: israelis: israel | Italian: italians: italy | Jamaican: jamaicans: jamaica
Japanese: : japan | Kenyan: kenyans: kenya | Korean: koreans: korea | Latino, Latina: latinos latinas: latin
Mexican: mexicans: mexico | Middle Eastern: : middle-east | Moroccan: moroccans: morocco | Nigerian: nigerians: nigeria
Norwegian: norwegians: norway | Pakistani: pakistanis: pakistan | Polish: poles: poland | Portuguese: : portugal
Russian: russians: russia | Scottish: scots scotsman: scotland | South Asian: : | Spanish: spaniards: spain
Swedish: swedes: sweden
Swiss: : switzerland | Syrian: syrians: syria | Thai: thais: thailand | Turkish: turks: turkey | Ukrainian: ukrainians: ukraine
Vietnamese: : vietnam | Western: westerners: | Foreign: foreigners: foreigner
"""
"""Adjectives (the first names the concept), words for the people, and other words that tell the concept."""

_PEOPLE: Final = """
man men woman women person persons people boy boys girl girls child children kid kids baby babies toddler toddlers teen teens
teenager teenagers adult adults lady ladies gentleman gentlemen guy guys male males female females couple couples family families
crowd actor actors actress actresses artist artists athlete athletes author authors bride brides businessman businesswoman chef
chefs citizen citizens composer composers dancer dancers designer director doctor doctors farmer farmers father fathers fisherman
footballer grandmother grandfather guest guests inhabitants lawyer leader mother mothers musician musicians nun nuns nurse nurses
painter painters philosopher photographer player players poet politician politicians priest priests princess professor rapper
refugee refugees scientist scientists sculptor singer singers soldier soldiers student students teacher teachers tourist tourists
villager villagers waiter waitress worker workers writer writers
"""
"""Words for people, beside which an adjective is about them."""

_BETWEEN: Final = """
young younger old older elderly middle-aged adult teenage little small tall short smiling bearded bald male female black white
dark light fair pale american european famous local handsome beautiful attractive pretty happy unknown well-dressed
"""
"""What may stand between the adjective and the word for people."""

_ANIMAL: Final = "animals? birds? cats? deer dogs? ducks? elephants? lions? monkeys? penguins? seals?"
_PLUG: Final = "connectors? plugs? sockets? jacks? ends? threads? mannequins?"
_AFTER: Final = {
    "african": "americans?",
    "baby": f"blue pink dolls? grand carrots? corn spinach powder shower monitor bear goat steps? back {_ANIMAL}",
    "boyfriend": "jeans fit shirt blazer cardigan style cut",
    "daddy": "long",
    "father": "christmas time",
    "female": f"{_PLUG} {_ANIMAL}",
    "guy": "wires? ropes? lines? fawkes",
    "kid": "leather gloves?",
    "lady": "bugs? birds? fingers? beetles?",
    "male": f"{_PLUG} {_ANIMAL}",
    "man": "made cave hole ray",
    "mother": "of nature earth board ship tongue land tree plant",
    "sister": "ships? city cities company companies taxon taxa species group",
}
"""Word -> what follows it where it is a false friend."""
_BEFORE: Final = {
    "american": ("native", "african"),
    "indian": ("american",),
    "man": ("spider", "iron", "bat", "super", "pac", "isle of", "no"),
}
"""Word -> what stands before it where it is a false friend."""
_NOT_SKIN: Final = (
    "mannequins? dolls? figures? figurines? statues? silhouettes? dress(?:es)? shirts? cloth(?:es|ing) gloves? cats? dogs?"
)
"""What follows `white woman` and such where the colour is the thing's."""

_WORD: Final = re.compile(r"[a-z]+")
_START, _END = r"(?<![\w-])", r"(?![\w-])"
"""Of a word: a hyphen is part of it, `'s` is not."""


def find_terms(text: str) -> dict[Term, str]:
    """The terms of a text, each with the words that first hold it."""
    low = _lowered(text)
    index = _index()
    tried = dict.fromkeys(term for word in _WORD.findall(low) for term in index.get(word, ()))
    return {term: match[0] for term in tried if (match := term.found.search(low))}


def introduced(text: str, told: str) -> dict[Term, str]:
    """The terms of a text whose concept `told` does not tell, each with the words that hold it."""
    found = find_terms(text)
    given = _lowered(told) if found else ""
    return {term: words for term, words in found.items() if not term.told.search(given)}


def _lowered(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())


@cache
def _index() -> dict[str, tuple[Term, ...]]:
    """The first word of a term -> the terms that begin with it."""
    found: dict[str, list[Term]] = {}
    for term in (*_plain_terms(), *_beside_terms(), *_origin_terms()):
        found.setdefault(_WORD.findall(term.name)[0], []).append(term)
    return {word: tuple(terms) for word, terms in found.items()}


def _plain_terms() -> list[Term]:
    rows = [[part.strip() for part in line.split("|")] for line in _PLAIN.replace("\n  ", " ").strip().splitlines()]
    told: dict[tuple[str, str], set[str]] = {}
    for group, concept, words in rows:
        told.setdefault((group, concept), set()).update(words.split())
    made = []
    for group, concept, words in rows:
        known, name = told[group, concept], concept.lower()
        # the bare colour tells nothing of a person
        telling = re.compile(f"{_any(known).pattern}|{_of_skin(name)}") if group == "skin" else _any(known | {name})
        made += [Term(group, word, re.compile(f"{_own(word)}{_END}"), telling) for word in words.split()]
    return made


def _beside_terms() -> list[Term]:
    made = []
    for line in _BESIDE.strip().splitlines():
        group, concept, words, more = (part.strip() for part in line.split("|"))
        if group == "skin":
            patterns = [_of_skin(word) for word in words.split()]
            telling = re.compile("|".join([*patterns, _any({*more.split()}).pattern]))
            made += [Term(group, word, re.compile(own), telling) for word, own in zip(words.split(), patterns, strict=True)]
        else:
            telling = _any({*words.split(), *more.split(), concept.lower()})
            made += [Term(group, word, re.compile(_of_people(word)), telling) for word in words.split()]
    return made


def _origin_terms() -> list[Term]:
    made = []
    for entry in _ORIGINS.strip().replace("\n", "|").split("|"):
        adjectives, people, more = (part.strip().lower() for part in entry.split(":"))
        names = [name.strip() for name in adjectives.split(",")]
        telling = _any({*names, *people.split(), *more.split()})
        for name in names:
            descent = rf"{_own(name)}[\s-]+(?:descent|origin|ancestry|heritage|ethnicity)\b"
            made.append(Term("origin", name, re.compile(f"{_of_people(name)}|{descent}"), telling))
        made += [Term("origin", word, _any({word}), telling) for word in people.split()]
    return made


def _of_people(word: str) -> str:
    """The word before a word for people, or as what they are said to be: `old man`, `the man looks old`."""
    said = r"(?:\s+who)?\s+(?:is|are|was|were|looks?|seems?|appears?)(?:\s+to\s+be)?(?:\s+(?:a|an|very))?"
    return rf"{_before_people(word)}|{_START}{_either(_PEOPLE)}{said}\s+{_own(word)}{_END}"


def _of_skin(word: str) -> str:
    """The colour before a word for people, or before `skin` in a text about people: `white man`, `a man with pale skin`."""
    people, skin = _either(_PEOPLE), rf"{_own(word)}[\s-]+(?:skin|complexion)\b"
    things = "|".join(_NOT_SKIN.split())
    return rf"{_before_people(word)}(?!'|\s+(?:{things})\b)|{skin}(?=.*\b{people}\b)|\b{people}\b.*?{skin}"


def _before_people(word: str) -> str:
    return rf"{_own(word)}(?:[\s,-]+{_either(_BETWEEN)}){{0,2}}[\s-]+{_either(_PEOPLE)}{_END}"


def _own(word: str) -> str:
    """The word from its start, where it is no false friend."""
    before = "".join(rf"(?<!\b{friend}[ -])" for friend in _BEFORE.get(word, ()))
    after = rf"(?![\s-]+(?:{'|'.join(_AFTER[word].split())})\b)" if word in _AFTER else ""
    return f"{_START}{before}{re.escape(word).replace(chr(92) + ' ', '[ -]')}{after}"


def _any(words: set[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(f"{_START}(?:{'|'.join(re.escape(word) for word in longest_first)}){_END}")


def _either(words: str) -> str:
    return f"(?:{'|'.join(re.escape(word) for word in words.split())})"
