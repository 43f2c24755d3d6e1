"""fp4cast.json, the receipt of a conversion: what its writer and its readers agree on.

Conversion writes it; verification takes from it only what the source cannot tell: which tensors were rounded on
purpose, and the digests of documents and input scales.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4cast._version import __version__
from fp4cast.checkpoints.byte_ranges import CHUNK_BYTES, Files
from fp4cast.checkpoints.directory import INDEX, RECEIPT
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.json_files import json_bytes, read_json
from fp4cast.layouts.layout import Form, Names
from fp4cast.verification.report import Report


@dataclass(frozen=True)
class Receipt:
    """What a destination says about its own making; every field is empty if there is no receipt.

    Attributes:
        facts: the report's figures that do not depend on time, place or speed; for people and scripts.
        rounded: half-blocks that were rounded on purpose, by module.
        digests: digests of those modules' tensors.
        documents: digests of the config files, by name.
        input_scales: digest of all input scales; None where there are none.
        files: every file of the destination but the receipt, relative to it: what `--overwrite` may replace.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    rounded: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)
    input_scales: str | None = None
    files: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        report: Report,
        *,
        digests: Mapping[str, str],
        documents: Mapping[str, bytes],
        input_scales: str | None,
        files: Iterable[str],
    ) -> Receipt:
        """The receipt of a conversion.

        Args:
            report: the conversion's.
            digests: by module, the digest of every tensor in `report.inexact`.
            documents: all documents by name.
            input_scales: digest of all input scales, for W4A4.
            files: the shards and companions.
        """
        facts = {key: value for key, value in report.facts().items() if key != "marlin_exact"}  # verify measures that
        rounded = {tensor.name: tensor.rounded_half_blocks for tensor in report.inexact}
        return cls(facts, rounded, digests, seal(documents), input_scales, sorted({*documents, *files}))

    @classmethod
    def read(cls, directory: Path) -> Receipt:
        """Read a directory's receipt. It is untrusted: entries of a wrong type are left out.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        path = directory / RECEIPT
        document = read_json(path) if path.exists() else {}
        inexact = document.get("inexact")
        entries = [entry for entry in inexact if isinstance(entry, dict)] if isinstance(inexact, list) else []
        rounded = {str(entry.get("name")): entry.get("rounded_half_blocks") for entry in entries}
        scales = document.get("input_scales")
        return cls(
            facts=document,
            rounded={name: count for name, count in rounded.items() if isinstance(count, int)},
            digests=_texts(document.get("digests")),
            documents=_texts(document.get("documents")),
            input_scales=None if scales is None else str(scales),
            files=[str(name) for name in files] if isinstance(files := document.get("files"), list) else (),
        )

    def to_bytes(self) -> bytes:
        """The file's content; the same on every run."""
        document: dict[str, Any] = {"fp4cast": __version__, **self.facts, "digests": dict(self.digests)}
        document["documents"] = dict(self.documents)
        if self.input_scales is not None:
            document["input_scales"] = self.input_scales
        document["files"] = list(self.files)
        return json_bytes(document)


def _texts(value: object) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}


def digest_bytes(data: bytes) -> str:
    """BLAKE2b of a document."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(documents: Mapping[str, bytes]) -> dict[str, str]:
    """The digests of the config files among some documents; the index is checked against the tensors instead."""
    return {name: digest_bytes(data) for name, data in sorted(documents.items()) if name != INDEX}


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
