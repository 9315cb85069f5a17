#!/usr/bin/env bash
# Renders moving shapes, trains on them and samples: about 8 minutes on 2 CPU cores, more training with a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
data=datasets/moving-shapes-demo
results=results/demo

# Chosen by trial: on 2 cores, larger pictures, wider tokens, larger batches or more shapes come out worse in the time.
train=(--model EqM-Ti/2 --image-size 16 --temporal-patch 4 --global-batch-size 16 --lr 1e-3 --max-steps 4200)
if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    train=(--model EqM-S/4 --image-size 32 --temporal-patch 2 --global-batch-size 32 --lr 5e-4 --max-steps 10000 --use-bf16)
fi

$python datasets/make_moving_shapes.py $data --shapes circle triangle
$python EqM/train.py --data-path $data/train --video --clip-len 4 --no-flip "${train[@]}" \
    --warmup-steps 100 --grad-clip 1 --ema-decay 0.995 --log-every 100 --max-minutes 7 --results-dir $results

run=$(find $results -mindepth 1 -maxdepth 1 -name '*-EqM-*' | sort | tail -n 1)
checkpoint=$(find "$run/checkpoints" -name '*.pt' | sort | tail -n 1)
$python EqM/sample_gd.py --ckpt "$checkpoint" --folder "$run/videos" --num-fid-samples 24 \
    --stepsize 0.006 --num-sampling-steps 100 --cfg-scale 2
echo
echo "videos:        $run/videos"
echo "contact sheet: $run/videos-sheet.png (each row of frames is one video, under the class asked for)"
