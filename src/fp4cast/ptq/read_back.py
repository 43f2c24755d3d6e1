"""What was written of weights from MXFP4, against the source's values: by the independent witness of `verify`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.publish import Progress
from fp4cast.conversion.staging import Staging
from fp4cast.errors import VerificationError
from fp4cast.parallel.engines import Engine
from fp4cast.ptq.model_weights import Weight
from fp4cast.verification.fast_path import Cast
from fp4cast.verification.report import InexactTensor, inexact_tensor
from fp4cast.verification.shard_check import Checks, perform
from fp4cast.verification.values import Comparison

__all__ = ["measure"]


def measure(weights: Sequence[Weight], stage: Staging, engine: Engine, progress: Progress) -> list[InexactTensor]:
    """The weights whose written values are not those of their MXFP4 tensors, with the errors."""
    written = open_checkpoint(stage.out, stage.config).tensors
    table: dict[Path, Checks] = defaultdict(Checks)
    for weight in weights:
        if weight.pair is not None:
            cast = Cast.of(weight.pair, weight.target, written)
            table[cast.codes.path].casts.append(cast)
    todo = list(table.values())
    total = sum(_bytes(cast) for checks in todo for cast in checks.casts)
    inexact: list[InexactTensor] = []
    for checks, found in zip(todo, engine.map(perform, todo, lambda n: progress("verify", n, total)), strict=True):
        for cast, comparison in zip(checks.casts, found.comparisons, strict=True):
            inexact += _judge(cast, comparison)
    return inexact


def _bytes(cast: Cast) -> int:
    tensors = (cast.pair.codes, cast.pair.scales, cast.codes, cast.scales, cast.tensor_scale, cast.input_scale)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _judge(cast: Cast, found: Comparison | None) -> list[InexactTensor]:
    if found is None:
        raise VerificationError(
            f"{cast.tensor_scale.name}: would be no positive normal FP32 number, which engines cannot use"
        )
    figures = (found.rounded, cast.pair.elements, found.squared_error, found.max_error, found.energy)
    return [inexact_tensor(cast.pair.module, *figures)] if found.rounded else []
