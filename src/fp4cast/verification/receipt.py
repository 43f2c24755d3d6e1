"""fp4cast.json, the receipt of a conversion: what its writer and its readers agree on.

Conversion writes it; verification takes from it only what the source cannot tell: which tensors were rounded on
purpose, the digest of input scales, and the checksums of all files. Everything else that it says is compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fp4cast._version import __version__
from fp4cast.checkpoints.byte_ranges import CHUNK_BYTES, Files
from fp4cast.checkpoints.checksums import Checksum
from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.json_files import json_bytes, read_json
from fp4cast.checkpoints.origin import UNKNOWN, Origin
from fp4cast.errors import CheckpointError
from fp4cast.layouts.layout import Form, Names
from fp4cast.verification.original import Original
from fp4cast.verification.report import Report


@dataclass(frozen=True)
class Receipt:
    """What a destination says about its own making; every field is empty if there is no receipt.

    Attributes:
        facts: the report's figures that do not depend on time, place or speed; for people and scripts.
        rounded: half-blocks that were rounded on purpose, by module.
        digests: digests of those modules' tensors.
        input_scales: digest of all input scales; None where there are none.
        kv_scales: digest of all scales of the KV cache; None where it is not quantized.
        files: the checksum of every file of the destination but the receipt, by its path there.
        quantized: the modules that `ptq` quantized from values; no casts, so that the source does not determine them.
        intact: its digest of itself holds.
        found: there is a receipt.
        problem: why the one that is there cannot be read; empty if it can.
        version: the fp4cast that wrote the weights.
        original: what it keeps of the MXFP4 checkpoint, for the way back.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    rounded: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    input_scales: str | None = None
    files: Mapping[str, Checksum] = field(default_factory=dict)
    quantized: frozenset[str] = frozenset()
    intact: bool = True
    found: bool = True
    problem: str = ""
    kv_scales: str | None = None
    version: str = __version__
    original: Original = field(default_factory=Original)

    @classmethod
    def of(
        cls,
        report: Report,
        *,
        digests: Mapping[str, str],
        input_scales: str | None,
        kv_scales: str | None,
        files: Mapping[str, Checksum],
        source: Origin = UNKNOWN,
        original: Original = Original(),  # noqa: B008, it is frozen
    ) -> Receipt:
        """The receipt of a conversion.

        Args:
            report: the conversion's.
            digests: by module, the digest of every tensor in `report.inexact`.
            input_scales: digest of all input scales, for W4A4.
            kv_scales: digest of all scales of a quantized KV cache.
            files: the checksum of every file.
            source: the source's id and revision on the Hub, as far as they are known.
            original: what the way back needs of the source.
        """
        known = {"source": source.to_json()} if source.id else {}
        facts = known | {
            key: value for key, value in report.facts().items() if key != "marlin_exact"
        }  # verify measures that
        rounded = {tensor.name: tensor.rounded_half_blocks for tensor in report.inexact}
        return cls(facts, rounded, digests, input_scales, files, kv_scales=kv_scales, original=original)

    @classmethod
    def read(cls, directory: Path) -> Receipt:
        """Read a directory's receipt. It is untrusted: entries that no receipt has are left out."""
        path = directory / RECEIPT
        try:
            found = path.exists() or path.is_symlink()
            document = read_json(path) if found else {}
        except (OSError, CheckpointError) as error:
            return cls(intact=False, problem=str(error)[:500])
        inexact = document.get("inexact")
        entries = [entry for entry in inexact if isinstance(entry, dict)] if isinstance(inexact, list) else []
        rounded = {str(entry.get("name")): entry.get("rounded_half_blocks") for entry in entries}
        scales, cached = document.get("input_scales"), document.get("kv_scales")
        return cls(
            facts={key: value for key, value in document.items() if key not in _OWN},
            rounded={name: count for name, count in rounded.items() if isinstance(count, int)},
            digests=_texts(document.get("digests")),
            input_scales=None if scales is None else str(scales),
            kv_scales=None if cached is None else str(cached),
            files=_checksums(document.get("files")),
            quantized=_names(document.get("quantized")),
            intact=is_sealed(document) or not found,
            found=found,
            version=str(document.get("fp4cast")),
            original=Original.read(document.get("original")),
        )

    def to_bytes(self) -> bytes:
        """The file's content; the same on every run."""
        document: dict[str, Any] = {"fp4cast": self.version, **self.facts, "digests": dict(self.digests)}
        if self.input_scales is not None:
            document["input_scales"] = self.input_scales
        if self.kv_scales is not None:
            document["kv_scales"] = self.kv_scales
        if self.original != Original():
            document["original"] = self.original.to_json()
        if self.quantized:
            document["quantized"] = sorted(self.quantized)
        document["files"] = {name: self.files[name]._asdict() for name in sorted(self.files)}
        return json_bytes(sealed(document))

    def disagreements(self, measured: Mapping[str, Any]) -> Iterator[str]:
        """Sentences about facts that differ from those of a report, as measured."""
        for key, value in measured.items():
            said = self.facts.get(key, value)  # an export's receipt says less than a conversion's
            if not (_alike(said, value) if key in ("inexact", "fp8") else said == value):
                yield f"says {key} is {str(said)[:200]}, measured {str(value)[:200]}"


