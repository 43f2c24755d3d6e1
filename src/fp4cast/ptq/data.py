"""Calibration data: a text file, a JSON-lines file or a Hub dataset, as batches of token ids.

Samples that share a batch have the same length: nothing is padded, so no quantizer observes padding.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4cast.errors import DatasetError, MissingExtraError, UsageError
from fp4cast.extras import require
from fp4cast.parallel.ranges import spans

_KEYS = ("text", "content", "article", "prompt", "question")
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Dataset:
    """A source of calibration text.

    Attributes:
        name: as given.
        path: the local file; None for a Hub dataset.
    """

    name: str
    path: Path | None

    def records(self) -> Iterator[Any]:
        """Strings, or lists of chat messages, in the order of the data.

        Raises:
            DatasetError: a line or record that holds no text.
        """
        if self.path is None:
            yield from _hub_records(self.name)
        elif self.path.suffix in _LINES:
            with self.path.open("rb") as lines:  # as many as are wanted, of however many
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _record(_json(line, self.path, number), f"{self.path}, line {number}")
        else:
            yield _text(self.path)

    @property
    def whole(self) -> bool:
        """Whether it is one long text, which is cut into samples, and not samples that are truncated."""
        return self.path is not None and self.path.suffix not in _LINES


def check_counts(calib_size: int | Sequence[int] | None, calib_seq: int | None, batch_size: int) -> None:
    """Check that samples and tokens are positive or None, and the batch size positive, 0 (automatic) or None.

    Raises:
        UsageError: one of them is not.
    """
    sizes = [calib_size] if calib_size is None or isinstance(calib_size, int) else [*calib_size]
    for name, number, least in (
        *(("calib_size", size, 1) for size in sizes),
        ("calib_seq", calib_seq, 1),
        ("batch_size", batch_size, 0),
    ):
        if number is not None and number < least:
            raise UsageError(f"--{name}: expected at least {least}, got {number}")


def open_datasets(names: str | Sequence[str], sizes: int | Sequence[int]) -> list[tuple[Dataset, int]]:
    """Open datasets, each with the number of samples to take of it.

    Args:
        names: a list, or one string with commas between (a file whose name has a comma is one dataset).
        sizes: one for each dataset; the last holds for those left, too.

    Raises:
        UsageError: there are more sizes than datasets, or none.
        DatasetError, MissingExtraError: see `open_dataset`.
    """
    if isinstance(names, str):
        names = [names] if Path(names).is_file() else names.split(",")
    counts = [sizes] if isinstance(sizes, int) else [*sizes]
    if names and not 1 <= len(counts) <= len(names):
        raise UsageError(f"--calib_size: expected one size for each of {len(names)} datasets, got {len(counts)}")
    counts += counts[-1:] * (len(names) - len(counts))
    return [(open_dataset(name), count) for name, count in zip(names, counts, strict=False)]


def open_dataset(name: str) -> Dataset:
    """Open a file if it exists, else a Hub dataset.

    Raises:
        DatasetError: neither can be read.
        MissingExtraError: a Hub dataset needs `datasets`.
    """
    path = Path(name)
    if path.is_file():
        if not path.stat().st_size:
            raise DatasetError(f"{path}: is empty")
        return Dataset(name, path)
    if path.suffix or name.count("/") > 1 or name.startswith((".", "~")):
        raise DatasetError(f"{name}: no such file; expected a text or .jsonl file, or the id of a Hub dataset")
    require("datasets", "datasets")
    return Dataset(name, None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as UTF-8: {error}") from error


def _json(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}, line {number}: is not valid JSON: {error}") from error


def _record(record: Any, where: str) -> Any:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        if isinstance(messages := record.get("messages"), list) and messages:
            return messages
        for key in _KEYS:
            if isinstance(text := record.get(key), str):
                return text
    keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise DatasetError(f"{where}: expected one of the keys messages, {', '.join(_KEYS)}; got {keys[:200]}")


def _hub_records(name: str) -> Iterator[Any]:
    datasets = require("datasets", "datasets")
    try:
        for number, record in enumerate(datasets.load_dataset(name, split="train", streaming=True)):
            yield _record(dict(record), f"{name}, record {number}")
    except (DatasetError, MissingExtraError):
        raise
    except Exception as error:  # anything that the Hub, the network or a builder raises
        raise DatasetError(f"{name}: cannot be loaded from the Hub: {error}") from error


def tokenize(dataset: Dataset, tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """Tokenize the first samples of a dataset.

    Args:
        dataset: the source of the text.
        tokenizer: a transformers tokenizer.
        count: samples, at most.
        length: tokens of a sample, at most.

    Returns:
        Token ids int64 [1, n] of each, 1 <= n <= length.

    Raises:
        DatasetError: there is no sample.
    """
    samples = list(islice(_samples(dataset, tokenizer, length), count))
    if not samples:
        raise DatasetError(f"{dataset.name}: holds no text to calibrate on")
    return samples


def tokenize_all(datasets: Iterable[tuple[Dataset, int]], tokenizer: Any, length: int) -> list[Tensor]:
    """Tokenize the first samples of several datasets, one dataset after the other; see `tokenize`."""
    return [sample for data, count in datasets for sample in tokenize(data, tokenizer, count, length)]


def _samples(dataset: Dataset, tokenizer: Any, length: int) -> Iterator[Tensor]:
    for record in dataset.records():
        chat = isinstance(record, list)  # its template writes the special tokens
        text = _render(dataset, tokenizer, record) if chat else record
        special = not chat and not dataset.whole
        tokens = torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        pieces = torch.split(tokens, length) if dataset.whole else (tokens[:length],)
        yield from (piece[None] for piece in pieces if len(piece))


def _render(dataset: Dataset, tokenizer: Any, messages: list[Any]) -> str:
    if not tokenizer.chat_template:
        raise DatasetError(f"{dataset.name}: holds chat messages, and the model's tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # anything that a template raises
        raise DatasetError(f"{dataset.name}: the model's chat template refuses a conversation: {error}") from error


def split(samples: Iterable[Tensor], size: int) -> list[Tensor]:
    """Batches [n, length] of samples of one length, n up to `size`; lengths in the order in which they first occur."""
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for sample in samples:
        groups[sample.shape[1]].append(sample)
    return [torch.cat(group[a:b]) for group in groups.values() for a, b in spans(0, len(group), size)]
