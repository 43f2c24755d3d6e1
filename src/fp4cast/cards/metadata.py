"""A card's metadata, in the Hub's conventions: written, and read from the source's card with huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4cast.cards.subject import Subject
from fp4cast.families.served import command_of

_READ_BYTES = 1 << 16  # of a card: metadata take a few kilobytes, and parsing a megabyte takes seconds
_LONGEST = 200  # characters of a value
_PIPELINES = (("ForCausalLM", "text-generation"), ("ForConditionalGeneration", "image-text-to-text"))
_LICENCE = {
    "license": re.compile(r"[a-z0-9.+-]+"),
    "license_name": re.compile(r"[\w.+ -]+", re.ASCII),
    "license_link": re.compile(r"https?://[\w./?=&%#~+:-]+|[\w.-]+", re.ASCII),
}
_LICENCE_FILE = re.compile(r"(?:LICEN[SC]E|COPYING)(?:[._-][A-Za-z0-9._-]+)?", re.IGNORECASE)


def read_metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of somebody's card; nothing where it has none, or none that can be read. Values may be anything."""
    if not path.is_file() or path.is_symlink():
        return {}
    with path.open("rb") as file:
        return _parsed(file.read(_READ_BYTES).decode(errors="replace"))


def _parsed(card: str) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not REGEX_YAML_BLOCK.search(card):
        return {}
    try:
        return vars(ModelCard(card, ignore_metadata_errors=True).data)
    except Exception:  # whatever a stranger's YAML makes of it, a card is no reason to refuse a model
        return {}


def metadata(subject: Subject) -> dict[str, Any]:
    """The metadata of the new card; what nobody says is left out."""
    source = subject.card
    report, origin = subject.report, subject.origin
    base = [origin.id] if origin.id else _base(source)
    engines = [row.engine.partition(" + ")[0].lower() for row in subject.serving if command_of(row, "")]
    tags = ["nvfp4", "fp4", "quantized", report.activations, report.layout, report.family, *engines, "fp4cast"]
    values = {
        **licence(subject),
        "base_model": base[0] if len(base) == 1 else base or None,
        "base_model_relation": "quantized" if base else None,
        "library_name": _word(source.get("library_name")) or "transformers",
        "pipeline_tag": _word(source.get("pipeline_tag")) or _pipeline(subject.source.checkpoint.config),
        "language": [word for word in _words(source.get("language")) if re.fullmatch("[a-z]{2,3}", word)] or None,
        "tags": list(dict.fromkeys(tags)),
    }
    return {key: value for key, value in values.items() if value is not None}


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML block that begins a card, as huggingface_hub's ModelCardData has it, without loading that."""
    import yaml

    return f"---\n{yaml.dump(dict(values), sort_keys=False, allow_unicode=True).strip()}\n---\n"


def licence(subject: Subject) -> dict[str, str]:
    """The licence that the source's card names, else that there is a file of one; nothing is guessed from its text."""
    said = {key: text for key, form in _LICENCE.items() if form.fullmatch(text := _text(subject.card.get(key)))}
    if "license" in said:
        return said
    files = licence_files(subject)
    return {"license": "other", "license_link": files[0]} if files else {}


def licence_files(subject: Subject) -> list[str]:
    """The source's licence files, which lie beside the card."""
    return sorted(name for name in subject.files if _LICENCE_FILE.fullmatch(name))


def _base(source: Mapping[str, Any]) -> list[str]:
    """What the source's card calls its base, if it says that it is a quantization of it: so is the destination."""
    if source.get("base_model_relation") != "quantized":
        return []
    return [word for word in _words(source.get("base_model")) if re.fullmatch(r"[\w.-]+/[\w.-]+", word, re.ASCII)]


def _pipeline(config: Mapping[str, Any]) -> str | None:
    architectures = _words(config.get("architectures"))
    return next((tag for end, tag in _PIPELINES if any(name.endswith(end) for name in architectures)), None)


def _words(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for each in values[:20] if (text := _text(each))]


def _word(value: object) -> str | None:
    text = _text(value)
    return text if re.fullmatch(r"[\w.-]+(?: [\w.-]+)*", text, re.ASCII) else None


def _text(value: object) -> str:
    """A value that is a short, printable text; empty for any other."""
    return value if isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable() else ""
