"""What is to be compared: every cast tensor and every copy, by the destination's shard that holds it."""

from __future__ import annotations

from collections.abc import Collection

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.formats import Activations
from fp4cast.layouts.fp8 import scale_name
from fp4cast.layouts.layout import Form, Selection
from fp4cast.verification.fast_path import Converted
from fp4cast.verification.fp8_blocks import Fp8Weight
from fp4cast.verification.opened import Opened
from fp4cast.verification.shard_check import ShardWork


def work_of(opened: Opened, wrong: Collection[str]) -> list[ShardWork]:
    """The comparisons of each destination shard, without the tensors that `wrong` names."""
    rounded = frozenset(opened.receipt.rounded) - opened.receipt.quantized
    return compare_work(
        opened.destination, opened.target.form, opened.target.activations, opened.selection, rounded, wrong
    )


def compare_work(
    destination: Checkpoint,
    form: Form,
    activations: Activations,
    selection: Selection,
    rounded: Collection[str],
    wrong: Collection[str] = (),
) -> list[ShardWork]:
    """The comparisons of each shard of a destination.

    Args:
        destination: the NVFP4 checkpoint, or some of its shards: what they do not hold is left out.
        form: how it stores a weight.
        activations: "w4a16" or "w4a4".
        selection: the source's tensors.
        rounded: modules with half-blocks that were rounded on purpose.
        wrong: names of the destination's tensors that are left out.
    """
    table = {shard.path: ShardWork() for shard in destination.shards.values()}
    tensors, left_out = destination.tensors, frozenset(wrong)
    for pair in selection.cast:
        names = form.names(pair.module)
        needed = names if activations == "w4a4" else names[:-1]
        if left_out.isdisjoint(names) and all(name in tensors for name in needed):
            converted = Converted.of(pair, form, activations, tensors, rounded=pair.module in rounded)
            table[converted.codes.path].converted.append(converted)
    for tensor in selection.untouched:
        if tensor.name not in left_out and (copy := tensors.get(tensor.name)) is not None:
            table[copy.path].copies.append((tensor, copy))
    for module, source in selection.fp8.items():
        name, scale = source.name, scale_name(module)
        if left_out.isdisjoint((name, scale)) and name in tensors and scale in tensors:
            table[tensors[name].path].fp8.append(Fp8Weight(module, source, tensors[name], tensors[scale]))
    return list(table.values())
