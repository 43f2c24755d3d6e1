#!/usr/bin/env bash
# Quantize a Hugging Face model to NVFP4: a thin entry to `fp4cast ptq`, for those who know ModelOpt's script of this name.
#
#   scripts/huggingface_example.sh --model openai/gpt-oss-20b --quant nvfp4_mlp_only --cast_mxfp4_to_nvfp4 --calib_dataset text.jsonl
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/parser.sh"

parse_options "$@"
exec "${PYTHON:-python3}" -m fp4cast ptq \
  --pyt_ckpt_path "$MODEL" --qformat "$QFORMAT" --export_path "$EXPORT_PATH" "${ARGS[@]}"
