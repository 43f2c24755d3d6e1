"""What a card says, section by section, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from fp4cast.cards.markdown import code, gigabytes, plural, table
from fp4cast.cards.metadata import front_matter, licence, licence_files, metadata
from fp4cast.cards.picture import describe, draw
from fp4cast.cards.subject import Kind, Subject, cast_kinds, fp8_kinds, kept_kinds
from fp4cast.casting.tight_rule import MARLIN_BINADES, WINDOW
from fp4cast.checkpoints.card_files import CARD, PICTURE, beside_card
from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.families.served import command_of
from fp4cast.verification.figures import Fp8Tensor

_SHOWN = 20  # rows of a table
_INEXACT = 10


def card_files(subject: Subject) -> dict[str, bytes]:
    """The card and its picture, as bytes by name; the same on every run of the same conversion."""
    sections = (_summary, _exactness, _windows, _tensors, _serving, _making, _limits, _licence)
    body = "\n\n".join("\n\n".join(section(subject)) for section in sections)
    text = f"{front_matter(metadata(subject))}\n{body}\n"
    return {CARD: text.encode(), PICTURE: draw(subject.domains).encode()}


def _source(subject: Subject) -> str:
    """The source, with a link where its id is known."""
    name = subject.origin.id
    return f"[`{name}`](https://huggingface.co/{name})" if name else f"a checkpoint ({subject.target.family.title})"


def _kind(subject: Subject) -> str:
    """What a model without a name is: its config's model_type, as code, or its family."""
    said = subject.source.checkpoint.config.get("model_type")
    return code(said) if isinstance(said, str) else subject.target.family.title


def _verify(subject: Subject) -> str:
    return f"fp4cast verify {str(subject.origin) or 'SRC'} {subject.name}"


def _summary(subject: Subject) -> Iterator[str]:
    report = subject.report
    yield f"# {subject.name}" if subject.origin.id else f"# {_kind(subject)} in NVFP4"
    yield (
        f"This is {_source(subject)} in NVFP4 ({report.activations.upper()}, {gigabytes(subject.size)}). The weights "
        "that are NVFP4 here were MXFP4 there. They were not quantized again: fp4cast computed new scales, and kept "
        f"the 4-bit codes wherever the scales allow that. {_verdict(subject)}"
    )


def _verdict(subject: Subject) -> str:
    tensors = subject.report.tensors
    if subject.report.exact:
        return "**Every weight has the value that it had, bit for bit.**"
    if not tensors["inexact"]:
        return (
            "**Every weight that was cast has the value that it had, bit for bit. The attention "
            f"({plural(len(subject.report.fp8), 'weight')}) was quantized from BF16 to FP8: that is not exact.**"
        )
    return (
        f"**{plural(tensors['inexact'], 'tensor')} of {tensors['cast']:,} could not be written exactly and "
        f"{'holds' if tensors['inexact'] == 1 else 'hold'} the nearest values in places; all other weights have the "
        "values that they had, bit for bit.**"
    )


def _exactness(subject: Subject) -> Iterator[str]:
    report, halves = subject.report, subject.report.half_blocks
    yield "## Exactness, as measured"
    yield table(
        [
            ("MXFP4 tensors cast", f"{report.tensors['cast']:,}, of which {report.tensors['exact']:,} exactly"),
            ("half-blocks (16 weights) that keep their codes", f"{halves['verbatim']:,}"),
            ("half-blocks whose codes were divided by a power of two", f"{halves['shifted']:,}, exact too"),
            ("half-blocks that hold rounded values", f"{halves['rounded']:,}"),
            *_fp8_figures(report.fp8),
            ("other tensors", f"{report.tensors['copied']:,}, copied byte for byte"),
        ],
        ("what", "figure"),
    )
    yield (
        "`fp4cast convert` reads both checkpoints when everything is written, and publishes only if every value and "
        f"these figures are right (unless it is told `--no-verify`). To see it again: `{_verify(subject)}`."
    )
    if report.inexact:
        worst = sorted(report.inexact, key=lambda tensor: (tensor.snr_db, tensor.name))
        rows = [
            (code(t.name), f"{t.rounded_half_blocks:,}", f"{t.max_abs_error:.3g}", f"{t.mse:.3g}", f"{t.snr_db:.1f} dB")
            for t in worst[:_INEXACT]
        ]
        yield table(rows, ("rounded tensor", "half-blocks", "largest error", "MSE", "SNR"))
        if len(worst) > _INEXACT:
            yield f"And {len(worst) - _INEXACT:,} more, with a higher SNR; `{RECEIPT}` lists all."


