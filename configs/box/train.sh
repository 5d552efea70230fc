#!/usr/bin/env bash
# Train the box model: fetch the art, train every stage in order, measure it, and write
# FOLDER/model, what the package carries. Run again, it resumes.
#
#   bash configs/box/train.sh [FOLDER [VARIANT]]    runs/box on a CPU; variants: configs/box/base.py
#
# On two CPU cores that other work used as well: CLIP 36 minutes, prior 15, canvas 13. The
# decoder's 10,000 steps take about 5 hours (1360 took 41 minutes); the upsampler's were not timed.
# One sample of the prior a caption, of one draw in 4 steps, took 3 minutes; the configs ask for two
# samples of two draws in 6 steps, 6 times that.
set -euo pipefail
out=${1:-runs/box}
variant=${2:+:$2}

train() { # folder, config, flags
    echo "== $1"
    unclip train --config="box/$2$variant" --workdir="$out/$1" "${@:3}"
    [[ -d $out/$1/model ]] || exit 0 # stopped by SIGTERM: saved, and not finished
}

unclip styles build --data emoji_art --size 48 64 256
train clip clip
train prior prior --config.clip="$out/clip"
train canvas canvas --config.clip="$out/clip" --config.prior="$out/prior"
train decoder decoder --config.clip="$out/clip" --config.prior="$out/prior" \
    --config.canvas="$out/canvas"
train upsampler upsampler

echo "== evaluate"
python -c "import sys; from unclip_jax.pipeline.unclip import UnCLIP
UnCLIP.load(sys.argv[1]).save(sys.argv[1] + '/model', 'bfloat16')" "$out"
python benchmarks/box.py --model "$out/model" --out "$out/evaluation"
