"""The quantizer that transformers calls while it loads a checkpoint in the ModelOpt layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.base import HfQuantizer

from fp4cast.errors import CheckpointError, UnsupportedError, UsageError
from fp4cast.hf.config import ModelOptNvfp4Config
from fp4cast.hf.dequantize import Dequantize
from fp4cast.hf.placement import places, reading
from fp4cast.hf.validate import check_partners, check_places, headers
from fp4cast.layouts.modelopt import MODELOPT


class ModelOptNvfp4Quantizer(HfQuantizer):
    """Reads NVFP4 into plain weights. It quantizes nothing.

    The order of events: `update_weight_conversions` checks the checkpoint and returns converters that start with a
    `Dequantize`; the loader collects a parameter's codes and scales in one of them, on the parameter's device;
    `postprocess_model` leaves a model as if it had never been quantized.
    """

    requires_calibration = True
    quantization_config: ModelOptNvfp4Config

    def __init__(self, quantization_config: ModelOptNvfp4Config, **kwargs: Any) -> None:
        """See transformers.

        Raises:
            UsageError: the checkpoint is not quantized.
        """
        if not kwargs.get("pre_quantized", True):
            raise UsageError("fp4cast.hf reads NVFP4 checkpoints and quantizes none: pass no quantization_config")
        super().__init__(quantization_config, **kwargs)
        self._files: Sequence[str] = ()
        self._faults: list[str] = []
        self._conversions: list[tuple[WeightTransform, WeightTransform | None]] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """Default to BF16: transformers would otherwise take the dtype of the first tensor, maybe of a scale."""
        if getattr(config, "dtype", None) is None:
            config.dtype = torch.bfloat16
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError("codes and scales cannot be sharded: load without tp_plan and distributed_config")
        self._files = kwargs.get("checkpoint_files") or ()
        if not self._files:
            raise UsageError("fp4cast.hf reads checkpoints from files: pass no state_dict")

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Check the checkpoint, and make the model's conversions read it.

        Raises:
            CheckpointError: a tensor is missing, left over, or malformed.
        """
        self._conversions = reading(weight_conversions, self._faults)
        conversions = [each for each, _ in self._conversions]
        tensors, claims = headers(self._files), self.quantization_config.claims
        if claims.kv_cache:  # transformers caches in the model's dtype
            scales = {name for name in tensors if name.endswith(MODELOPT.kv_scales)}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in scales}
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *map(re.escape, MODELOPT.kv_scales)}
        codes = check_partners(tensors, claims)
        check_places(places(tensors.values(), conversions, model), codes, claims, model)
        return conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Read codes and scales as they are; the dtype applies to the weights made of them."""
        operation = next(iter(getattr(converter, "operations", ())), None)
        if not isinstance(operation, Dequantize):
            return super().get_new_dtype(converter, param, dtype)
        operation.dtype = dtype or torch.bfloat16
        return None

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Make the loaded model a plain one.

        Raises:
            CheckpointError: a scale was NaN, or not positive.
        """
        super().postprocess_model(model, **kwargs)
        text = model.config.get_text_config(decoder=True)
        if hasattr(text, "quantization_config"):
            del text.quantization_config
        # Saving reverts conversions, and must not split weights into codes and scales.
        saving = [plain for each, plain in self._conversions if plain is not None and each.was_used()]
        model._weight_conversions = saving  # type: ignore[assignment]
        if self._faults:
            others = f" (and {len(self._faults) - 1} more)" if len(self._faults) > 1 else ""
            raise CheckpointError(self._faults[0] + others)

    def is_serializable(self) -> bool:
        """True: the loaded model is a plain one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the loaded model is a plain one."""
        return True
