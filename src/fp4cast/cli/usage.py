"""Options of `convert` that contradict each other."""

from __future__ import annotations

from pathlib import Path

from fp4cast.checkpoints.gguf_file import names_gguf
from fp4cast.cli.console import exit_with
from fp4cast.errors import UsageError
from fp4cast.layouts.mlx import MLX
from fp4cast.parallel.engines import EngineName


def refuse_together(
    shards: str | None, *, finish: bool, alone: bool, read: bool, engine: EngineName, as_json: bool
) -> None:
    """Exit with 2 for options that cannot go together."""
    if shards is not None and not read:
        exit_with(UsageError("--shards verifies nothing; pass --no-verify with --finish"), as_json, 2)
    if shards is not None and finish:
        exit_with(
            UsageError("--shards writes a part, --finish publishes when all parts are written: pass one"), as_json, 2
        )
    if alone and (shards is not None or finish):
        exit_with(
            UsageError("a part resumes by itself; --resume and --restart are for a conversion in one process"),
            as_json,
            2,
        )
    if shards is not None and engine == "ray":
        exit_with(UsageError("--shards and --engine ray are two ways to spread the work: pass one"), as_json, 2)


def refuse_to_stream(stream: bool, *, spread: bool, as_json: bool) -> None:
    """Exit with 2 for `--stream` together with options that spread the work over machines."""
    if stream and spread:
        exit_with(
            UsageError("--stream is for one process, without --shards, --finish and --engine ray: shards come and go"),
            as_json,
            2,
        )


def refuse_to_push(push: str | None, *, public: bool, part: bool, as_json: bool) -> None:
    """Exit with 2 for `--push` where nothing is published, and for `--public` where nothing is pushed."""
    if push is not None and part:
        exit_with(UsageError("--shards publishes nothing; pass --push with --finish"), as_json, 2)
    if public and push is None:
        exit_with(UsageError("--public belongs to --push ORG/NAME"), as_json, 2)


def refuse_to_spread(source: str, destination: Path, layout: str, as_json: bool, **given: object) -> None:
    """Exit with 2 for options, `given` with their values, that GGUF files and MLX's layout cannot go with."""
    what = "a GGUF file" if names_gguf(source, destination) else "--layout mlx" if layout == MLX else ""
    wrong = [f"--{option}" for option, value in given.items() if value and (option, layout) != ("push", MLX)]
    if wrong and what:
        exit_with(UsageError(f"{', '.join(wrong)}: not for {what}, which is converted in one go"), as_json, 2)