# Keys of the receipt that are no facts.
_OWN = {"fp4cast", "digests", "input_scales", "kv_scales", "files", "quantized", "original", "digest"}


def _alike(said: object, measured: list[dict[str, Any]]) -> bool:
    """Whether lists of inexact tensors agree; sums of errors may differ in their last digits."""
    if not isinstance(said, list) or len(said) != len(measured):
        return False
    table = {each.get("name"): each for each in said if isinstance(each, dict)}
    return all(_alike_tensor(table.get(each["name"]), each) for each in measured)


def _alike_tensor(said: Mapping[str, Any] | None, measured: Mapping[str, Any]) -> bool:
    if said is None or said.keys() != measured.keys():
        return False
    for key, value in measured.items():
        if not isinstance(value, float) or not isinstance(said[key], float):
            if said[key] != value:
                return False
        elif not math.isclose(said[key], value, rel_tol=1e-6, abs_tol=1e-30):
            return False
    return True


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object and a digest of it, under the key "digest"."""
    return {**document, "digest": _digest_of(document)}


def is_sealed(document: Mapping[str, Any]) -> bool:
    """Whether an object still is what was sealed: damage is found, forgery is not."""
    rest = dict(document)
    said = rest.pop("digest", None)
    try:
        return isinstance(said, str) and said == _digest_of(rest)
    except RecursionError:
        return False


def _digest_of(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _checksums(value: object) -> dict[str, Checksum]:
    """The checksums of files inside of the directory; a path that leads out is nobody's."""
    entries = value.items() if isinstance(value, dict) else ()
    return {
        name: Checksum(entry["bytes"], entry["xxh3"])
        for name, entry in entries
        if _is_inside(name) and isinstance(entry, dict) and _is_checksum(entry.get("bytes"), entry.get("xxh3"))
    }


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and 0 < len(name) <= _MAX_PATH


def _is_checksum(nbytes: object, xxh3: object) -> bool:
    return type(nbytes) is int and 0 <= nbytes < 1 << 63 and isinstance(xxh3, str) and len(xxh3) == _DIGITS


_MAX_PATH = 4096  # characters
_DIGITS = 32  # hexadecimal ones of 128 bits


def _texts(value: object) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}


def _names(value: object) -> frozenset[str]:
    return frozenset(map(str, value)) if isinstance(value, list) else frozenset()


def digest(tensors: Iterable[Tensor]) -> str:
    """BLAKE2b of the bytes of some tensors."""
    state = hashlib.blake2b(digest_size=16)
    with Files() as files:
        for tensor in tensors:
            for start in range(0, tensor.nbytes, CHUNK_BYTES):
                chunk = files[tensor.path].read(tensor.start + start, min(CHUNK_BYTES, tensor.nbytes - start))
                state.update(chunk.data)
    return state.hexdigest()


def weight_digest(names: Names, tensors: Mapping[str, Tensor]) -> str:
    """The digest of a weight, by which a rounded one is recognised: the source does not determine it."""
    return digest(tensors[name] for name in (names.codes, names.block_scale, names.tensor_scale))


def input_scales_digest(form: Form, modules: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """The digest of some modules' input scales, in the order of their names."""
    return digest(tensors[form.names(module).input_scale] for module in sorted(modules))
