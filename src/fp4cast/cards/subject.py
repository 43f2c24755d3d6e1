"""What a card is about: everything that its text, its metadata and its picture are made from."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from fp4cast._version import __version__
from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.origin import Origin
from fp4cast.errors import UsageError
from fp4cast.families.family import Pair, Source
from fp4cast.families.served import failing_rows, serving_rows
from fp4cast.families.services import Service
from fp4cast.formats import Activations
from fp4cast.layouts.layout import Selection, Target
from fp4cast.verification.report import Report


class ScaleDomain(Protocol):
    """Pairs that share a tensor scale, as `conversion` finds them."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """Its MXFP4 tensors."""

    @property
    def scaling(self) -> Scaling:
        """Its tensor scale, and the range of its exponents."""


@dataclass(frozen=True)
class Subject:
    """A conversion, as its card tells it.

    Attributes:
        source: the MXFP4 checkpoint.
        target: how the destination is stored.
        selection: what was cast, and what was not.
        domains: the scale domains that were cast.
        report: the figures.
        origin: the source's.
        day: when it was made, if somebody says so; see `source_date`.
        size: bytes of the destination's shards.
        files: the names of the source's companions, as they are called in the destination.
        card: the metadata of the source's card; empty if it has none.
        version: the fp4cast that wrote the weights.
    """

    source: Source
    target: Target
    selection: Selection
    domains: Sequence[ScaleDomain]
    report: Report
    origin: Origin
    day: date | None
    size: int
    files: Collection[str]
    card: Mapping[str, Any]
    version: str = __version__

    @property
    def name(self) -> str:
        """What the card calls the model: never the name of anybody's directory."""
        return f"{self.origin.id.rpartition('/')[2]}-NVFP4" if self.origin.id else "MODEL-NVFP4"

    @property
    def serving(self) -> list[Service]:
        """What is known of each engine that reads such a model."""
        return [row for row in serving_rows(*self._kind_of_result) if row.models in ("", self._models)]

    @property
    def failing(self) -> list[Service]:
        """What is known of each engine that does not."""
        return [row for row in failing_rows(*self._kind_of_result) if row.models in ("", self._models)]

    @property
    def _kind_of_result(self) -> tuple[str, str, Activations]:
        return self.target.result.served_as, self.target.layout.name, self.target.activations

    @property
    def _models(self) -> str:
        return "experts" if any(".experts" in pair.module for pair in self.selection.cast) else "dense"


def source_date() -> date | None:
    """The day that SOURCE_DATE_EPOCH names, the convention of reproducible builds; None where it is not set.

    No other clock is asked, neither the machine's nor that of files: the same conversion has the same bytes on any day.

    Raises:
        UsageError: it is not a number of seconds since 1970.
    """
    said = os.environ.get("SOURCE_DATE_EPOCH")
    if not said:
        return None
    try:
        return datetime.fromtimestamp(int(said), UTC).date()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {said[:50]!r}") from None


_LAYER = re.compile(r"((?:.*?\.)??)(\d{1,6})(?:\.|$)")


class Layer(NamedTuple):
    """One row of the picture.

    Attributes:
        label: its number; empty for modules outside of any layer, "3-5" for several layers together.
        domains: its scale domains.
    """

    label: str
    domains: list[ScaleDomain]


def layers(domains: Iterable[ScaleDomain], most: int) -> list[Layer]:
    """Scale domains by layer, in their order; neighbours share a row where there are more than `most` layers."""
    table: dict[tuple[str, int], list[ScaleDomain]] = {}
    for domain in domains:
        match = _LAYER.match(domain.pairs[0].module)
        table.setdefault((match[1], int(match[2])) if match else ("", -1), []).append(domain)
    stacks = {prefix: i for i, (prefix, _) in enumerate(table)}
    keys = sorted(table, key=lambda key: (stacks[key[0]], key[1]))
    step = -(-len(keys) // most) or 1
    rows: list[Layer] = []
    for start in range(0, len(keys), step):
        some = keys[start : start + step]
        first, last = some[0][1], some[-1][1]
        label = "" if first < 0 else str(first) if first == last else f"{first}-{last}"
        rows.append(Layer(label, [domain for key in some for domain in table[key]]))
    return rows


class Kind(NamedTuple):
    """Tensors that differ only in the numbers in their names.

    Attributes:
        name: with `*` for each number.
        stored: how they are stored: a dtype, or a format.
        many: how many.
        nbytes: their size in the source.
    """

    name: str
    stored: str
    many: int
    nbytes: int


def cast_kinds(selection: Selection) -> list[Kind]:
    """The MXFP4 tensors that were cast, the largest kinds first."""
    return _kinds((pair.module, "MXFP4", pair.codes.nbytes + pair.scales.nbytes) for pair in selection.cast)


def fp8_kinds(selection: Selection) -> list[Kind]:
    """The weights that were quantized to FP8, the largest kinds first."""
    return _kinds((tensor.name, tensor.dtype, tensor.nbytes) for tensor in selection.fp8.values())


def kept_kinds(source: Source, selection: Selection) -> list[Kind]:
    """All other tensors, the largest kinds first; MXFP4 tensors that stay are said to be such."""
    gone = {pair.module for pair in selection.cast}
    staying: Mapping[str, str] = {
        tensor.name: "MXFP4"
        for pair in source.pairs.values()
        if pair.module not in gone
        for tensor in (pair.codes, pair.scales)
    }
    return _kinds((each.name, staying.get(each.name, each.dtype), each.nbytes) for each in selection.untouched)


def _kinds(tensors: Iterable[tuple[str, str, int]]) -> list[Kind]:
    table: dict[tuple[str, str], list[int]] = {}
    for name, stored, nbytes in tensors:
        table.setdefault((_pattern(name), stored), []).append(nbytes)
    kinds = [Kind(name, stored, len(sizes), sum(sizes)) for (name, stored), sizes in table.items()]
    return sorted(kinds, key=lambda kind: (-kind.nbytes, kind.name, kind.stored))


def _pattern(name: str) -> str:
    """A name with `*` for each of its numbers: layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def shares(layer: Layer, widest: int) -> Iterator[tuple[int, int, float]]:
    """The exponents of a layer: (first, last, share) of binades below the largest exponent of a scale domain.

    Args:
        layer: the row.
        widest: what lies further down counts as this.

    Yields:
        Neighbouring binades that the same share of the layer's scale domains reaches, from 0 on.
    """
    depths = [min(d.scaling.spread, widest) for d in layer.domains if d.scaling.k_max is not None]
    reached = [sum(depth >= at for depth in depths) for at in range(max(depths, default=-1) + 1)]
    for count, run in groupby(enumerate(reached), key=lambda item: item[1]):
        places = [at for at, _ in run]
        yield places[0], places[-1], count / len(layer.domains)
