"""The scales of a quantized KV cache in a destination: which there are, and what they say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.families.family import Source
from fp4cast.formats import KvCache, usable_scale
from fp4cast.layouts.engine_view import Claims, first_below
from fp4cast.layouts.layout import DTYPES, Layout
from fp4cast.verification.receipt import Receipt, digest
from fp4cast.verification.report import Difference

KvScales = Mapping[str, Tensor | None]


def kv_scales_of(layout: Layout, source: Collection[str], written: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The scales of a KV cache by name, sorted; None for one whose partner is there alone.

    Args:
        layout: how they are named.
        source: the names of the source's tensors; only a module of these has scales.
        written: the destination's tensors.
    """
    attentions = {
        name.removesuffix(suffix)
        for suffix in layout.kv_scales
        for name in written
        if name.endswith(suffix) and name not in source
    }
    theirs = sorted(source) if attentions else []
    known = [attention for attention in attentions if first_below(attention, theirs)]
    names = sorted(f"{attention}{suffix}" for attention in known for suffix in layout.kv_scales)
    return {name: written.get(name) for name in names}


def kv_scales_digest(scales: KvScales) -> str:
    """The digest of the scales of a KV cache, in the order of their names; that of nothing where none were written."""
    return digest(tensor for tensor in scales.values() if tensor is not None)


def asks_for_fp8(claims: Claims, source: Source) -> bool:
    """Whether a destination asks for a quantized KV cache of its own; that of some sources stays as it is."""
    theirs = find_quantization_config(source.checkpoint.config).section.get("kv_cache_scheme")
    return claims.kv_cache and source.family.kv_cache and theirs is None


def kv_cache_format(layout: Layout, scales: KvScales) -> KvCache:
    """The format that the scales of a KV cache in FP8 tell: constants are 1, or not written."""
    values = _values(layout, scales).values()
    return "fp8" if values and not (layout.writes_constants and all(value == 1 for value in values)) else "fp8_cast"


def kv_scale_differences(layout: Layout, scales: KvScales, receipt: Receipt) -> Iterator[Difference]:
    """Check that the scales of a KV cache can be used, and are those that were written: no source determines them."""
    for name, value in _values(layout, scales).items():
        if not usable_scale(value):
            yield Difference(name, "values", f"expected a positive normal FP32 number, got {value}")
    if receipt.kv_scales is not None and kv_scales_digest(scales) != receipt.kv_scales:
        yield Difference(RECEIPT, "values", "the scales of the KV cache are not those that were written")


def _values(layout: Layout, scales: KvScales) -> dict[str, float]:
    """The values of those that have the right dtype and shape."""
    kind = (DTYPES.tensor_scale, layout.projection.scalar_shape)
    tensors = [tensor for tensor in scales.values() if tensor is not None and (tensor.dtype, tensor.shape) == kind]
    with Files() as files:
        read = {tensor.name: files[tensor.path].read(tensor.start, tensor.nbytes) for tensor in tensors}
        return {name: float(data.view("<f4")[0]) for name, data in read.items()}
