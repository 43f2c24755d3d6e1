"""NVFP4 in transformers, after `import fp4cast.hf`. Knows transformers' loader, but not how checkpoints are made.

`from_pretrained` then reads what `convert` writes in the layouts of `quant_method` "modelopt" and "modelopt_mixed".
Weights take the requested dtype, or BF16, tensor by tensor, on the device that each is loaded to; the model
is then a plain one, without a quantizer and without a quantization_config, and `save_pretrained` writes it as such.
Before it reads a weight, it checks every tensor of the checkpoint, and raises a `CheckpointError` for one that is
missing, left over, or not as the config says. The extra `ptq` installs what it needs.
"""

from __future__ import annotations

import logging
from typing import Any

from fp4cast.hf import _require  # noqa: F401
from fp4cast.hf.config import METHODS, ModelOptNvfp4Config
from fp4cast.hf.native import EitherConfig, EitherQuantizer
from fp4cast.hf.quantizer import ModelOptNvfp4Quantizer

__all__ = ["METHODS", "ModelOptNvfp4Config", "ModelOptNvfp4Quantizer", "register"]


def register(replace: bool = False) -> tuple[str, ...]:
    """Make transformers read the methods of `METHODS` with fp4cast; done at import, and harmless when repeated.

    Where transformers itself has a method, each checkpoint goes to whoever serves it: to transformers on GPUs that its
    NVFP4 runs on, and to fp4cast elsewhere, and for gpt-oss and mixed precision (`fp4cast.hf.native`). A method that
    another package has registered stays as it is, with a line in the log.

    Args:
        replace: read every checkpoint with fp4cast, whoever has registered the method.

    Returns:
        The methods that fp4cast reads now.
    """
    return tuple(method for method in METHODS if _register(method, replace))


def _register(method: str, replace: bool) -> bool:
    from transformers.quantizers import auto

    tables: tuple[dict[str, Any], ...] = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    quantizers, configs = tables
    there = [_owner(table[method]) for table in tables if method in table]
    others = [each for each in there if not each.__module__.startswith(f"{__name__}.")]
    if others and not replace:
        if len(others) == 2 and all(each.__module__.startswith("transformers.") for each in others):
            quantizers[method], configs[method] = EitherQuantizer(others[0]), EitherConfig(others[1])
            return True
        owner = f"{others[0].__module__}.{others[0].__qualname__}"
        logging.getLogger(__name__).warning("%s reads %r: fp4cast.hf.register(replace=True) takes over", owner, method)
        return False
    for table in tables:  # the public functions refuse a registered name, even when this module is reloaded
        table.pop(method, None)
    auto.register_quantizer(method)(ModelOptNvfp4Quantizer)
    auto.register_quantization_config(method)(ModelOptNvfp4Config)
    return True


def _owner(entry: Any) -> Any:
    """The class of somebody else that an entry of transformers' tables stands for, or the entry."""
    return entry.theirs if isinstance(entry, EitherQuantizer | EitherConfig) else entry


register()
