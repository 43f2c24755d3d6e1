# Options of huggingface_example.sh; sourced by it. docs/generate.py writes what lies between its marks.

usage() {
  cat <<EOF
usage: $(basename "$0") --model SRC --quant QFORMAT [options]

As in ModelOpt's script of this name:

EOF
  usage_of_options
  cat <<EOF

Besides:

  --dataset FILE|ID,...      the same as --calib_dataset
  --device NAME              cpu, cuda, cuda:N or auto
  --export_path DST          the directory to make (ROOT_SAVE_PATH/saved_models_NAME_QFORMAT)
  --attn_implementation NAME the attention that transformers runs, such as eager
  --inexact fail|nearest     with the cast, where no tensor scale is exact: stop, or write the nearest values
  --layout NAME              modelopt or compressed-tensors
  --jobs N                   threads that write
  --verbose                  say what was done, as without --no-verbose
  --overwrite                replace DST

The environment variable ROOT_SAVE_PATH names the directory for saved_models_NAME_QFORMAT; without it, it is this one.
\`fp4cast ptq --help\` says more of each.
EOF
}

# docs/generate.py: usage
usage_of_options() {
  cat <<'EOF'
  --model SRC                A directory, or a Hugging Face model id.
  --quant NAME               nvfp4, nvfp4_mlp_only, nvfp4_experts_only, nvfp4_omlp_only: W4A4; nvfp4_mlp_weight_only, w4a16_nvfp4: weights only.
  --kv_cache_quant NAME      Format of the KV cache: none, the default here (fp8_cast is ModelOpt's), and engines choose; fp8: FP8 with calibrated scales; fp8_cast: with scales of 1.
  --cast_mxfp4_to_nvfp4      Keep the weights of an MXFP4 checkpoint, bit for bit.
  --calib_dataset FILE|ID,... Text files, .jsonl files or Hub datasets, to calibrate activations on; commas between several.
  --calib N,...              At most N samples: one N, or one a dataset with commas between; the last holds for those left.
  --calib_seq N              At most N tokens of a sample.
  --calib_batch_size N       Samples of a batch; 0: as many as fit.
  --use_seq_device_map       Fill one GPU after the other, where the model needs several, instead of all alike.
  --gpu_max_mem_percentage SHARE Of each GPU's free memory, for weights; above 0, at most 1.
  --trust_remote_code        Run the model code in the checkpoint.
  --low_memory_mode          Hold the weights of one decoder layer at a time: read to calibrate it, and once more, expert by expert, to export it. The result is the same.
  --no-verbose               --verbose: say each step; --no-verbose: only where the result was written, and what was lost.
  --tp N                     Accepted; changes nothing: a Hugging Face checkpoint is the same for any number of serving GPUs.
  --pp N                     Accepted; changes nothing: a Hugging Face checkpoint is the same for any number of serving GPUs.
  --sparsity dense           Accepted as dense: weights are not made sparse.
  --tasks quant              Accepted as quant, which is what is done.
EOF
}
# end

# docs/generate.py: refusals
refusal() {
  case "$1" in
    --recipe) echo "--recipe: recipes are not read; choose a format with --qformat (--quant)." ;;
    --awq_block_size) echo "--awq_block_size: no AWQ here; NVFP4 blocks always have 16 values, so drop it." ;;
    --auto_quantize_bits) echo "--auto_quantize_bits: no format is searched here; choose one with --qformat (--quant)." ;;
    --auto_quantize_method) echo "--auto_quantize_method: no format is searched here; choose one with --qformat (--quant)." ;;
    --auto_quantize_score_size) echo "--auto_quantize_score_size: no format is searched here; choose one with --qformat (--quant)." ;;
    --auto_quantize_checkpoint) echo "--auto_quantize_checkpoint: no format is searched here; choose one with --qformat (--quant)." ;;
    --moe_calib_experts_ratio) echo "--moe_calib_experts_ratio: the model's own router chooses the experts that a token runs through; drop it, and raise --calib_size to reach more experts." ;;
    --calib_with_images) echo "--calib_with_images: vision towers stay as they are; calibrate on text, with --dataset." ;;
    --lm_eval_tasks) echo "--lm_eval_tasks: nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it." ;;
    --lm_eval_limit) echo "--lm_eval_limit: nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it." ;;
    --simple_eval_tasks) echo "--simple_eval_tasks: nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it." ;;
    --simple_eval_limit) echo "--simple_eval_limit: nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it." ;;
    --mmlu_limit) echo "--mmlu_limit: nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it." ;;
    --input) echo "--input: no engine is started here; give this to the engine that serves the exported directory." ;;
    --output) echo "--output: no engine is started here; give this to the engine that serves the exported directory." ;;
    --batch) echo "--batch: no engine is started here; give this to the engine that serves the exported directory." ;;
    --kv_cache_free_gpu_memory_fraction) echo "--kv_cache_free_gpu_memory_fraction: no engine is started here; give this to the engine that serves the exported directory." ;;
    --vlm) echo "--vlm: no image is run here; drop it: the language model is quantized, vision stays." ;;
    --sparsity=dense) ;;
    --sparsity=*) echo "${1/=/ }: weights are not made sparse here; drop the option, or pass dense." ;;
    --tasks=quant) ;;
    --tasks=*) echo "${1/=/ }: nothing is evaluated here; run the evaluation on the exported directory, in the engine that serves it." ;;
  esac
}
# end

# Sets MODEL, QFORMAT, EXPORT_PATH, and ARGS: what is handed on to fp4cast ptq.
parse_options() {
  local kv=""
  MODEL="" QFORMAT="" EXPORT_PATH="" ARGS=()
  while [ $# -gt 0 ]; do
    local name=${1%%=*} value sentence
    sentence=$(refusal "$name")
    [ -z "$sentence" ] || fail "$sentence"
    case $1 in
      -h | --help) usage && exit 0 ;;
      --cast_mxfp4_to_nvfp4 | --low_memory_mode | --trust_remote_code | --use_seq_device_map | --overwrite | --verbose | --no-verbose)
        ARGS+=("$1") && shift && continue
        ;;
      --*) known "$name" || fail "unknown option: $name" ;;
      *) fail "unexpected argument: $1" ;;
    esac
    if [[ $1 == *=* ]]; then
      value=${1#*=} && shift
    else
      [ $# -ge 2 ] && [[ $2 != --* ]] || fail "$name needs a value"
      value=$2 && shift 2
    fi
    sentence=$(refusal "$name=$value")
    [ -z "$sentence" ] || fail "$sentence"
    case $name in
      --model) MODEL=$value ;;
      --quant) QFORMAT=$value ;;
      --export_path) EXPORT_PATH=$value ;;
      --calib) ARGS+=(--calib_size "$value") ;;
      --calib_dataset) ARGS+=(--dataset "$value") ;;
      --calib_batch_size) ARGS+=(--batch_size "$value") ;;
      --kv_cache_quant) kv=_kv_$value && ARGS+=(--kv_cache_qformat "$value") ;;
      --tp) ARGS+=(--inference_tensor_parallel "$value") ;;
      --pp) ARGS+=(--inference_pipeline_parallel "$value") ;;
      --sparsity | --tasks) ;; # the one value that is accepted is what is done anyway
      *) ARGS+=("$name" "$value") ;;
    esac
  done
  [ -n "$MODEL" ] || fail "--model is missing"
  [ -n "$QFORMAT" ] || fail "--quant is missing"
  local base=${MODEL%/}
  base=${base##*/}
  EXPORT_PATH=${EXPORT_PATH:-${ROOT_SAVE_PATH:-.}/saved_models_${base//[^0-9a-zA-Z-]/_}_$QFORMAT$kv}
}

# Whether an option takes a value.
known() {
  case $1 in
    --model | --quant | --export_path | --calib | --calib_dataset | --calib_batch_size | --kv_cache_quant) ;;
    --tp | --pp | --sparsity | --tasks) ;;
    --dataset | --calib_seq | --device | --gpu_max_mem_percentage | --attn_implementation | --inexact | --layout | --jobs) ;;
    *) return 1 ;;
  esac
}

fail() {
  echo "error: $1 (--help lists the options)" >&2
  exit 2
}
