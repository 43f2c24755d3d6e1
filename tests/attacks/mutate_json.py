"""Hostile JSON: what no config holds, what no parser expects, and what several parsers read in different ways.

Documents are ordinary ones until they are written: marks in them then become what `json.dumps` cannot write.
"""

import copy
import json
import random
import re
from typing import Any

_TWICE = "@twice"  # the end of a key that occurs twice
_MARK = re.compile(r'"@text:(?:(list|dict):)?(\d+)@"')
_DEEP = 40
_LARGE = 2**65
_DEPTHS = (50, 300, 900, 990, 5000, 100_000)

# Text that is valid JSON nowhere, only for Python, or only in form.
_TEXTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "-0.0", "1" * 400, "1" * 5000, "1e-400", "9" * 19, "1.0",
    '"\\ud800"', '"\\udcff.safetensors"', '"\\u0000"', '"\x01"', '"\\x"', '"', "", "01", "tru", "'x'", "[1,]", "-",
    "1.", "/**/1", "1 1", '{"a":1,"a":2}', '{"a":{},"a":[]}', "\ufeff1", "{", "]", "[NaN]", '"\\u001b[31m"',
)  # fmt: skip

KEYS = (
    "quantization_config", "compression_config", "quant_method", "quant_algo", "ignore", "config_groups", "group_0",
    "weights", "num_bits", "type", "group_size", "strategy", "format", "version", "text_config", "weight_map",
    "metadata", "total_size", "__metadata__", "dtype", "shape", "data_offsets", "quantization", "exclude_modules",
    "quantized_layers", "inexact", "digests", "documents", "files", "input_scales", "expert_dtype", "model_type",
    "moe_quant_algo", "input_activations", "targets", "rounded_half_blocks", "name", "kv_cache_scheme", "exact",
    "weight_block_size", "modules_to_not_convert", "", "a.b", "__class__", "\n", "\x1b[31m", "x" * 300,
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 4, 16, 32, 255, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 0.5, -0.0,
    "", " ", "0", "x", "x" * 5000, "é", "\n", "\x1b[31m", "..", ".", "/", "/dev/zero", "../src/config.json", "*", "[",
    "re:", "re:(", "re:.*", "re:(?a)(?u)", "re:a{99999999999}", "re:(x+x+)+y", "{}", "{x}", "%s",
    [], {}, [[]], [{}], [None], [0] * 1000, {"": {}}, {"a": {"quantization_config": {}}}, ["x"] * 100,
    "modelopt", "compressed-tensors", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "quark", "mxfp4", "fp8", "fp4", "float", "0.13.0", "0.13.1.a2",
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "U8", "F4", "F8_E4M3", "F8_E8M0", "BF16",
    [16], [0], [0, 0], [0, 16], [2**62, 4], [2**32, 2**32], [-1, 1], [1.0], ["1"], [True], {"quant_algo": "NVFP4"},
)  # fmt: skip


def nested(depth: int, opening: str, inner: str = "") -> str:
    """Brackets inside of brackets."""
    closing = "]" if opening.endswith("[") else "}"
    return opening * depth + (inner or ("1" if opening.endswith(":") else "")) + closing * depth


def parse(data: bytes | str) -> Any:
    """A document that may be changed further.

    Raises:
        ValueError: it is no JSON, or nested so deeply that the parser's answer depends on who calls it.
    """
    text = data if isinstance(data, str) else data.decode()
    if "[" * _DEEP in text or '{"a":' * _DEEP in text:
        raise ValueError("nested too deeply")
    return json.loads(text)


def write(document: Any) -> str:
    """The document's text, in which the marks have become what they stand for."""
    text = json.dumps(document)
    return _MARK.sub(_text_of, text.replace(f'{_TWICE}"', '"')) if "@" in text else text


def _text_of(mark: re.Match[str]) -> str:
    """What a mark stands for: one of `_TEXTS` by its number, or brackets to some depth."""
    kind, number = mark.groups()
    if not kind:
        return _TEXTS[int(number)]
    return nested(int(number), "[" if kind == "list" else '{"a":')


def hostile(rng: random.Random) -> Any:
    """A value that is wrong nearly everywhere."""
    way = rng.random()
    if way < 0.7:
        return copy.deepcopy(rng.choice(VALUES))  # it may be changed further
    if way < 0.9:
        return f"@text:{rng.randrange(len(_TEXTS))}@"
    if way < 0.95:
        return f"@text:{rng.choice(('list', 'dict'))}:{rng.choice(_DEPTHS)}@"
    return "re:" + "".join(rng.choice("ab.*+?()[]{}|\\w^$,1") for _ in range(rng.randrange(1, 12)))


def change(rng: random.Random, document: Any) -> Any:
    """Change a document in one place; returns it, or what takes its place."""
    place = _place(rng, document)
    if place is None or rng.random() < 0.01:
        return hostile(rng)
    here, key = place
    way = rng.choice(_WAYS)
    if isinstance(here, list):
        _change_list(rng, here, key, way)
    else:
        _change_object(rng, here, key, way)
    return document


_WAYS = ("replace", "replace", "replace", "tweak", "tweak", "delete", "insert", "rename", "twice", "wrap", "copy")


def _place(rng: random.Random, document: Any) -> tuple[Any, Any] | None:
    """(list or object, index or key) of some value."""
    here = document
    while isinstance(here, (dict, list)) and here:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        if not isinstance(here[key], (dict, list)) or not here[key] or rng.random() < 0.2:
            return here, key
        here = here[key]
    return None


def _change_list(rng: random.Random, here: list[Any], at: int, way: str) -> None:
    if way == "delete":
        del here[at]
    elif way in ("insert", "rename"):
        here.insert(at, hostile(rng))
    elif way in ("twice", "copy"):
        here.insert(at, here[rng.randrange(len(here))])
    else:
        here[at] = _instead(rng, here[at], way)


def _change_object(rng: random.Random, here: dict[str, Any], key: str, way: str) -> None:
    if way == "delete":
        del here[key]
    elif way == "insert":
        here[rng.choice(KEYS)] = hostile(rng)
    elif way == "rename":
        here[rng.choice(KEYS) if rng.random() < 0.5 else str(_tweak(rng, key))] = here.pop(key)
    elif way == "twice":
        here[key + _TWICE] = here[key] if rng.random() < 0.5 else hostile(rng)
    elif way == "copy":
        here[rng.choice(list(here))] = here[key]
    else:
        here[key] = _instead(rng, here[key], way)


def _instead(rng: random.Random, value: Any, way: str) -> Any:
    if way == "tweak":
        return _tweak(rng, value)
    if way == "wrap":
        return [value] if rng.random() < 0.5 else {rng.choice(KEYS): value}
    return hostile(rng)


def _tweak(rng: random.Random, value: Any) -> Any:
    """A value that is only just wrong."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        if abs(value) > _LARGE:
            return str(value)
        return rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), value + 2**32, [value]))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        tweaks = (value[:at], value + "x", value[:at] + "\0" + value[at:], value.upper(), value[at:], value * 2)
        return rng.choice(tweaks)
    return hostile(rng)
