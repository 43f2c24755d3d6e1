"""The errors that fp4cast raises.

Each message names the file and the tensor, what was expected, what was found, and what to do next::

    Fp4CastError
     ├── UsageError              the options contradict each other or the checkpoint's family
     ├── CheckpointError         a checkpoint that is damaged, inconsistent or unsupported
     │    ├── HeaderError        a safetensors header that is malformed, or does not fit its file
     │    ├── IndexFileError     an index that disagrees with its shards, or leaves the directory
     │    ├── PartnerError       codes without scales, or scales without codes
     │    ├── ShapeError         codes and scales whose shapes or dtypes do not fit together
     │    ├── ScaleError         an E8M0 scale byte of 255 (NaN)
     │    └── UnsupportedError   a checkpoint without MXFP4 weights, or in a layout that fp4cast refuses
     ├── InexactError            no tensor scale makes a domain exact, and `nearest` was not asked for
     ├── InputScaleError         W4A4 without usable activation scales
     ├── DatasetError            calibration data that cannot be read, or holds no text
     ├── DestinationError        the destination exists, is locked, or belongs to another conversion
     ├── QuantizerError          a model whose quantizers are not calibrated, or do not match its checkpoint
     ├── EngineError             a cluster or worker process that cannot do the work, or lost it
     ├── MissingExtraError       an optional package that is not installed
     ├── PlatformError           a system without the calls of POSIX that checkpoints are read and written with
     └── VerificationError       the written values differ from the source's
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DatasetError",
    "DestinationError",
    "EngineError",
    "Fp4CastError",
    "HeaderError",
    "IndexFileError",
    "InexactError",
    "InputScaleError",
    "MissingExtraError",
    "PartnerError",
    "PlatformError",
    "QuantizerError",
    "ScaleError",
    "ShapeError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
]


class Fp4CastError(Exception):
    """Base of every error that fp4cast raises on purpose."""


class UsageError(Fp4CastError):
    """Options that contradict each other or the checkpoint's family."""


class CheckpointError(Fp4CastError):
    """A checkpoint that is damaged, inconsistent or unsupported."""


class HeaderError(CheckpointError):
    """A safetensors header that is malformed, or does not fit its file."""


class IndexFileError(CheckpointError):
    """An index that disagrees with its shards, or names a file outside of the directory."""


class PartnerError(CheckpointError):
    """Codes without scales, or scales without codes."""


class ShapeError(CheckpointError, ValueError):
    """Codes and scales whose shapes or dtypes do not fit together; a `ValueError` too, as the original raises."""


class ScaleError(CheckpointError):
    """An E8M0 scale byte of 255, which is NaN."""


class UnsupportedError(CheckpointError):
    """A checkpoint without MXFP4 weights, or in a layout that fp4cast refuses."""


class InexactError(Fp4CastError):
    """No tensor scale represents every block of a domain exactly."""


class InputScaleError(Fp4CastError):
    """W4A4 without usable activation scales."""


class DatasetError(Fp4CastError):
    """Calibration data that cannot be read, or holds no text."""


class DestinationError(Fp4CastError):
    """The destination exists, is locked by another writer, or belongs to another conversion."""


class QuantizerError(Fp4CastError):
    """A model whose quantizers are not calibrated, or do not match its checkpoint."""


class EngineError(Fp4CastError):
    """A cluster or a worker process that cannot do the work, or lost it."""


class MissingExtraError(Fp4CastError):
    """An optional package that is not installed."""


class PlatformError(Fp4CastError):
    """A system without the calls of POSIX that checkpoints are read and written with, as Windows is."""


class VerificationError(Fp4CastError):
    """The written values differ from the source's."""
