#!/usr/bin/env bash
# Train the box model: fetch the art, then every stage in order. Run again, it resumes.
#
#   bash configs/box/train.sh [FOLDER [VARIANT]]     runs/box and nothing; or gpu: configs/box/base.py
set -euo pipefail
out=${1:-runs/box}
variant=${2:+:$2}

python -m unclip_jax.data.styles build --size 48 64 256
for stage in clip decoder prior upsampler; do
    echo "== $stage"
    clip=()
    if [[ $stage == prior || $stage == decoder ]]; then clip=("--config.clip=$out/clip"); fi
    python train.py --config="configs/box/$stage.py$variant" --workdir="$out/$stage" "${clip[@]}"
done

echo "== evaluate"
python -m unclip_jax.evaluate --model "$out" --data emoji_styles --num 500 --json "$out/figures.json"
