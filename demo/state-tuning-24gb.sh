#!/bin/sh
# The 1.6B model on one GPU of 24 GB: the recorded experiment of demo-state-tuning.sh with other sizes. The same variables.
#   OP=eval sh demo/state-tuning-24gb.sh
# Memory is computed by `--plan 1`, not measured: see the README.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
export load_model=${load_model-$root/RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth}
export proj_dir=${proj_dir-$root/output/1b6}
export n_layer=${n_layer-24} n_embd=${n_embd-2048}
# 8 utterances twice are the 16 of the published setting.
export device=${device-1} micro_bsz=${micro_bsz-8} grad_cp=${grad_cp-0}
if [ "${OP:-train}" = train ]; then set -- --accumulate 2 "$@"; fi
exec sh "$root/demo/demo-state-tuning.sh" "$@"
