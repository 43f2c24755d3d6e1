"""What engines that we cannot run ask of a checkpoint: what they read, as checks of ours.

Versions: SGLang 0.5.23 (the wheel of PyPI), vLLM 0.33.0 (the same). TensorRT-LLM's wheels are not on PyPI: its rules
are from copies of its repository; with the commit where it is known, and the function in the place of lines.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.directory import open_checkpoint

PLAIN = ("BF16", "F16", "F32")
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass
class Written:
    """A checkpoint as loaders see it; the tests change copies of it.

    Attributes:
        tensors: name -> (dtype, shape).
        scalars: the values of tensors with one element.
        config: config.json.
        beside: hf_quant_config.json, if there is one.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    scalars: dict[str, float]
    config: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Written":
        found = open_checkpoint(path).tensors
        scalars = {}
        for name, tensor in found.items():
            if tensor.dtype == "F32" and tensor.nbytes == 4:
                with File(tensor.path) as file:
                    scalars[name] = float(file.read(tensor.start, 4).view(np.float32)[0])
        beside = path / "hf_quant_config.json"
        return cls(
            {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()},
            scalars,
            json.loads((path / "config.json").read_text()),
            json.loads(beside.read_text()) if beside.exists() else {},
        )

    @property
    def section(self) -> dict[str, Any]:
        """The quantization_config, nested or not."""
        return self.config.get("quantization_config") or self.config["text_config"]["quantization_config"]

    def modules(self, suffix: str) -> list[str]:
        """Modules that have a tensor with this suffix."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    @property
    def cast(self) -> list[str]:
        return self.modules(".weight_scale_2") + self.modules(".weight_global_scale")

    @property
    def linear(self) -> list[str]:
        """Modules with a plain weight matrix, but for embeddings."""
        found = [(name, *self.tensors[f"{name}.weight"]) for name in self.modules(".weight")]
        return [name for name, dtype, shape in found if dtype in PLAIN and len(shape) == 2 and "embed" not in name]


class Rule(NamedTuple):
    """One thing that a loader asks for.

    Attributes:
        engine: whose.
        about: the kinds of miniatures, layouts and activations that it holds for.
        where: the file and the lines, or the function.
        faults: yields what is wrong with a checkpoint.
        spoil: breaks a checkpoint so that it is seen.
    """

    engine: str
    about: tuple[str, ...]
    where: str
    faults: Callable[[Written], Iterator[str]]
    spoil: Callable[[Written], object]


def has(written: Written, name: str, dtype: str, shape: tuple[int, ...] | None) -> Iterator[str]:
    """Yield a fault unless the tensor is there, with this dtype and shape; None stands for one element."""
    actual = written.tensors.get(name)
    if actual is None:
        yield f"{name} is missing"
    elif actual[0] != dtype or (actual[1] != shape if shape is not None else actual[1] not in ((), (1,))):
        yield f"{name} is {actual}, expected {dtype} {shape}"


def banks(written: Written) -> Iterator[tuple[str, int, int, int]]:
    """(name, E, N, K) of every bank of experts, by the biases, which have no direction."""
    hidden = written.config["hidden_size"]
    for bias in (name for name in written.tensors if name.endswith("_proj_bias")):
        experts, rows = written.tensors[bias][1]
        inner = hidden if "gate_up" in bias else written.config["intermediate_size"]
        yield bias.removesuffix("_bias"), experts, rows, inner


def projections(written: Written, names: tuple[str, str, str, str], w4a4: bool) -> Iterator[str]:
    """The four tensors of every cast projection: [N, K/2] codes, [N, K/16] scales, one scalar each."""
    codes, scales, tensor_scale, input_scale = names
    for module in written.cast:
        _, (rows, half) = written.tensors.get(module + codes, ("", (0, 0)))
        if half % 8 or not half:
            yield f"{module}: K is {2 * half}, expected a multiple of 16"
        yield from has(written, module + codes, "U8", (rows, half))
        yield from has(written, module + scales, "F8_E4M3", (rows, half // 8))
        yield from has(written, module + tensor_scale, "F32", None)
        if w4a4:
            yield from has(written, module + input_scale, "F32", None)


def merged_alike(written: Written, *suffixes: str) -> Iterator[str]:
    """Projections that become one matrix have equal scales."""
    for module in written.cast:
        parent, _, leaf = module.rpartition(".")
        for group in (group for group in MERGED if leaf == group[0]):
            for suffix in suffixes:
                values = {written.scalars.get(f"{parent}.{member}{suffix}") for member in group}
                if len(values) > 1:
                    yield f"{parent}: {'+'.join(group)}{suffix} are {values}"


def says(where: object, **expected: object) -> Iterator[str]:
    """Keys of a config have these values."""
    for key, value in expected.items():
        found = where.get(key) if isinstance(where, dict) else None
        if found != value:
            yield f"{key} is {found!r}, expected {value!r}"


def exclusions(written: Written, excluded: Callable[[str, list[str]], bool], entries: list[str]) -> Iterator[str]:
    """What stays is excluded, and what is cast is not."""
    for module in written.linear:
        if not excluded(module, entries):
            yield f"{module} would be quantized"
    for module in written.cast:
        if excluded(module, entries):
            yield f"{module} would not be quantized"


def trt_excludes_since_2026(name: str, entries: list[str]) -> bool:
    """TensorRT-LLM: wildcards, regular expressions after `re:`, and all below an entry."""
    while True:
        for entry in entries:
            if entry.startswith("re:"):
                hit = re.fullmatch(entry[3:], name)
            else:
                hit = fnmatch.fnmatchcase(name, entry) or (
                    entry.endswith(".*") and fnmatch.fnmatchcase(name, entry[:-2])
                )
            if hit:
                return True
        if "." not in name:
            return False
        name = name.rpartition(".")[0]


def trt_excludes(name: str, entries: list[str]) -> bool:
    """TensorRT-LLM before: wildcards for the whole name."""
    return any(fnmatch.fnmatchcase(name, entry) for entry in entries)


def sglang_excludes(name: str, entries: list[str]) -> bool:
    """SGLang: a star stands for anything, in the whole name or in one of its parts."""
    patterns = [re.compile(entry.replace(".", r"\.").replace("*", ".*")) for entry in entries]
    return any(pattern.fullmatch(part) for pattern in patterns for part in (name, *name.split(".")))


def sglang_algorithm(name: str, layers: dict[str, Any]) -> str | None:
    """SGLang's look-up in `quantized_layers`: the module, then anything below it; under three spellings."""
    names = [name]
    if name.startswith("language_model.model."):
        names.append("model.language_model." + name.removeprefix("language_model.model."))
    elif name.startswith("model."):
        names.append("model.language_model." + name.removeprefix("model."))
    for each in names:
        if each in layers:
            return str(layers[each]["quant_algo"])
    below = (info for each in names for key, info in layers.items() if key.startswith(f"{each}."))
    return next((str(info["quant_algo"]) for info in below), None)