def _fp8_figures(fp8: Sequence[Fp8Tensor]) -> list[tuple[str, str]]:
    """The row about weights in FP8; none if there are none."""
    ratios = sorted(tensor.snr_db for tensor in fp8)
    if not ratios:
        return []
    said = f"{len(fp8):,}, with an SNR of {ratios[0]:.1f} to {ratios[-1]:.1f} dB; `{RECEIPT}` lists each"
    return [("weights quantized from BF16 to FP8", said)]


def _windows(subject: Subject) -> Iterator[str]:
    scalings = [domain.scaling for domain in subject.domains]
    wide = [scaling for scaling in scalings if scaling.spread > WINDOW]
    disk = len(scalings) - len(wide)
    marlin = sum(scaling.marlin_exact for scaling in scalings)
    yield "## The two windows"
    yield f"![{describe(subject.domains)}]({PICTURE})"
    yield (
        "All weights of a scale domain (a tensor, or projections that engines merge) share one FP32 scale. How far the "
        "exponents of its blocks may lie apart depends on who reads them:"
    )
    yield table(
        [
            ("on disk (NVFP4 itself)", f"{WINDOW} binades", f"{disk:,} of {len(scalings):,}"),
            ("in vLLM's Marlin kernels", f"{MARLIN_BINADES} binades", f"{marlin:,} of {len(scalings):,}"),
        ],
        ("window", "width", "scale domains that fit"),
    )
    if kept := sum(scaling.exact for scaling in wide):
        yield f"Wider than {WINDOW} binades and exact all the same, as their codes leave room: {kept:,}."
    if marlin < len(scalings):
        yield (
            "Marlin serves W4A16 on Hopper and older GPUs, and every W4A16 mixture of experts. In the scale domains "
            f"that do not fit it may compute half-blocks as zeros: those that lie {MARLIN_BINADES + 1} or more binades "
            "below the largest."
        )


def _tensors(subject: Subject) -> Iterator[str]:
    yield "## What was cast, and what was not"
    yield from _kinds(cast_kinds(subject.selection), "NVFP4", "cast")
    yield from _kinds(fp8_kinds(subject.selection), "FP8, a scale for 128 x 128", "quantized")
    yield from _kinds(kept_kinds(subject.source, subject.selection), "", "not cast, and equal byte for byte")


def _kinds(kinds: Sequence[Kind], becomes: str, title: str) -> Iterator[str]:
    """A table of tensors; nothing if there are none."""
    if not kinds:
        return
    rows = [
        (code(k.name), f"{k.many:,}", f"{k.stored} → {becomes}" if becomes else k.stored, gigabytes(k.nbytes))
        for k in kinds[:_SHOWN]
    ]
    if rest := kinds[_SHOWN:]:
        count, nbytes = sum(kind.many for kind in rest), sum(kind.nbytes for kind in rest)
        rows.append((f"{len(rest):,} smaller kinds", f"{count:,}", "", gigabytes(nbytes)))
    yield table(rows, (title, "tensors", "stored as", "size in the source"))


