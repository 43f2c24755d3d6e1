# Options of huggingface_example.sh; sourced by it.

usage() {
  cat <<EOF
usage: $(basename "$0") --model SRC --quant QFORMAT [options]

  --model SRC              a directory, or a Hugging Face model id
  --quant QFORMAT          nvfp4, nvfp4_mlp_only, nvfp4_experts_only, nvfp4_omlp_only or w4a16_nvfp4
  --cast_mxfp4_to_nvfp4    keep the weights of an MXFP4 checkpoint, bit for bit
  --dataset FILE|ID        text to calibrate activations on; every format but w4a16_nvfp4 needs it
  --calib N                samples, at most (512)
  --calib_seq N            tokens of a sample, at most (512)
  --calib_batch_size N     samples that run together (as many as fit)
  --device NAME            cpu, cuda, cuda:N or auto
  --export_path DST        the directory to make (saved_models_NAME_QFORMAT)
  --trust_remote_code      run model code that the checkpoint brings along
  --overwrite              replace DST

\`fp4cast ptq --help\` says more of each.
EOF
}

# Sets MODEL, QFORMAT, EXPORT_PATH, and ARGS: what is handed on to fp4cast ptq.
parse_options() {
  MODEL="" QFORMAT="" EXPORT_PATH="" ARGS=()
  while [ $# -gt 0 ]; do
    local name=$1 value
    case $name in
      -h | --help) usage && exit 0 ;;
      --cast_mxfp4_to_nvfp4 | --trust_remote_code | --overwrite) ARGS+=("$name") && shift && continue ;;
      --*=*) value=${name#*=} name=${name%%=*} && shift ;;
      --*)
        [ $# -ge 2 ] && [[ $2 != --* ]] || fail "$name needs a value"
        value=$2 && shift 2
        ;;
      *) fail "unexpected argument: $name" ;;
    esac
    case $name in
      --model) MODEL=$value ;;
      --quant) QFORMAT=$value ;;
      --export_path) EXPORT_PATH=$value ;;
      --dataset | --calib_seq | --device) ARGS+=("$name" "$value") ;;
      --calib) ARGS+=(--calib_size "$value") ;;
      --calib_batch_size) ARGS+=(--batch_size "$value") ;;
      *) fail "unknown option: $name" ;;
    esac
  done
  [ -n "$MODEL" ] || fail "--model is missing"
  [ -n "$QFORMAT" ] || fail "--quant is missing"
  local base=${MODEL%/}
  EXPORT_PATH=${EXPORT_PATH:-saved_models_${base##*/}_$QFORMAT}
}

fail() {
  echo "error: $1 (--help lists the options)" >&2
  exit 2
}
