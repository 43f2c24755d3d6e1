"""The scales that the source does not determine alone: input scales, and those that projections share."""

from __future__ import annotations

from collections.abc import Iterator

from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.families.merging import shared_scale_group
from fp4cast.verification.opened import Opened
from fp4cast.verification.receipt import input_scales_digest
from fp4cast.verification.report import Difference
from fp4cast.verification.shard_check import StoredScales


def input_scale_differences(opened: Opened, wrong: set[str]) -> Iterator[Difference]:
    """Check that the input scales are those that were written: the source does not determine them."""
    announced, form = opened.receipt.input_scales, opened.target.form
    modules = [pair.module for pair in opened.selection.cast]
    if opened.target.activations == "w4a16" or announced is None:
        return
    if wrong.intersection(form.names(module).input_scale for module in modules):
        return
    if input_scales_digest(form, modules, opened.destination.tensors) != announced:
        yield Difference(RECEIPT, "values", "the input scales are not those that the conversion wrote")


def shared_scale_differences(opened: Opened, wrong: set[str], scales: dict[str, StoredScales]) -> Iterator[Difference]:
    """Check that projections that engines merge have one tensor scale and one input scale."""
    groups = {group for module in scales if len(group := shared_scale_group(module)[1]) > 1}
    for group in sorted(groups):
        members = [module for module in group if module in scales]
        names = [opened.target.names(module) for module in members]
        stored = [scales[module] for module in members]
        kinds = (
            ([name.tensor_scale for name in names], {each.tensor_scale for each in stored}),
            ([name.input_scale for name in names], {each.input_scale for each in stored}),
        )
        for spelled, values in kinds:
            if len(values) > 1 and not wrong.intersection(spelled):
                yield Difference(
                    spelled[0], "values", f"differs from {spelled[1:]}: engines merge them under one scale"
                )
