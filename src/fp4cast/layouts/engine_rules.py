"""What must every key of a checkpoint's documents say, so that engines load what the files hold?

The rules are stated here a second time, without the layouts' files, which write the documents: verification must not
share their mistakes. They hold without a receipt, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG
from fp4cast.checkpoints.quantization_config import find_quantization_config, misplaced_quantization_configs
from fp4cast.errors import CheckpointError
from fp4cast.families.family import Family
from fp4cast.formats import MX_BLOCK, NV_BLOCK
from fp4cast.layouts.engine_view import Claims, ancestors
from fp4cast.layouts.fp8_rules import ALGORITHM, fp8_sentences
from fp4cast.layouts.patterns import PatternError, names_and_wildcards, spellings

Section = Mapping[str, Any]
_TOP = ("quantization_config",)
_ARGS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NV_BLOCK}
_KV_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_SPEC = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NV_BLOCK, "symmetric": True}


class Fault(NamedTuple):
    """A document, and what is wrong with it: actual and expected."""

    file: str
    detail: str


@dataclass(frozen=True)
class Held:
    """What the documents describe.

    Attributes:
        family: the source's.
        source: the source's config.json.
        cast: the modules that are NVFP4.
        plain: the modules whose weight matrices are not quantized.
        others: the other modules with weight matrices.
        fp8: by module, the shape of the weights that were quantized to FP8.
    """

    family: Family
    source: Section
    cast: Sequence[str]
    plain: Sequence[str]
    others: Sequence[str]
    fp8: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class _Text:
    """Stands for any text: nothing reads it."""


class _Names:
    """Stands for a list of names, which is judged by what it means."""


class _Kept(NamedTuple):
    """A value of the source that stays, whatever it is."""

    value: object


def rule_faults(config: Section, beside: Section | None, claims: Claims, held: Held) -> Iterator[Fault]:
    """Everything in which the documents do not say what they must.

    Args:
        config: config.json.
        beside: hf_quant_config.json, or None where there is none.
        claims: config.json's.
        held: what they describe.

    Raises:
        CheckpointError: the wildcards of `ignore` take too long to match.
    """
    yield from (Fault(CONFIG, sentence) for sentence in misplaced_quantization_configs(config))
    path, section = find_quantization_config(config)
    old = find_quantization_config(held.source)
    fp8 = bool(held.family.beside_fp8) and old.section.get("quant_method") == "fp8"
    place = old.path or _TOP if fp8 or claims.layout == "compressed-tensors" else _TOP
    if path != place:
        yield Fault(CONFIG, f"the quantization is described in {'.'.join(path)}, expected {'.'.join(place)}")
    if claims.layout == "compressed-tensors":
        yield from (Fault(CONFIG, sentence) for sentence in _compressed_tensors(section, old.section, claims, held))
        if beside is not None:
            yield Fault(QUANT_CONFIG, "is there, but belongs to another layout; expected none")
    elif beside is None:
        yield Fault(QUANT_CONFIG, "is missing")
    else:
        stays = {key: _Kept(value) for key, value in old.section.items() if key not in held.family.drops}
        kept = stays if fp8 else {}
        yield from _modelopt(section, beside, claims, held, kept)


def _modelopt(
    section: Section, beside: Section, claims: Claims, held: Held, fp8: Mapping[str, object]
) -> Iterator[Fault]:
    """The rules of ModelOpt's layout; `fp8` holds the keys of an FP8 checkpoint with NVFP4 experts."""
    algorithm = "NVFP4" if claims.activations == "w4a4" else "W4A16_NVFP4"
    layers = None if claims.layers is None else sorted(claims.layers)
    inputs = {"input_activations": _ARGS} if claims.activations == "w4a4" else {}
    groups: dict[str, object] = {
        "group_0": {"weights": _ARGS, "targets": ["Linear"] if layers is None else layers, **inputs}
    }
    blocks = {name: {"quant_algo": ALGORITHM} for name in sorted(claims.fp8)}
    if blocks:
        groups["group_1"] = {"quant_algo": ALGORITHM, "targets": list(blocks)}
    said: dict[str, object] = {
        **fp8,
        "config_groups": groups,
        "quant_algo": algorithm if layers is None else "MIXED_PRECISION",
        "quant_method": "fp8" if fp8 else "modelopt" if layers is None else "modelopt_mixed",
        "group_size": NV_BLOCK,
        "ignore": _Names if layers is None else list(held.family.beside_fp8) if fp8 else [],
        "producer": {"name": "fp4cast", "version": _Text},
    }
    if held.family.bank:
        del said["group_size"]  # as in ModelOpt's own export
    if fp8:
        said["moe_quant_algo"] = "NVFP4"
    cached = claims.kv_cache and held.family.kv_cache
    if cached:
        said["kv_cache_scheme"] = _KV_CACHE
    listed = {}
    if layers is not None:
        entry = {"quant_algo": algorithm, "group_size": NV_BLOCK}
        listed = {"quantized_layers": {**dict.fromkeys(layers, entry), **blocks}}
    yield from (Fault(CONFIG, sentence) for sentence in _compare("quantization_config", section, {**said, **listed}))
    sentences = _layers(claims.layers, held) if claims.layers is not None else _exceptions(claims, held)
    yield from (Fault(CONFIG, sentence) for sentence in sentences)
    whole = [*held.cast, *held.plain, *held.others, *held.fp8]
    yield from (Fault(CONFIG, sentence) for sentence in fp8_sentences(claims.fp8, held.family, held.fp8, whole))
    twin = {
        "quant_algo": said["quant_algo"],
        "kv_cache_quant_algo": "FP8" if cached else None,
        "group_size": NV_BLOCK,
        "exclude_modules": _Kept(section.get("ignore")),
        **listed,
    }
    expected = {"producer": _Kept(section.get("producer")), "quantization": twin}
    yield from (Fault(QUANT_CONFIG, sentence) for sentence in _compare("", beside, expected))


