"""Say what a conversion would do to a checkpoint: how many binades its scale domains span, what it fits into."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import fp4cast
from fp4cast.miniatures import make


def main(source: str | Path) -> None:
    """Writes nothing; `source` is a directory or a Hugging Face model id."""
    info = fp4cast.inspect(source)
    print(f"{info.title}: exact {info.exact}, in Marlin kernels too {info.marlin_exact}")
    for spread, count in sorted(Counter(domain.spread for domain in info.domains).items()):
        print(f"{spread} binades: {count} domains")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else make("kimi-k3", Path(scratch, "kimi-k3")))
