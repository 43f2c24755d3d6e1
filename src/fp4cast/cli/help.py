"""What `--help` shows: options in groups, whole words at any width, examples. Typer's own boxes cut names off."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.theme import Theme

from fp4cast.cli.commands import COMMANDS
from fp4cast.cli.examples import EXAMPLES

# The groups in their order, and the parameters in each; a parameter that is in none is shown under "Options".
GROUPS = {
    "Arguments": "",
    "Options": "",
    "What to write": """to layout activations input_scales inexact kv_cache_qformat fp8 no_card source_id pyt_ckpt_path
        qformat export_path cast_mxfp4_to_nvfp4 out push public""",
    "Calibration": "dataset calib_size calib_seq batch_size act_headroom input_scales_per",
    "Running": """jobs engine shards finish no_verify no_sync device use_seq_device_map gpu_max_mem_percentage
        low_memory_mode attn_implementation trust_remote_code stream yes""",
    "Going on, and replacing": "resume restart overwrite",
    "Accepted as in the original": "skip_generate export_fmt sparsity_fmt inference_parallel",
    "Output": "dry_run json as_json no_verbose quiet verbose log help",
}
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
_COLUMN = 30  # where meanings begin, beside names that leave room
_WIDEST = 110
_THEME = Theme({"help.title": "bold", "help.name": "cyan", "help.example": "green"})


class _Colours(RegexHighlighter):
    base_style = "help."
    highlights = (
        r"(?m)^(?P<title>[A-Z][\w, ]*:)",
        r"(?m)^  (?P<name>-[\w-]+(?:, -[\w-]+)*|\w+(?=  ))",
        r"(?m)^  (?P<example>fp4cast .*)$",
    )


def filled(text: str, width: int, first: int = 0, others: int = 0) -> str:
    """Text in lines of at most `width` characters, if words are no longer: no word is cut, not at a hyphen either."""
    return textwrap.fill(
        text,
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def entries(rows: list[tuple[str, str]], width: int) -> str:
    """One entry for each (names, meaning): beside each other where there is room, else the meaning below.

    >>> print(entries([("--jobs N", "Threads."), ("--a-name, --another-name N", "Also threads.")], 26))
      --jobs N
          Threads.
      --a-name, --another-name
          N
          Also threads.
    """
    column = min(_COLUMN, max(len(names) for names, _ in rows) + 4) if width >= 70 else 0
    lines = []
    for names, meaning in rows:
        if len(names) + 4 <= column:
            lines.append(filled(f"  {names}".ljust(column) + meaning, width, others=column))
        else:
            lines += [filled(names, width, 2, 6), filled(meaning, width, column or 6, column or 6)]
    return "\n".join(line for line in lines if line)


def show_help(command: Any, ctx: Any) -> None:
    """Print a command's help."""
    console = Console(highlighter=_Colours(), theme=_THEME, markup=False, emoji=False)
    width = min(console.width, _WIDEST)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    parts = [filled(f"Usage: {usage}", width, others=7)]
    parts += [filled(paragraph, width) for paragraph in _paragraphs(command.help)]
    parts += [f"{title}:\n{entries(rows, width)}" for title, rows in _groups(command, ctx)]
    if examples := EXAMPLES.get(ctx.info_name if ctx.parent else "", ()):
        shown = [f"{_command_line(words, width)}\n{filled(what, width, 6, 6)}" for words, what in examples]
        parts.append("\n".join(["Examples:", *shown]))
    console.print("\n\n".join(parts), soft_wrap=True)


def _tidy(names: str, meaning: str) -> tuple[str, str]:
    """An entry without the marks that Typer sets about a default that is no value."""
    return names, re.sub(r"default: \(([^()]*)\)", r"default: \1", meaning.replace("  [", " ["))


def _command_line(words: str, width: int) -> str:
    """An example as a shell reads it, also where it takes several lines."""
    return filled(words, width - 2, 2, 4).replace("\n", " \\\n")


def _paragraphs(text: str | None) -> list[str]:
    """A docstring's, each in one line."""
    return [" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n")]


def _groups(command: Any, ctx: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, entries) of the arguments, of each group of options, and of the commands."""
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
    for each in command.get_params(ctx):
        if record := each.get_help_record(ctx):
            kind = "Arguments" if each.param_type_name == "argument" else "Options"
            groups[kind if ctx.parent is None else _GROUP_OF.get(each.name, kind)].append(_tidy(*record))
    if ctx.parent is None:
        groups["Commands"] = [(name, meaning) for name, (_, meaning) in COMMANDS.items()]
    return [(title, rows) for title, rows in groups.items() if rows]
