"""One model in vLLM, in a process of its own: log-probabilities, greedy tokens, memory and rates. For serve.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import fp4cast

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
DEFAULTS = {
    "max_model_len": 256, "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 4 << 30,
    "enable_prefix_caching": False, "disable_log_stats": True,
}  # fmt: skip
PREFILL, DECODE = (8, 1024, 1), (32, 16, 128)  # prompts, their tokens, new tokens
ROUNDS = 9


def serve(path: Path, out: Path, options: dict[str, Any], rates: bool) -> None:
    """In a process of its own: load, and write what was found."""
    import torch
    from vllm import LLM, SamplingParams

    from fp4cast.vllm import register

    register()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    watch_loading(found)
    longest = {"max_model_len": 2048} if rates else {}
    start = time.perf_counter()
    llm = LLM(str(path), skip_tokenizer_init=True, **(DEFAULTS | longest | options))
    found["load_seconds"] = time.perf_counter() - start
    sampling = SamplingParams(
        max_tokens=16, temperature=0, prompt_logprobs=0, logprobs=5, detokenize=False, ignore_eos=True
    )
    outputs = llm.generate(prompts(llm, 3, 64), sampling, use_tqdm=False)
    found["logprobs"] = [[next(iter(step.values())).logprob for step in each.prompt_logprobs[1:]] for each in outputs]
    found["greedy"] = [list(each.outputs[0].token_ids) for each in outputs]
    if rates:
        found["rates"] = {"prefill": rate(llm, *PREFILL), "decode": rate(llm, *DECODE)}
    out.write_text(json.dumps(found))


def prompts(llm: Any, count: int, tokens: int) -> list[Any]:
    """Random tokens, the same ones in every engine."""
    import torch
    from vllm import TokensPrompt

    generator = torch.Generator().manual_seed(0)
    most = min(500, llm.llm_engine.model_config.get_vocab_size())
    ids = torch.randint(2, most, (count, tokens), generator=generator)
    return [TokensPrompt(prompt_token_ids=each) for each in ids.tolist()]


def watch_loading(found: dict[str, Any]) -> None:
    """Note what vLLM's loader takes, the preparation for the kernels included: seconds, and the GPU's memory.

    Only where the model is loaded in this process: not with several GPUs.
    """
    import torch
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    theirs: Callable[..., Any] = BaseModelLoader.load_model
    cuda = torch.cuda if torch.cuda.is_available() else None

    def load_model(*args: Any, **named: Any) -> Any:
        if cuda:
            cuda.reset_peak_memory_stats()
        before, start = (cuda.memory_allocated() if cuda else 0), time.perf_counter()
        model = theirs(*args, **named)
        if cuda:
            cuda.synchronize()
        found["loader"] = {"seconds": time.perf_counter() - start}
        if cuda:
            found["loader"]["peak_bytes"] = cuda.max_memory_allocated() - before
            found["loader"]["held_bytes"] = cuda.memory_allocated() - before
        return model

    BaseModelLoader.load_model = load_model


def rate(llm: Any, count: int, tokens: int, new: int) -> float:
    """Tokens a second, the median of `ROUNDS` after one that warms up: of the prompts, or the new ones if several."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        llm.generate(prompts(llm, count, tokens), sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return count * (tokens if new == 1 else new) / statistics.median(seconds[1:])


def apart(
    path: Path, label: str, options: dict[str, Any], plugin: Path, *, seconds: float, rates: bool
) -> tuple[dict[str, Any] | None, str]:
    """(what `serve` found, or None, and the end of what it printed)."""
    slug = "".join(c if c.isalnum() else "-" for c in label)
    out, log = path.with_name(f"{slug}.json"), path.with_name(f"{slug}.log")
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(path), str(out), json.dumps(options), *["--rates"] * rates]
    source = str(Path(fp4cast.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (source, str(plugin), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        )  # fmt: skip
        try:
            status: object = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"none: no end after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # an engine's workers keep the GPU's memory
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = log.read_text(errors="replace")
    if out.exists():
        return json.loads(out.read_text()), text
    return None, f"exit status {status}\n{tail(text)}"


def tail(text: str) -> str:
    """The lines that say why: the last ones that name an error, and the last ones."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line][-4:]
    return "\n".join(line[-300:] for line in dict.fromkeys([*errors, *lines[-6:]]))


def entry_point(path: Path) -> Path:
    """A folder that makes vLLM's own processes find the plugin where fp4cast runs from its source."""
    if not any(each.name == "fp4cast" for each in metadata.entry_points(group="vllm.general_plugins")):
        info = path / f"fp4cast-{fp4cast.__version__ if hasattr(fp4cast, '__version__') else '0'}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fp4cast\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfp4cast = fp4cast.vllm:register\n")
    return path


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), "--rates" in sys.argv)
