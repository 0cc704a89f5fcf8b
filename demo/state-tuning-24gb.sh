#!/bin/sh
# The 1.6B model on one GPU of 24 GB: the recorded experiment of demo-state-tuning.sh with other sizes. The same variables.
#   OP=eval sh demo/state-tuning-24gb.sh
# Memory is computed by `--plan 1`, not measured: see the README.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
export proj_dir="${proj_dir-$root/output/1b6}" device="${device-1}"
if [ "${OP:-train}" = train ]; then
    export load_model="${load_model-$root/RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth}"
    # 8 utterances twice are the 16 of the published setting.
    export micro_bsz="${micro_bsz-8}" grad_cp="${grad_cp-0}"
    set -- --accumulate "${accumulate-2}" "$@"
fi
exec sh "$root/demo/demo-state-tuning.sh" "$@"
