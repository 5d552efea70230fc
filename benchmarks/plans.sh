#!/bin/bash
# The plans of docs/plans made anew: all, or those whose names begin with an argument.
#
#     benchmarks/plans.sh prior clip-v5e
#
# PYTHON names another interpreter: rows of h100 want one with jax's CUDA plugin. What was compiled
# before is kept (see unclip_jax/plan/kept.py). A Transformer takes minutes, a U-Net up to an hour.
set -e
cd "$(dirname "$0")/.."

plan() { # NAME CONFIG TOPOLOGY FSDP [FLAG...]
  local name=$1 config=$2 topology=$3 fsdp=$4
  shift 4
  [ ${#wanted[@]} = 0 ] || matches "$name" || return 0
  echo "== $name"
  "${PYTHON:-.venv/bin/python}" -m unclip_jax plan --config="configs/paper/$config.py" \
    --topology="$topology" --mesh="fsdp=$fsdp" --json="docs/plans/$name.json" "$@" | tail -4
}
matches() {
  local prefix
  for prefix in "${wanted[@]}"; do [[ $1 == "$prefix"* ]] && return 0; done
  return 1
}

wanted=("$@")
for config in prior ar_prior clip; do
  plan "$config-v5e" "$config" v5e:16x16 16
  plan "$config-v5p" "$config" v5p:4x4x8 4
  plan "$config-v6e" "$config" v6e:16x16 8
  plan "$config-2xv5p" "$config" 2xv5p:4x4x8 4
  plan "$config-h100" "$config" h100:8x8 8
done
plan decoder-v5e decoder v5e:16x16 32
plan decoder-v5p decoder v5p:4x4x8 8 --config.train.grad_accum=2
plan decoder-v6e decoder v6e:16x16 16
plan decoder-h100 decoder h100:8x8 8 --config.train.grad_accum=2
plan upsampler_256-v5e upsampler_256 v5e:16x16 16
plan upsampler_256-v5p upsampler_256 v5p:4x4x8 4 --config.train.grad_accum=2
plan upsampler_256-v6e upsampler_256 v6e:16x16 8
plan upsampler_1024-v5e upsampler_1024 v5e:16x16 8
plan upsampler_1024-v5p upsampler_1024 v5p:4x4x8 2
plan upsampler_1024-v6e upsampler_1024 v6e:16x16 4
"${PYTHON:-.venv/bin/python}" -m unclip_jax plan --table=docs/plans
