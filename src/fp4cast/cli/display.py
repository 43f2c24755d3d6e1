"""Print results for people, as tables and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from fp4cast.casting.tight_rule import MARLIN_BINADES, WINDOW
from fp4cast.cli.progress import format_bytes
from fp4cast.cli.streams import printable
from fp4cast.cli.tables import show_table, show_wrapped

if TYPE_CHECKING:
    from rich.table import Table

    from fp4cast.conversion.inspection import Inspection
    from fp4cast.conversion.job_array import Part
    from fp4cast.formats import KvCache
    from fp4cast.verification.figures import Fp8Tensor, InexactTensor
    from fp4cast.verification.files import FilesReport
    from fp4cast.verification.report import Difference, Report

_SHOWN = 8


def show_facts(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a title, then one line for each (name, text)."""
    console.print(f"[bold]{escape(printable(title))}[/]", soft_wrap=True)
    known = list(rows)
    indent = max((len(name) for name, _ in known), default=0) + 2
    for name, text in known:
        show_wrapped(console, name, text, indent)


def show_next(console: Console, command: str) -> None:
    """Print the last line of a summary: the command to go on with."""
    console.print(f"[bold]next[/]  {escape(printable(command))}", soft_wrap=True)


def show_inspection(console: Console, info: Inspection) -> None:
    """Print what a checkpoint is and what a conversion would do."""
    domains = info.domains
    inexact = [domain for domain in domains if not domain.exact]
    narrow = sum(domain.marlin_exact for domain in domains)
    size = info.bytes
    rows = [
        ("family", info.title),
        ("cast", f"{info.cast} MXFP4 tensors in {len(domains)} scale domains"),
        ("copied", f"{info.copied} tensors, byte for byte"),
        ("size", f"{format_bytes(size['source'])} -> {format_bytes(size['destination'])}"),
        *_downloaded(size),
        ("exact", _exact_sentence(len(domains) - len(inexact), len(domains))),
    ]
    if info.targets:  # else no engine that has these kernels reads the result
        rows.append(("Marlin", f"{narrow} of {len(domains)} domains fit its window of {MARLIN_BINADES} binades"))
    layouts: dict[tuple[str, str], list[str]] = {}
    for target, refused in zip(info.targets, info.refused, strict=True):
        said = f"no: {refused}" if refused else target.served
        layouts.setdefault((target.layout.name, said), []).append(target.activations.upper())
    rows += [("layout", f"{name} as {', '.join(kinds)}: {served}") for (name, served), kinds in layouts.items()]
    show_facts(console, info.source, rows)
    possible = [target for target, refused in zip(info.targets, info.refused, strict=True) if not refused]
    if possible:
        console.print(f"[bold]serve[/] {escape(possible[0].serving_command('DST'))}", soft_wrap=True)
    console.print()
    console.print(_spreads(info))
    if inexact:
        console.print("\n[bold red]not exact:[/] " + _names([domain.name for domain in inexact]), soft_wrap=True)
        if info.targets:
            console.print("convert with --inexact nearest to write the nearest values there")
    _show_notes(console, info.notes)


def _downloaded(size: dict[str, int]) -> list[tuple[str, str]]:
    if "downloaded" not in size:
        return []
    read = format_bytes(size["downloaded"])
    return [("read", f"{read} of {format_bytes(size['source'])}, by ranges; nothing is on the disk")]


def _exact_sentence(exact: int, total: int) -> str:
    if exact == total:
        return f"[green]yes[/]: all {total} scale domains can be cast bit for bit"
    return f"[red]no[/]: {total - exact} of {total} scale domains cannot"


def _spreads(info: Inspection) -> Table:
    """A chart of the exponents: how many domains span how many binades, and the two windows."""
    from rich.table import Table

    counts = Counter(domain.spread for domain in info.domains)
    table = Table(title="spread of the exponents, in binades", title_justify="left", box=None, pad_edge=False)
    table.add_column("spread", justify="right")
    table.add_column("domains", justify="right")
    table.add_column("")
    most = max(counts.values(), default=1)
    for spread, count in sorted(counts.items()):
        style = "green" if spread <= MARLIN_BINADES else "yellow" if spread <= WINDOW else "red"
        table.add_row(str(spread), str(count), f"[{style}]{'█' * max(1, round(40 * count / most))}[/]")
    table.caption = (
        f"[green]to {MARLIN_BINADES}[/]: exact on disk and in Marlin; [yellow]to {WINDOW}[/]: exact on disk; "
        "[red]beyond[/]: exact only where the codes leave room"
    )
    table.caption_justify = "left"
    return table


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return escape(printable(", ".join(names[:_SHOWN]))) + more


