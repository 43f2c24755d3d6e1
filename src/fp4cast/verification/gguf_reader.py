"""GGUF files as the `gguf` package reads them: tensors, the values of blocks, and tensor scales beside them."""

from __future__ import annotations

import shlex
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast.checkpoints.gguf_file import read_header
from fp4cast.errors import CheckpointError
from fp4cast.extras import require
from fp4cast.formats import Bytes, Float64s, usable_scale
from fp4cast.layouts.gguf import LLAMA_CPP, scale_name
from fp4cast.verification.report import Difference, Report
from fp4cast.verification.unscaled_report import unscaled_report

BLOCKS = 1 << 14  # MXFP4 blocks compared together: 40 MB of what the package makes of them


def read_gguf(path: Path) -> Any:
    """The package's reader of a file, which has been checked before: the package trusts what it reads.

    Raises:
        CheckpointError: it cannot be read.
        MissingExtraError: the package is not installed.
    """
    read_header(path)
    try:
        return _reader_class()(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path}: the gguf package cannot read it: {error}") from error


@cache
def _reader_class() -> Any:
    """The package's reader, but with each array of the metadata in one part.

    The package makes an object of every word of a vocabulary: for one as large as gpt-oss's, 13 seconds and 1 GB.
    """
    package = require("gguf", "gguf")

    def parts(self: Any, start: int, kind: int) -> Any:
        if kind != package.GGUFValueType.ARRAY:
            return package.GGUFReader._get_field_parts(self, start, kind)
        size, of = _array_size(memoryview(self.data), start, package)
        return size, [self.data[start : start + size]], [0], [package.GGUFValueType.ARRAY, of]

    return type("Reader", (package.GGUFReader,), {"_get_field_parts": parts})


def _array_size(data: memoryview, start: int, package: Any) -> tuple[int, Any]:
    """(bytes, type of the elements) of an array of the metadata that begins at `start`."""
    kind, count = struct.unpack_from("<IQ", data, start)
    at, of = start + 12, package.GGUFValueType(kind)
    if of != package.GGUFValueType.STRING:
        return 12 + count * np.dtype(package.GGUFReader.gguf_scalar_to_np[of]).itemsize, of
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at - start, of


def architecture_of(reader: Any) -> str:
    """What llama.cpp calls the kind of model; empty where the file does not say it."""
    entry = reader.get_field("general.architecture")
    return str(entry.contents()) if entry is not None else ""


def gguf_values(data: Bytes, tensor: Any) -> Float64s:
    """The values of whole blocks, uint8 [n], of a tensor's type: float64 [weights]."""
    return dequantized(data, tensor.tensor_type)


def dequantized(data: Bytes, kind: Any) -> Float64s:
    """The values of whole blocks, uint8 of any shape, of one of the package's types: float64 [weights]."""
    with np.errstate(over="ignore", invalid="ignore"):  # what exceeds FP32 becomes infinite, and is found then
        values = require("gguf", "gguf").quants.dequantize(data.reshape(1, -1), kind)
    return np.asarray(values, np.float64).reshape(-1)


def gguf_codes(data: Bytes, tensor: Any) -> Bytes:
    """The codes of whole blocks of type 39 or 40 in the order of their weights: uint8 [half-blocks, 16].

    A byte holds two codes that lie half a group apart: a group has 32 weights in type 39, and 16 in type 40.
    """
    size, scales, width = (17, 1, 16) if tensor.tensor_type.name == "MXFP4" else (36, 4, 8)
    packed = data.reshape(-1, size)[:, scales:].reshape(-1, width)
    return np.concatenate([packed & 15, packed >> 4], axis=1).reshape(-1, 16)


def find_scales(
    architecture: str, tensor: Any, tensors: Mapping[str, Any]
) -> tuple[str | None, Float64s, list[Difference]]:
    """(name, values, what is wrong) of the tensor scales of a weight: one, or one for each expert.

    Args:
        architecture: the model's.
        tensor: the weight.
        tensors: where its scales may be, by name.
    """
    dimensions = [int(size) for size in tensor.shape]
    name = scale_name(architecture, str(tensor.name), len(dimensions))
    if name is None or name not in tensors:
        return None, np.ones(1), []
    scale, count = tensors[name], dimensions[2] if len(dimensions) == 3 else 1
    if scale.tensor_type.name != "F32" or scale.shape.tolist() != [count]:
        found = f"{scale.tensor_type.name} {scale.shape.tolist()}, expected F32 [{count}]"
        return name, np.ones(1), [Difference(name, "shape", found)]
    values = np.asarray(scale.data, np.float64)
    if not all(usable_scale(float(value)) for value in values):
        return name, np.ones(1), [Difference(name, "scale", "holds a scale that is no positive normal number")]
    return name, values, []


def unknown_tensor(name: str) -> Difference:
    """The difference for a tensor that nobody reads."""
    return Difference(name, "unexpected", f"is not in the source, and no tensor scale that {LLAMA_CPP} applies")


def gguf_report(source: str, destination: str, *, family: str = "gguf", **figures: Any) -> Report:
    """The report on a GGUF file; `figures` are arguments of `unscaled_report`."""
    serve = f"llama-server -m {shlex.quote(destination)}"
    served = f"{LLAMA_CPP} (run, on a CPU)"
    return unscaled_report(source, destination, family=family, layout="gguf", served=served, serve=serve, **figures)
