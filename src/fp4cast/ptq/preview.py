"""What `fp4cast ptq` would write: everything that is known before the model is loaded."""

from __future__ import annotations

from dataclasses import replace

from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG, RECEIPT, SINGLE, companion_sizes
from fp4cast.checkpoints.index import INDEX
from fp4cast.conversion.preview import Preview
from fp4cast.hub.resolve import resolve
from fp4cast.ptq.flow import check
from fp4cast.ptq.options import Options


def preview_export(options: Options) -> Preview:
    """What `quantize` would write. The model is made on the meta device; nothing is downloaded, loaded or written.

    Raises:
        Fp4CastError: what `quantize` would raise before it loads the model, but for texts that cannot be read.
    """
    source = resolve(options.pyt_ckpt_path, download=False)
    job = check(replace(options, pyt_ckpt_path=source), tokenized=False)
    checkpoint = job.opened.checkpoint
    documents = [CONFIG, RECEIPT, *([INDEX] if [*checkpoint.shards] != [SINGLE] else [])]
    documents += [QUANT_CONFIG] if job.target.layout.name == "modelopt" else []
    carried = {str(name): size for name, size in companion_sizes(checkpoint).items()}
    exact = [each.scaling.exact for each in job.domains]
    facts = {
        "source": str(source),
        "qformat": options.qformat,
        "layout": job.target.layout.name,
        "activations": job.target.activations,
        **({"exact": all(exact), "tensors": {"cast": len(exact), "exact": sum(exact)}} if exact else {}),
    }
    return Preview(str(options.export_path), {**dict.fromkeys([*checkpoint.shards, *documents]), **carried}, facts)
