#!/usr/bin/env bash
# Train the box model: fetch the art, train every stage in order, measure it, and write
# FOLDER/model, what the package carries. Run again, it resumes.
#
#   bash configs/box/train.sh [FOLDER [VARIANT]]    runs/box on a CPU; variants: configs/box/base.py
#
# CLIP trains twice: the second time from the first, on larger batches, which hold more pictures of
# one concept in several styles, and with stronger scaling and shifting.
set -euo pipefail
out=${1:-runs/box}
variant=${2:+:$2}

train() { # folder, config, flags
    echo "== $1"
    unclip train --config="box/$2$variant" --workdir="$out/$1" "${@:3}"
    [[ -d $out/$1/model ]] || exit 0 # stopped by SIGTERM: saved, and not finished
}

unclip styles build --size 48 64 256
train first/clip clip
train clip clip --config.init="$out/first/clip" --config.data.augment=0.25 \
    --config.train.batch_size=512 --config.train.learning_rate=5e-4 --config.train.steps=400
train prior prior --config.clip="$out/clip"
train canvas canvas --config.clip="$out/clip" --config.prior="$out/prior"
train decoder decoder --config.clip="$out/clip" --config.prior="$out/prior" \
    --config.canvas="$out/canvas"
train upsampler upsampler

echo "== evaluate"
python -c "import sys; from unclip_jax.pipeline.unclip import UnCLIP
UnCLIP.load(sys.argv[1]).save(sys.argv[1] + '/model', 'bfloat16')" "$out"
unclip evaluate --model "$out/model" --data emoji_styles --num 500 --out "$out/evaluation"
