"""Read the export back and compare it with the MXFP4 source, with verify's own code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.staging import Staging
from fp4cast.errors import VerificationError
from fp4cast.layouts.layout import Target
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Progress
from fp4cast.ptq.model_weights import Weight
from fp4cast.verification.fast_path import Converted
from fp4cast.verification.figures import InexactTensor, inexact_tensor
from fp4cast.verification.shard_check import ShardWork, check_shard
from fp4cast.verification.values import Comparison


def read_back(
    weights: Sequence[Weight], target: Target, stage: Staging, engine: Engine, progress: Progress
) -> list[InexactTensor]:
    """The weights whose written values differ from those of their MXFP4 tensors, with the errors."""
    written = open_checkpoint(stage.out, stage.config).tensors
    table: dict[Path, ShardWork] = defaultdict(ShardWork)
    for weight in weights:
        if weight.pair is not None:
            converted = Converted.of(weight.pair, weight.form, target.activations, written)
            table[converted.codes.path].converted.append(converted)
    todo = list(table.values())
    total = sum(converted.nbytes for work in todo for converted in work.converted)
    inexact: list[InexactTensor] = []
    for work, found in zip(todo, engine.map(check_shard, todo, lambda n: progress("verify", n, total)), strict=True):
        for converted, comparison in zip(work.converted, found.comparisons, strict=True):
            inexact += _judge(converted, comparison)
    return inexact


def _judge(converted: Converted, found: Comparison | None) -> list[InexactTensor]:
    if found is None:
        raise VerificationError(
            f"{converted.tensor_scale.name}: is not a positive normal FP32 number, so engines cannot use it"
        )
    figures = (found.rounded, converted.pair.elements, found.squared_error, found.max_error, found.energy)
    return [inexact_tensor(converted.pair.module, *figures)] if found.rounded else []