def show_report(console: Console, report: Report, verb: str) -> None:
    """Print what was done or found, what is exact and what is not."""
    t, h = report.tensors, report.half_blocks
    moved = report.bytes["read"] + report.bytes["written"]
    rows = [
        ("layout", f"{report.layout}, {report.activations.upper()}"),
        ("tensors", f"{t['cast']} cast, {t['copied']} copied byte for byte"),
        (
            "half-blocks",
            f"{h['verbatim']:,} keep their codes, {h['shifted']:,} shifted by a power of two, {h['rounded']:,} rounded",
        ),
        ("weights", _weights_sentence(report)),
    ]
    if wrong := report.wrong("documents"):
        rows.append(("documents", f"[red]WRONG[/]: {len(wrong)} differences in what an engine reads"))
    if wrong := report.wrong("companions"):
        rows.append(("companions", f"[yellow]{len(wrong)} files differ[/]; --strict counts them as wrong"))
    if report.fp8:
        rows.append(("attention", fp8_sentence(report.fp8)))
    if report.activations == "w4a4":
        rows.append(("activations", "NVFP4 too, quantized while serving: that part is not lossless"))
    if report.kv_cache_qformat != "none":
        rows.append(("KV cache", kv_cache_sentence(report.kv_cache_qformat)))
    if report.layout not in ("gguf", "mlx", "mxfp4"):
        window = f"(window of {MARLIN_BINADES} binades: W4A16 MoE, Hopper and older)"
        rows.append(("Marlin", f"{_marlin_sentence(report)} {window}"))
    rows += [
        ("served by", report.served),
        *([("card", f"{escape(printable(report.card))}: read it, and edit it as you like")] if report.card else []),
        *left_out_row(report.left_out),
        (
            "time",
            f"{report.seconds:.1f} s, {format_bytes(report.bytes['read'])} read, "
            f"{format_bytes(report.bytes['written'])} written, {format_bytes(moved / max(report.seconds, 1e-9))}/s",
        ),
    ]
    if report.ok and verb == "wrote" and not report.bytes["written"]:
        verb = "complete already:"
    show_facts(console, f"{verb if report.ok else 'failed'} {report.destination}", rows)
    if report.inexact:
        show_inexact(console, report.inexact)
    _show_notes(console, report.notes)
    _show_differences(console, report.differences)
    if report.ok:
        show_next(console, report.serve)


def _show_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"[yellow]note[/] {escape(printable(note))}", soft_wrap=True)


def left_out_row(names: Sequence[str]) -> list[tuple[str, str]]:
    """The row that names what of the source was not carried along; none where nothing was."""
    return [("left out", f"{_names(names)}: no part of the model that is cast")] if names else []


def kv_cache_sentence(name: KvCache) -> str:
    """What a format of the KV cache other than "none" means."""
    scales = "calibrated scales" if name == "fp8" else "scales of 1"
    return f"FP8 with {scales}, quantized while serving: that part is not lossless"


def fp8_sentence(fp8: Sequence[Fp8Tensor]) -> str:
    """What became of the weights in FP8."""
    least = min(fp8, key=lambda tensor: tensor.snr_db)
    return (
        f"{len(fp8)} weights quantized to FP8, with an SNR of {least.snr_db:.1f} dB and more (the least: "
        f"{escape(printable(least.name))}): [yellow]not exact[/]"
    )


def _marlin_sentence(report: Report) -> str:
    if report.marlin_exact:
        return "[green]exact too[/]"
    if not report.marlin_zeroed:
        return "[yellow]may lose half-blocks that lie 15 or more binades down[/]"
    half_blocks = report.half_blocks
    part = report.marlin_zeroed / (half_blocks["verbatim"] + half_blocks["shifted"] + half_blocks["rounded"])
    return (
        f"[yellow]computes {report.marlin_zeroed:,} half-blocks ({part:.2g} of all) as zeros[/]: they lie 15 or more "
        "binades below the largest"
    )


