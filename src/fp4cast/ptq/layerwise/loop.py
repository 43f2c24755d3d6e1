"""`ptq --low_memory_mode`: calibrate an empty model's quantizers layer by layer, and read its weights for export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fp4cast.errors import UnsupportedError
from fp4cast.parallel.progress import Progress
from fp4cast.ptq.data import split
from fp4cast.ptq.layerwise.parameters import Weights
from fp4cast.ptq.layerwise.run import BATCH, find_decoder, run_layers
from fp4cast.ptq.load import explain_run_errors
from fp4cast.ptq.max_calibration import calibrate_weight
from fp4cast.ptq.modules import is_bank, quantized_weights
from fp4cast.ptq.quantizer import TensorQuantizer


class LayerLoop:
    """A forward loop for `max_calibrate`: weights and inputs of a layer are observed while its weights are in memory.

    Args:
        model: on the meta device, with quantizers.
        weights: its checkpoint's; they must stay open until the export is written.
        samples: token ids; none where only weights are quantized.
        batch_size: samples that run together; 0 for 4 on a CPU and 16 on a GPU.
        progress: called with ("layers", layers just done, total layers).

    Raises:
        UnsupportedError: a quantized weight lies outside of the decoder's layers.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, samples: Sequence[Tensor], batch_size: int, progress: Progress
    ) -> None:
        self.batch_size = batch_size or BATCH[torch.device(weights.device).type]
        self._weights, self._samples, self._progress = weights, samples, progress
        found = list(quantized_weights(model))
        self._quantizers = {name: quantizer for name, quantizer, _ in found}
        self._dtypes = {name: rows.dtype for name, _, rows in found}
        layers = f"{find_decoder(model)[0]}.layers.".lstrip(".")
        if outside := [name for name in self._quantizers if not name.startswith(layers)]:
            raise UnsupportedError(
                f"--low_memory_mode runs {layers}* one by one, but {outside[0]} lies outside of them; drop the option"
            )
        for module in model.modules():
            if isinstance(module, TensorQuantizer):
                module.place(weights.device)

    def __call__(self, model: nn.Module) -> None:
        """Run all layers."""
        for quantizer in self._quantizers.values():
            quantizer.reset_amax()  # it is on the meta device, as the weights were
        with explain_run_errors():
            run_layers(
                model, self._weights, split(self._samples, self.batch_size), self, partial(self._progress, "layers")
            )

    def __enter__(self) -> None:
        """A layer begins to run."""

    def __exit__(self, *_: object) -> None:
        """A layer has run."""

    def watch(self, weights: Mapping[str, Tensor]) -> None:
        """Observe the weights of the layer that will run: its quantizers observe their inputs by themselves."""
        for name, weight in weights.items():
            if name in self._quantizers:
                calibrate_weight(name, self._quantizers[name], weight.transpose(-1, -2) if is_bank(name) else weight)

    def rows(self, name: str, expert: int) -> Tensor:
        """One expert of a quantized weight, or a projection, [N, K]: read from the checkpoint."""
        return self._weights.rows(name, expert, self._dtypes[name])
