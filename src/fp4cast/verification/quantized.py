"""Weights that `ptq` quantized from unquantized ones: could they have been made from these?

The source does not determine them, so that no value can be called wrong. But NVFP4 keeps weights to about 20 dB, and
what lies further away than `LEAST_SNR` was made from something else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.formats import NV_BLOCK, Bytes, Float64s, float_values, nvfp4_values, usable_scale
from fp4cast.layouts.layout import Form, Selection
from fp4cast.parallel.ranges import spans
from fp4cast.verification.figures import signal_to_noise
from fp4cast.verification.report import Difference

LEAST_SNR = 10.0  # dB
TOO_FAR = f"is said to be quantized from the source's values, but they are less than {LEAST_SNR:g} dB above its error"
_CHUNK = 1 << 20  # weights compared together


def judge_quantized(
    selection: Selection, form: Form, destination: Checkpoint, wrong: Collection[str]
) -> tuple[list[Difference], dict[str, float]]:
    """(the weights that are too far from the source's, the SNR of each in dB by module).

    Args:
        selection: what was quantized.
        form: how the destination stores it.
        destination: the NVFP4 checkpoint.
        wrong: names of its tensors that cannot be compared.
    """
    noise, far = dict[str, float](), []
    for module, tensor in selection.quantized.items():
        names = form.names(module)
        if not set(names) & set(wrong):
            noise[module] = noise_of(tensor, form, module, destination.tensors)
            if not noise[module] >= LEAST_SNR:
                far.append(Difference(names.codes, "values", TOO_FAR))
    return far, noise


def noise_of(source: Tensor, form: Form, module: str, written: Mapping[str, Tensor]) -> float:
    """10 log10(energy / squared error) in dB of a quantized weight; infinity where nothing was lost.

    Args:
        source: the unquantized weight [N, K].
        form: how the destination stores it.
        module: its name.
        written: the destination's tensors, of which the module's have the right shapes and dtypes.

    Returns:
        NaN where its tensor scale is not usable.
    """
    names = form.names(module)
    codes, scales = written[names.codes], written[names.block_scale]
    energy = error = 0.0
    with Files() as files:
        stored = float(
            files[written[names.tensor_scale].path].read(written[names.tensor_scale].start, 4).view("<f4")[0]
        )
        if not usable_scale(stored):
            return math.nan
        for values, pieces in _rows(source, codes, scales, files):
            found = nvfp4_values(*pieces, 1.0 / stored if form.reciprocal else stored)
            energy += float((values**2).sum())
            error += float(((found.reshape(values.shape) - values) ** 2).sum())
    return signal_to_noise(energy, error)


def _rows(
    source: Tensor, codes: Tensor, scales: Tensor, files: Files
) -> Iterator[tuple[Float64s, tuple[Bytes, Bytes]]]:
    """Values float64 [n, K], and codes uint8 [n, K/2] with block scales uint8 [n, K/16], of some rows at a time."""
    rows, width = source.shape
    for first, last in spans(0, rows, max(1, _CHUNK // width)):
        parts = []
        for tensor in (source, codes, scales):
            size = tensor.nbytes // rows
            parts.append(files[tensor.path].read(tensor.start + first * size, (last - first) * size))
        packed, block_scales = parts[1].reshape(-1, width // 2), parts[2].reshape(-1, width // NV_BLOCK)
        yield float_values(parts[0], source.dtype).reshape(-1, width), (packed, block_scales)
