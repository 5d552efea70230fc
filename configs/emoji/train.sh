#!/usr/bin/env bash
# Train every stage small on emoji, draw a captioned grid, and measure. Run again, it resumes.
set -euo pipefail
out=${1:-runs/emoji}

for stage in clip prior decoder upsampler; do
    echo "== $stage"
    clip=()
    if [[ $stage == prior || $stage == decoder ]]; then clip=("--config.clip=$out/clip"); fi
    unclip train --config="emoji/$stage" --workdir="$out/$stage" "${clip[@]}"
done

echo "== sample"
prompts=("red apple" "green heart" "blue book" "yellow heart" "pizza" "cat face" "flag of France"
    "sunflower" "full moon" "green apple" "orange circle" "evergreen tree")
args=()
for prompt in "${prompts[@]}"; do args+=(--prompt "$prompt"); done
unclip sample text2im --model "$out" "${args[@]}" --num 4 --seed 0 --out "$out/grid.png"

echo "== evaluate"
unclip evaluate --model "$out" --data emoji --num 100 --out "$out/evaluation"

echo "Look at $out/grid.png; every stage's previews and curves are beside its checkpoints."
