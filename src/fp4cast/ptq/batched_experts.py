"""The forward passes of experts in one tensor [E, K, N], with every product's input and weight quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp4cast.errors import UnsupportedError


def _through(module: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize an input and a batched weight."""
    quantizer, weight = getattr(module, f"{name}_weight_quantizer"), getattr(module, name)
    if quantizer.is_enabled:
        weight = quantizer(weight.transpose(-1, -2).contiguous()).transpose(-1, -2)
    return getattr(module, f"{name}_input_quantizer")(x), weight


def _gpt_oss_forward(
    self: Any, hidden_states: Tensor, router_indices: Tensor | None = None, routing_weights: Tensor | None = None
) -> Tensor:
    """Transformers' eager gpt-oss experts, with every product's input and weight quantized."""
    if router_indices is None or routing_weights is None:
        raise UnsupportedError("gpt-oss experts need router_indices and routing_weights")
    states, gate_up_proj = _through(self, "gate_up_proj", hidden_states)
    result = torch.zeros_like(hidden_states)
    routed = []
    for expert in sorted(set(router_indices.flatten().tolist())):
        if expert < self.num_experts:
            slot, token = torch.where(expert == router_indices.T)  # in transformers' order: rows that round alike
            gate_up = states[token] @ gate_up_proj[expert] + self.gate_up_proj_bias[expert]
            routed.append((expert, token, slot, self._apply_gate(gate_up)))
    if not routed:
        return result
    # One input quantizer for all experts: it sees what all of them take in.
    gated, down_proj = _through(self, "down_proj", torch.cat([gate for *_, gate in routed]))
    parts = torch.split(gated, [len(token) for _, token, *_ in routed])
    for (expert, token, slot, _), part in zip(routed, parts, strict=True):
        out = part @ down_proj[expert] + self.down_proj_bias[expert]
        result.index_add_(0, token, (out * routing_weights[token, slot, None]).to(result.dtype))
    return result


def _llama4_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Transformers' Llama-4 experts, with every product's input and weight quantized."""
    states = hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size)
    states, gate_up_proj = _through(self, "gate_up_proj", states)
    gate, up = torch.bmm(states, gate_up_proj).chunk(2, dim=-1)
    gated, down_proj = _through(self, "down_proj", up * self.act_fn(gate))
    result: Tensor = torch.bmm(gated, down_proj).view(-1, self.hidden_size)
    return result


# By the module and the name of the class in transformers.
FORWARDS = {
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"): _gpt_oss_forward,
    ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts"): _llama4_forward,
}
