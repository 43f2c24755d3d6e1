"""Convert a small gpt-oss checkpoint to NVFP4, verify it, and read the report."""

import tempfile
from pathlib import Path

import fp4cast
from fp4cast.miniatures import make


def main() -> None:
    """Replace the miniature by a directory of yours, or by a Hugging Face model id."""
    with tempfile.TemporaryDirectory() as scratch:
        source, destination = make("gpt-oss", Path(scratch, "gpt-oss")), Path(scratch, "gpt-oss-NVFP4")
        fp4cast.convert(source, destination)
        report = fp4cast.verify(source, destination)
        print(f"{report.family}: {report.tensors['cast']} tensors, half-blocks {dict(report.half_blocks)}")
        print("exact" if report.exact else f"rounded: {[tensor.name for tensor in report.inexact]}")
        for difference in report.differences:
            print("differs:", difference)


if __name__ == "__main__":
    main()
