"""The logits that llama.cpp computes for a few tokens, on a CPU: `python llama_logits.py MODEL.gguf OUT.npy`."""

import sys

import llama_cpp
import numpy as np

TOKENS = (1, 5, 9, 3, 7, 2, 8, 4)


def logits(path):
    """float32 [tokens, vocabulary]."""
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise SystemExit(f"{path}: was not loaded")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = 64
    options.n_threads = options.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"{path}: was not computed")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(TOKENS), words)).copy()


if __name__ == "__main__":
    np.save(sys.argv[2], logits(sys.argv[1]))
