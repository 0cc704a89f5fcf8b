#!/bin/sh
# Conversations with the 3B model: demo/conversation.sh FOLDER, where the lines of train.jsonl, valid.jsonl and
# test.jsonl have `turns`, each of audio or typed text and its answer. The recurrent state is the memory from turn to
# turn; training sees each conversation as one sequence. Variables as in demo-state-tuning.sh.
#   OP=eval sh demo/conversation.sh FOLDER
#   python predict.py --proj_dir output/conversation --session talk.session question.wav
# A recorded experiment; not run with real weights.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
data=${1:-}

. "$root/demo/env.sh"
needs_manifests "$data" train valid test
shift
export proj_dir="${proj_dir-$root/output/conversation}" ctx_len="${ctx_len-4096}" micro_bsz="${micro_bsz-1}"
export train_data="${train_data-$data/train.jsonl}" valid_data="${valid_data-$data/valid.jsonl}"
export eval_data="${eval_data-$data/test.jsonl}"
if [ "${OP:-train}" = train ]; then
    # From a run that recognises speech: listening is known before conversation is learned. Empty: from nothing.
    set -- --task chat --accumulate "${accumulate-4}" --init_from "${init_from-$root/output}" "$@"
fi
exec sh "$root/demo/demo-state-tuning.sh" "$@"
