"""What a build of M-BEIR-CoT is: its settings, its folder, and who of many machines does what."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import Questions
from traceir.cot.files import read_document, read_object, write_json, write_text
from traceir.cot.rules import RuleLimits
from traceir.cot.source import find_captions
from traceir.errors import DataError, InputError
from traceir.outside import read_json

NAME: Final = "M-BEIR-CoT build"
FORMAT: Final = 1
STAGES: Final = ("assess", "reason", "filter", "verify")
CONFIG_FILE: Final = "build.json"
CAPTIONS: Final = "captions.jsonl"
DATASET: Final = "dataset"


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """All that decides the data a build makes; how it reaches its teacher and how fast is not in here.

    `model` and `verifier` are the names the endpoint knows the teachers by (`verifier` "": the same). `direct` and `complex`:
    tasks that are taken as such unasked, as the paper's table of subsets has whole tasks. `attempts`: how often a question is
    asked while its reply cannot be read or breaks a rule. `verify_above`: confidence a yes must exceed (paper: 0.7). `pixels`:
    most pixels of an image shown to the teacher. `captions`: file of image captions. `templates`: JSON file of prompts that
    override ask.TEMPLATES.
    """

    data: str
    model: str
    verifier: str = ""
    tasks: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    complex: tuple[str, ...] = ()
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 512
    attempts: int = 2
    verify_above: float = 0.7
    pixels: int = 512 * 512
    captions: str = ""
    templates: str = ""
    part_size: int = 1000
    limits: RuleLimits = field(default_factory=RuleLimits)

    def __post_init__(self) -> None:
        for name, value, least in (("attempts", self.attempts, 1), ("part_size", self.part_size, 1), ("pixels", self.pixels, 0)):
            if value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        if not 0.0 <= self.verify_above < 1.0:
            raise InputError(f"verify_above is {self.verify_above}; give a confidence from 0 to below 1")
        if both := sorted(set(self.direct) & set(self.complex)):
            raise InputError(f"task {both[0]!r} is named as direct and as complex; name it once")

    def questions(self) -> Questions:
        """The prompts of this build. Raises DataError for a file of templates that cannot be used."""
        templates: dict[str, str] = {}
        if self.templates:
            try:
                templates = read_json(Path(self.templates).read_bytes())
                if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
                    raise ValueError("values that are no texts")
            except (OSError, ValueError) as error:
                raise DataError(f"{self.templates}: {error}; give a JSON object of templates by name") from error
        return Questions(templates, self.seed, self.temperature, self.max_tokens)


def begin(out: Path, config: BuildConfig) -> None:
    """Writes `build.json`, or holds the settings against the one that is there. Raises InputError where they differ."""
    out.mkdir(parents=True, exist_ok=True)
    settings = describe(config)
    if not (out / CONFIG_FILE).exists():
        write_json(out / CONFIG_FILE, settings)
        return
    there = _flat(read_build(out))
    for name, value in _flat(settings).items():
        if (old := there.get(name)) != value:
            raise InputError(
                f"{out} was begun with {name} = {old!r}, now it is {value!r}; give the old value, or another --out "
                f"with --journal {out / 'journal'}, so that no answer is paid twice"
            )


def gather_captions(out: Path, config: BuildConfig) -> Path:
    """`OUT/captions.jsonl`: the image captions that the rules use, found once (source.find_captions)."""
    file = out / CAPTIONS
    if not file.exists():
        captions = find_captions(Path(config.data), Path(config.captions) if config.captions else None)
        rows = ({"img_path": path, "caption": text} for path, text in sorted(captions.items()))
        write_text(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return file


def describe(config: BuildConfig) -> dict[str, Any]:
    """The settings as plain JSON, with digests of the files they name and the fingerprint of the data."""
    fingerprint = read_object(Path(config.data) / "meta.json").get("fingerprint")
    try:
        captions = hashlib.sha256(Path(config.captions).read_bytes()).hexdigest() if config.captions else ""
    except OSError as error:
        raise InputError(f"{config.captions}: {error.strerror or error}; give a file that can be read") from error
    about = {"name": NAME, "format": FORMAT, "prompts": config.questions().version}
    settings = asdict(config) | about | {"data_fingerprint": fingerprint, "captions_sha256": captions}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def read_build(out: Path) -> dict[str, Any]:
    """`build.json` of a folder. Raises InputError where there is none, DataError where it is broken."""
    missing = f"make it with `traceir reasoning build --out {out}`"
    return read_document(out / CONFIG_FILE, NAME, FORMAT, missing, "restore it, or build into another folder with this release")


def read_config(out: Path) -> BuildConfig:
    """The settings with which the build in `out` was begun."""
    settings = read_build(out)
    names = [name for name in BuildConfig.__dataclass_fields__ if name != "limits"]
    plain: dict[str, Any] = {
        name: tuple(settings[name]) if isinstance(settings[name], list) else settings[name] for name in names
    }
    return BuildConfig(**plain, limits=RuleLimits(**settings["limits"]))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {f"limits.{name}": value for name, value in settings["limits"].items()} | {"limits": None}
