#!/bin/sh
# What else is to be heard, as text out: demo/other-audio.sh FOLDER, where train.jsonl, valid.jsonl and test.jsonl have
# lines of the tasks emotion, sex, sound, keyword, lid or topic. Each is a new state on the adapter of a run that
# recognises speech, init_from, which stays as it is. Variables as in demo-state-tuning.sh.
#   OP=eval sh demo/other-audio.sh FOLDER
# A recorded experiment with the 3B model; not run with real weights.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
data=${1:-}

. "$root/demo/env.sh"
needs_manifests "$data" train valid test
shift
export proj_dir="${proj_dir-$root/output/other-audio}" device="${device-1}" micro_bsz="${micro_bsz-16}"
export train_data="${train_data-$data/train.jsonl}" valid_data="${valid_data-$data/valid.jsonl}"
export eval_data="${eval_data-$data/test.jsonl}"
if [ "${OP:-train}" = train ]; then
    set -- --init_from "${init_from-$root/output}" --freeze adapter \
        --feature_cache "${feature_cache-$proj_dir/frames}" "$@"
fi
exec sh "$root/demo/demo-state-tuning.sh" "$@"