def show_files(console: Console, report: FilesReport) -> None:
    """Print whether a destination's files are as they were written."""
    claims = f"{str(report.facts.get('layout'))[:50]} {str(report.facts.get('activations'))[:50].upper()}"
    if "exact" in report.facts:
        claims += ", exact" if report.facts["exact"] is True else ", not exact"
    rows = [
        (
            "files",
            f"{report.files} files, {format_bytes(report.bytes)}, compared with the receipt's sizes and checksums",
        ),
        ("receipt", f"{escape(printable(claims))}; `fp4cast verify SRC DST` compares every value"),
        ("time", f"{report.seconds:.1f} s, {format_bytes(report.bytes / max(report.seconds, 1e-9))}/s"),
    ]
    if wrong := report.damage:
        rows.insert(1, ("damage", f"[red]WRONG[/]: files that are not as they were written: {len(wrong)}"))
    show_facts(console, f"{'as written' if report.ok else 'damaged'} {report.destination}", rows)
    _show_differences(console, report.differences)


def _show_differences(console: Console, differences: Sequence[Difference]) -> None:
    for difference in differences[:_SHOWN]:
        style = "yellow" if difference.area == "companions" else "red"
        console.print(f"[{style}]differs[/] {escape(printable(str(difference)))}", soft_wrap=True)
    if len(differences) > _SHOWN:
        console.print(f"and {len(differences) - _SHOWN} more")


def _weights_sentence(report: Report) -> str:
    if wrong := report.wrong("weights"):
        return f"[red]WRONG[/]: {len(wrong)} differences from the source"
    how = "measured on what was written" if report.verified else "while writing; not read back (--no-verify)"
    if report.exact:
        return f"[green]exact[/]: every value equals the source's, bit for bit ({how})"
    if report.inexact and not any(tensor.max_abs_error for tensor in report.inexact):
        return f"[green]equal[/] as numbers; {len(report.inexact)} tensors hold zeros of the other sign ({how})"
    if not report.tensors["inexact"]:
        return f"[yellow]not exact[/]: every cast is, but other weights were quantized, too ({how})"
    return f"[yellow]not exact[/]: {report.tensors['inexact']} of {report.tensors['cast']} tensors are rounded ({how})"


def show_inexact(console: Console, inexact: Sequence[InexactTensor]) -> None:
    """A table of the tensors that are not exact, worst first."""
    rows = [
        (
            escape(printable(tensor.name)),
            f"{tensor.rounded_half_blocks:,}",
            f"{tensor.max_abs_error:.3g}",
            f"{tensor.mse:.3g}",
            f"{tensor.snr_db:.1f} dB",
        )
        for tensor in sorted(inexact, key=lambda tensor: tensor.snr_db)[:_SHOWN]
    ]
    columns = ("tensor", "half-blocks", "max |error|", "MSE", "SNR")
    show_table(console, "rounded tensors", columns, rows, right=range(1, 5))


def show_demo(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print one line for each family, and what to do next."""
    columns = ("family", "as", "spread", "tensors", "verbatim", "shifted", "weights", "flipped bit")
    cells = [
        (
            row["kind"],
            row["activations"].upper(),
            str(row["spread"]),
            str(row["tensors"]["cast"]),
            str(row["half_blocks"]["verbatim"]),
            str(row["half_blocks"]["shifted"]),
            "[green]exact[/]" if row["exact"] else "[red]not exact[/]",
            "[green]found[/]" if row["flip_found"] else "[red]missed[/]",
        )
        for row in rows
    ]
    show_table(console, "MXFP4 -> NVFP4, a miniature of each family", columns, cells, right=range(2, 6))
    console.print(
        "\nEvery value of every tensor was compared with its source; then one bit was flipped, to see it found.\n"
        "Your own: [bold]fp4cast inspect SRC[/] says what will happen, [bold]fp4cast convert SRC DST[/] does it.\n"
        "SRC is a directory or a model id such as openai/gpt-oss-20b."
    )


def show_part(console: Console, part: Part) -> None:
    """Print what one part of a job array has written."""
    rows = [
        ("shards", f"{len(part.shards)}, of which {part.kept} were finished before"),
        ("written", f"{format_bytes(part.bytes)} in {part.seconds:.1f} s"),
        ("next", "when all parts are written, the same command with --finish instead of --shards"),
    ]
    show_facts(console, f"wrote part {part.part} of {part.parts} of {part.destination}", rows)