def _layers(layers: Iterable[str], held: Held) -> Iterator[str]:
    """Judge `quantized_layers`: what holds cast modules, under every name by which an engine may look it up."""
    listed, holding = set(layers), set[str]()
    for module in held.cast:
        for name in ancestors(module):
            if name in holding:
                break
            holding.add(name)
    expected = {name for layer in listed & holding for name in spellings(layer, held.family.aliases)}
    for name in sorted(expected - listed):
        yield f"quantized_layers lacks {name}, by which an engine may look up what was cast"
    for name in sorted(listed - expected):
        yield f"quantized_layers lists {name[:200]}, under which nothing was cast"


def _exceptions(claims: Claims, held: Held) -> Iterator[str]:
    """Judge a flat `ignore`: every module that was not cast, by its name or a wildcard, and nothing else."""
    kept = [*held.plain, *held.others]
    try:
        named, idle = names_and_wildcards(claims.ignore, kept)
    except PatternError as error:
        raise CheckpointError(f"{claims.path}: {error}") from error
    for module in sorted(set(kept) - named):
        yield f"`ignore` lacks {module}, which was not cast"
    for entry in sorted(idle):
        yield f"`ignore` names {entry[:200]}, which is no module that was not cast"


def _compressed_tensors(section: Section, old: Section, claims: Claims, held: Held) -> Iterator[str]:
    """The source's own section, with NVFP4 in the place of MXFP4."""
    groups = old.get("config_groups")
    groups = groups if isinstance(groups, dict) and groups else {"group_0": {"targets": ["Linear"]}}
    mixed = old.get("format") == "mixed-precision"
    expected = {name: _group(group, claims) for name, group in groups.items()}
    said = {
        **{key: _Kept(value) for key, value in old.items()},
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if mixed else "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": expected,
        "ignore": _Names,
    }
    if claims.kv_cache and old.get("kv_cache_scheme") is None:
        said["kv_cache_scheme"] = {**_KV_CACHE, "strategy": "tensor", "symmetric": True}
    yield from _compare("quantization_config", section, said)
    if not any(isinstance(group, dict) for group in expected.values()):
        yield f"config_groups has no group of MXFP4 in the source ({_short(groups)}), expected one that becomes NVFP4"
    ignore = section.get("ignore")
    entries = {entry for entry in ignore if isinstance(entry, str)} if isinstance(ignore, list) else set()
    theirs = old.get("ignore")
    asked = {entry for entry in theirs if isinstance(entry, str)} if isinstance(theirs, list) else set()
    for entry in sorted((asked | set(held.plain)) - entries):
        yield f"`ignore` lacks {entry[:200]}, which the source ignores or which was not cast"
    for entry in sorted(entries - asked - set(held.plain)):
        yield f"`ignore` names {entry[:200]}, which the source does not ignore and which is no module that was not cast"


def _group(group: object, claims: Claims) -> object:
    """What one of the source's groups must have become: an object if it was MXFP4's."""
    if not isinstance(group, dict):
        return _Kept(group)
    weights = group.get("weights")
    mxfp4 = {"num_bits": 4, "type": "float", "group_size": MX_BLOCK}
    if weights and not (isinstance(weights, dict) and all(weights.get(k, v) == v for k, v in mxfp4.items())):
        return _Kept(group)
    said = {key: _Kept(value) for key, value in group.items()}
    inputs = {**_SPEC, "dynamic": "local"} if claims.activations == "w4a4" else None
    said_format = {"format": "nvfp4-pack-quantized"} if "format" in group else {}
    return {**said, "weights": {**_SPEC, "dynamic": False}, "input_activations": inputs, **said_format}


def _compare(at: str, actual: object, expected: object) -> Iterator[str]:
    """Sentences about every key that says something else, that is missing, or that no engine knows."""
    where = at or "the document"
    if isinstance(expected, _Kept):
        if actual != expected.value:
            yield f"{where} is {_short(actual)}, expected {_short(expected.value)}"
    elif expected is _Text or expected is _Names:
        strings = [actual] if expected is _Text else actual
        if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings):
            yield f"{where} is {_short(actual)}, expected {'text' if expected is _Text else 'a list of names'}"
    elif isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted(expected.keys() - actual.keys()):
            yield f"{where} lacks {key[:200]!r}"
        for key in sorted(actual.keys() - expected.keys()):
            yield f"{where} has {key[:200]!r}, which does not belong there"
        for key in expected:
            if key in actual:
                yield from _compare(f"{at}.{key}" if at else key, actual[key], expected[key])
    elif type(actual) is not type(expected) or actual != expected:
        yield f"{where} is {_short(actual)}, expected {_short(expected)}"


def _short(value: object) -> str:
    return repr(value)[:200]