def _serving(subject: Subject) -> Iterator[str]:
    yield "## Serve it"
    rows = subject.serving
    commands = [command for row in rows if (command := command_of(row, subject.name))]
    if commands:
        yield f"`{subject.name}` stands for a directory that holds these files, or for their id on the Hub. One of:"
        yield "\n".join(["```sh", *commands, "```"])
        yield (
            "*Run* and *loaded*: by the authors of fp4cast, with small models of this layout. *Read*: in the source of "
            "the engine, not run."
        )
    else:
        yield "No server that the authors of fp4cast ran or read serves this."
    limits = [f"- {row.release}: {row.why}" for row in rows if row.why and command_of(row, "")]
    limits += [f"- {row.release} loads it{f', {row.why}' * bool(row.why)}" for row in rows if not command_of(row, "")]
    limits += [f"- **Not** {row.release}: {row.why}" for row in subject.failing]
    if limits:
        yield "\n".join(limits)
    if known := [*rows, *subject.failing]:
        yield f"Engines change: this was known on {max(row.date for row in known)}."


def _making(subject: Subject) -> Iterator[str]:
    origin, report = subject.origin, subject.report
    source = str(origin) or "SRC"
    options = [f"--layout {report.layout}"] * (report.layout != "modelopt")
    options += ["--activations w4a4 --input-scales FILE"] * (report.activations == "w4a4")
    options += [f"--kv-cache-qformat {subject.target.kv_cache}"] * (subject.target.kv_cache != "none")
    options += [f"--fp8 {subject.target.fp8}"] * (subject.target.fp8 != "none")
    options += ["--inexact nearest"] * bool(report.inexact)
    yield "## How it was made"
    yield "\n".join(["```sh", " ".join(["fp4cast convert", source, subject.name, *options]), "```"])
    rows = [
        ("fp4cast", code(subject.version)),
        ("source", f"`{origin.id}`" if origin.id else "not known; nobody said its id on the Hub"),
        ("revision", code(origin.revision) if origin.revision else "not known"),
        ("layout", f"`{report.layout}`, {report.activations.upper()}"),
    ]
    if subject.day:
        rows.append(("date", str(subject.day)))
    yield table(rows, ("what", "which"))
    yield (
        f"`{RECEIPT}` is the receipt: the source, what was made, and a checksum of every file. "
        f"`fp4cast verify {subject.name}` compares a copy with it; `{_verify(subject)}` compares every "
        "value with the source."
    )


def _limits(subject: Subject) -> Iterator[str]:
    w4a4 = subject.report.activations == "w4a4"
    limits = [
        "W4A4: engines round activations to NVFP4 while they serve. That part is not lossless."
        if w4a4
        else "W4A16: engines round no activation to 4 bits.",
        "The weights are as good as those of the source, no better: what its own quantization lost stays lost.",
        "Neither speed nor accuracy on benchmarks was measured. NVFP4 kernels gain most on Blackwell, with long "
        "prompts and large batches.",
    ]
    if subject.target.kv_cache != "none":
        limits.insert(
            1, "KV cache in FP8, with scales of 1: engines round it while they serve. That part is not lossless."
        )
    if subject.report.fp8:
        limits.insert(1, "Attention in FP8: its weights are rounded, and engines round what goes into it, too.")
    yield "## Limits"
    yield "\n".join(f"- {limit}" for limit in limits)


def _licence(subject: Subject) -> Iterator[str]:
    said, old = licence(subject), str(beside_card(PurePosixPath(CARD)))
    names = [code(text) for key in ("license", "license_name") if (text := said.get(key)) and text != "other"]
    files = [f"[{file}]({file})" for file in licence_files(subject)]
    yield "## Licence, and the source's card"
    if not said:
        yield "Licence: not known; the source names none. Ask its authors before you pass this model on."
    else:
        yield f"Licence, as the source has it: {', '.join([*names, *files])}."
    if old in subject.files:
        yield f"The source's card lies beside this one: [{old}]({old})."
    yield f"Edit this page as you like: `fp4cast verify` compares neither it nor `{PICTURE}`."
