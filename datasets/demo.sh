#!/usr/bin/env bash
# Renders moving shapes, trains on them and samples: 7 to 10 minutes on 2 CPU cores, more training with a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
data=datasets/moving-shapes-demo
results=results/demo

train() {
    $python EqM/train.py --data-path $data/train --video --clip-len 4 --no-flip --image-size 32 --warmup-steps 100 \
        --grad-clip 1 "$@"
}

# The steps of EqM-Ti/4 that fit into 6.5 minutes. They have to be known: the learning rate falls to 0 at the last one.
count_steps() {
    rm -rf $results-timing
    train "$@" --max-steps 40 --log-every 10 --results-dir $results-timing >&2
    $python - $results-timing/*/metrics.jsonl <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
seconds = (rows[-1]["training_seconds"] - rows[0]["training_seconds"]) / (rows[-1]["step"] - rows[0]["step"])
print(min(max(round(390 / seconds), 800), 2500))
PYTHON
    rm -r $results-timing
}

$python datasets/make_moving_shapes.py $data --shapes circle triangle
if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    settings=(--model EqM-S/4 --temporal-patch 2 --global-batch-size 32 --lr 5e-4 --ema-decay 0.995 --use-bf16)
    steps=10000
    descent=(--stepsize 0.006 --num-sampling-steps 100)
else
    # Chosen by trial on 2 cores. With the field as output this time is enough for 16 pixels. With fixed positions it is
    # enough for a third more steps, and outlines come out torn.
    settings=(--model EqM-Ti/4 --temporal-patch 4 --global-batch-size 16 --predict clip --positions rotary
        --optimizer muon --lr 3e-3 --lr-schedule linear --ema-decay 0.99)
    steps=$(count_steps "${settings[@]}")
    descent=(--num-sampling-steps 32)
fi
train "${settings[@]}" --max-steps "$steps" --log-every 100 --max-minutes 10 --results-dir $results

run=$(find $results -mindepth 1 -maxdepth 1 -name '*-EqM-*' | sort | tail -n 1)
checkpoint=$(find "$run/checkpoints" -name '*.pt' | sort | tail -n 1)
$python EqM/sample_gd.py --ckpt "$checkpoint" --folder "$run/videos" --num-fid-samples 24 --cfg-scale 2 "${descent[@]}"
echo
echo "videos:        $run/videos"
echo "contact sheet: $run/videos-sheet.png (each row of frames is one video, under the class asked for)"
