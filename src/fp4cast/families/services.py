"""The rows of `families.served`: one for each thing that we ran, or read in an engine's source.

A source is a file and the lines (a name where the stored copy has none) of the version in the row, or what ran it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp4cast.formats import Activations

# serves: ran there, with right answers. loads: its loader built the model, with the right values. should: its source
# reads exactly this. fails: refuses, or loads it wrong. open: nothing is known yet, and nothing is claimed.
Verdict = Literal["serves", "loads", "should", "fails", "open"]

W4A16: tuple[Activations, ...] = ("w4a16",)
W4A4: tuple[Activations, ...] = ("w4a4",)
BOTH: tuple[Activations, ...] = ("w4a16", "w4a4")

# "kimi-k3+fp8" is what `--fp8 attention` makes of a family.
# Where nobody could know the model beforehand: `ptq` exports any with banks of experts.
ANY_BANKS = "any banks"


@dataclass(frozen=True, slots=True)
class Service:
    """What one engine does with one kind of result.

    Attributes:
        family: the name of a `Family`.
        layout: the name of a layout.
        activations: the kinds it holds for.
        engine: its name, with what has to be installed beside it.
        version: the one that was run or read.
        verdict: what it does.
        date: when it was run or read.
        source: what was run, or the file and lines that were read.
        why: the reason of a failure, or a limit.
        models: "dense" or "experts" where it holds for these only.
        seen: it was run by us; otherwise read.
    """

    family: str
    layout: str
    activations: tuple[Activations, ...]
    engine: str
    version: str
    verdict: Verdict
    date: str
    source: str
    why: str = ""
    models: Literal["", "dense", "experts"] = ""
    seen: bool = False

    @property
    def release(self) -> str:
        """The engine with its version, "transformers 5.23.0 + fp4cast.hf"."""
        name, plus, plugin = self.engine.partition(" + ")
        return " ".join(part for part in (name, self.version) if part) + plus + plugin


_TESTED = "2026-11-25"
_READ = "2026-11-25"

_H100 = "benchmarks/serve.py on an H100, Marlin kernels; log-probabilities beside those of the same model in BF16"
_VLLM_LOADER = "tests/oracles/vllm_loader.py: its own loader on a CPU, every value compared"
_HF = "tests/hf/test_hf.py: from_pretrained on a CPU, every value compared"

# Of an engine, the newest version first. A row is changed only by who ran or read again, with the new date.
SERVICES: tuple[Service, ...] = (
    Service(
        "gpt-oss", "modelopt", BOTH, "transformers + fp4cast.hf", "5.23.0", "loads", _TESTED, _HF,
        "dequantized to BF16 while it loads", seen=True,
    ),
    Service(
        "gpt-oss", "modelopt", W4A4, "TensorRT-LLM", "1.2 and newer", "should", _READ,
        "_torch/models/modeling_gpt_oss.py: load_nvfp4_weights (pull request 8956)",
        "attention stays unquantized; no pipeline parallelism",
    ),
    Service(
        "gpt-oss", "modelopt", W4A16, "TensorRT-LLM", "1.2 and newer", "fails", _READ,
        "_torch/models/modeling_gpt_oss.py: GptOssForCausalLM.__post_init__; "
        "_torch/modules/fused_moe/fused_moe_marlin.py at 06d4e71: can_implement",
        "translates the exceptions of `NVFP4` alone, so attention would be taken for quantized; its W4A16 kernel for "
        "Hopper has no gpt-oss activation",
    ),
    Service(
        "gpt-oss", "modelopt", BOTH, "vLLM", "0.33.0", "fails", _READ,
        "model_executor/models/gpt_oss.py:1376-1401; model_executor/layers/quantization/modelopt.py:926-1026",
        "no name for the scales of the banks, which are dropped; no parameter for the experts' biases (issue 46641)",
    ),
    Service(
        "gpt-oss", "modelopt", BOTH, "vLLM + fp4cast.vllm", "0.26.0", "serves", _TESTED, _H100,
        "hidden 256 and 2880, up to 32 experts, TP 2 and EP 2, CUDA graphs; on an H100, W4A4 is computed as W4A16",
        seen=True,
    ),
    Service(
        "gpt-oss", "modelopt", BOTH, "vLLM + fp4cast.vllm", "0.32.0", "loads", _TESTED, _VLLM_LOADER,
        "input scales are not used; TP 2 and EP 2 too", seen=True,
    ),
    Service(
        "gpt-oss", "modelopt", BOTH, "SGLang", "0.5.23", "fails", _READ,
        "srt/models/gpt_oss.py:1215-1288; srt/layers/moe/fused_moe_triton/layer.py:1825-1841; "
        "srt/layers/quantization/modelopt_quant.py:2467-2648",
        "scales and biases of the banks find no parameter and are skipped without a word",
    ),
    Service(
        "deepseek-v4", "modelopt", W4A4, "vLLM", "0.33.0", "should", _READ,
        "models/deepseek_v4/quant_config.py:117-148,210-229; models/deepseek_v41/quant_config.py:111-124,240-260",
        "V4, not V4.1, takes MTP experts for NVFP4 as well: no speculative decoding with it there",
    ),
    Service(
        "deepseek-v4", "modelopt", W4A4, "SGLang", "0.5.23", "should", _READ,
        "srt/configs/model_config.py:774-793; srt/model_loader/loader.py:225-249; "
        "srt/layers/quantization/modelopt_quant.py:1731-1767",
        "on Blackwell; MTP experts stay MXFP4",
    ),
    Service(
        "gpt-oss-experts", "modelopt", BOTH, "vLLM", "0.32.0", "fails", _READ,
        "model_executor/models/gpt_oss.py:1204-1281",
        "gate_proj and up_proj of single experts, and tensor scales, find no parameter and are skipped without a word",
    ),
    Service(
        "gpt-oss-experts", "modelopt", BOTH, "SGLang", "0.5.23", "fails", _READ,
        "srt/models/gpt_oss.py:1213-1288", "single experts find no parameter and are skipped without a word",
    ),
    Service(
        "gpt-oss-experts", "modelopt", BOTH, "transformers + fp4cast.hf", "5.23.0", "fails", _TESTED,
        "tests/families/test_gpt_oss_experts.py", "refuses: gpt-oss has no parameter for a single expert's bias",
        seen=True,
    ),
    Service(
        "gpt-oss-experts", "compressed-tensors", BOTH, "vLLM", "0.32.0", "fails", _READ,
        "model_executor/models/gpt_oss.py:1204-1281",
        "gate_proj and up_proj of single experts, and tensor scales, find no parameter and are skipped without a word",
    ),
    Service(
        "gpt-oss-experts", "compressed-tensors", BOTH, "SGLang", "0.5.23", "fails", _READ,
        "srt/models/gpt_oss.py:1213-1288", "single experts find no parameter and are skipped without a word",
    ),
    Service(
        "gpt-oss-experts", "compressed-tensors", BOTH, "transformers", "5.23.0", "fails", _TESTED,
        "tests/families/test_gpt_oss_experts.py", "leaves the experts at random values; a table lists them as missing",
        seen=True,
    ),
    Service(
        "mimo-v2.6", "modelopt", W4A4, "SGLang", "0.5.23", "should", _READ,
        "srt/configs/model_config.py:774-793; srt/model_loader/loader.py:225-249; "
        "srt/layers/quantization/modelopt_quant.py:1731-1767; srt/models/mimo_v2.py:1708-1727",
        "on Blackwell",
    ),
    Service(
        "mimo-v2.6", "modelopt", W4A4, "vLLM", "0.32.0", "fails", _READ,
        "model_executor/layers/quantization/fp8.py:150-215",
        "looks for NVFP4 experts beside FP8 in DeepSeek-V4 alone, and takes these for FP8",
    ),
    Service(
        "ling-3", "modelopt", W4A4, "SGLang", "0.5.23", "should", _READ,
        "srt/configs/model_config.py:774-793; srt/model_loader/loader.py:225-249; "
        "srt/layers/quantization/modelopt_quant.py:1731-1767; srt/models/bailing_moe_v3.py:1937-1955",
        "on Blackwell; no speculative decoding: it leaves the draft's experts out, which are NVFP4, too",
    ),
    Service(
        "ling-3", "modelopt", W4A4, "vLLM", "0.32.0", "fails", _READ,
        "model_executor/layers/quantization/fp8.py:150-215",
        "looks for NVFP4 experts beside FP8 in DeepSeek-V4 alone, and takes these for FP8",
    ),
    Service(
        "kimi-k3", "modelopt", BOTH, "vLLM", "0.33.0", "should", _READ,
        "model_executor/layers/quantization/modelopt.py:1748-1842,1889-1906; "
        "models/kimi_k3/nvidia/model.py:768-777,1296-1301",
    ),
    Service(
        "kimi-k3", "modelopt", BOTH, "SGLang", "0.5.23", "should", _READ,
        "srt/layers/quantization/modelopt_quant.py:978-1031,1080-1092; "
        "srt/models/kimi_k3.py:2565-2569,3169-3174,3476-3483",
    ),
    Service(
        "kimi-k3", "compressed-tensors", BOTH, "vLLM", "0.33.0", "should", _READ,
        "model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/"
        "compressed_tensors_moe.py:145-160; models/kimi_k3/nvidia/model.py:1296-1301",
    ),
    Service(
        "compressed-tensors", "modelopt", BOTH, "vLLM", "0.26.0", "serves", _TESTED, _H100,
        "TP 2 and EP 2 too; on an H100, W4A4 is computed as W4A16", seen=True,
    ),
    Service(
        "compressed-tensors", "modelopt", BOTH, "vLLM", "0.32.0", "loads", _TESTED, _VLLM_LOADER,
        "dense models generate, too, with its emulation", seen=True,
    ),
    Service(
        "compressed-tensors", "modelopt", BOTH, "transformers + fp4cast.hf", "5.23.0", "loads", _TESTED, _HF,
        "dequantized to BF16 while it loads", seen=True,
    ),
    Service(
        "compressed-tensors", "modelopt", BOTH, "SGLang", "0.5.23", "should", _READ,
        "srt/layers/quantization/modelopt_quant.py:1595-1702,978-1009,1036-1094; "
        "srt/layers/moe/fused_moe_triton/layer.py:1797-1822",
        "W4A16 experts run on Marlin only",
    ),
    Service(
        "compressed-tensors", "modelopt", W4A4, "TensorRT-LLM", "main", "should", _READ,
        "quantization/modelopt_config.py at 2edf354: parse_modelopt_quant_config; "
        "_torch/modules/linear.py: NVFP4LinearMethod.load_weight_scales",
        models="dense",
    ),
    Service(
        "compressed-tensors", "compressed-tensors", W4A16, "vLLM", "0.26.0", "serves", _TESTED, _H100, seen=True,
    ),
    Service(
        "compressed-tensors", "compressed-tensors", BOTH, "vLLM", "0.32.0", "loads", _TESTED, _VLLM_LOADER,
        "dense models generate, too, with its emulation", seen=True,
    ),
    Service(
        "compressed-tensors", "compressed-tensors", W4A16, "transformers", "5.23.0", "loads", _TESTED,
        "tests/oracles/test_libraries.py, with compressed-tensors 0.20", models="dense", seen=True,
    ),
    Service(
        "compressed-tensors", "compressed-tensors", W4A16, "transformers", "5.23.0", "fails", _TESTED,
        "tests/oracles/test_contracts.py, with compressed-tensors 0.20",
        "drops the tensor scale of experts: weights too large by 1/S, and no warning", models="experts", seen=True,
    ),
    Service(
        "compressed-tensors", "compressed-tensors", BOTH, "SGLang", "0.5.23", "should", _READ,
        "srt/layers/quantization/compressed_tensors/compressed_tensors.py:589-629,754-780,959-975",
        "W4A4 without Blackwell runs as W4A16",
    ),
    Service(
        "compressed-tensors", "compressed-tensors", W4A16, "TensorRT-LLM", "main", "fails", _READ,
        "models/quant_config_utils.py at 21156a7: _quant_config_from_config_group",
        "reads the strategy of `input_activations`, which is null",
    ),
    Service(
        "kimi-k3+fp8", "modelopt", BOTH, "vLLM", "0.32.0", "should", _READ,
        "model_executor/layers/quantization/modelopt.py:1717-1796,1813-1866,2214-2268,2693-2704; "
        "models/kimi_k3/nvidia/kda.py:626-654; model_executor/layers/linear.py:84-93,1535-1621",
        "on a CPU its linear layers hold the values of the files (tests/oracles/vllm_kimi.py); where parts of a matrix "
        "end within a block it mixes their scales, so that such parts stay in BF16",
    ),
    Service(
        "compressed-tensors+fp8", "modelopt", BOTH, "vLLM", "0.32.0", "loads", _TESTED, _VLLM_LOADER,
        models="experts", seen=True,
    ),
    Service(
        ANY_BANKS, "modelopt", BOTH, "transformers + fp4cast.hf", "5.23.0", "loads", _TESTED, _HF,
        "banks as gpt-oss has them", seen=True,
    ),
)  # fmt: skip
