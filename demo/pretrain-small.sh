#!/usr/bin/env bash
# A small RWKV-6, or with version=7 RWKV-7, of your own text, with which all else runs on any computer:
#   demo/pretrain-small.sh FOLDER [FOLDER@WEIGHT ...]
# A FOLDER holds .txt files; below en/, es/, fr/, it/ and ru/ they are also learned as noisy phone transcripts, which lets
# the model read what an adapter hears, and files of the same name and number of lines as translations of each other.
# Start it again and it is resumed. On two cores the sizes below take about an hour and a half. With tcmalloc
# in LD_PRELOAD a run took 1.8 GB in place of 8, and less time; but twice the process that makes the lessons died in it.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# = 0 ]; then
    echo "usage: demo/pretrain-small.sh FOLDER [FOLDER@WEIGHT ...]: found no folder of .txt files" >&2
    exit 2
fi
out=${out-$root/output/small}
version=${version-6} # or 7
n_layer=${n_layer-4}
n_embd=${n_embd-256}
# Short tokens are soon read: with 4,096 the model wrote 45 % of the tokens of held-out lines that it heard rightly, with 640
# 74 %. world: the World vocabulary, for a larger model.
vocab=${vocab-640}
steps=${steps-6000}
positions=${positions-4000}
device=${device-cpu}
compile=${compile-0}

. "$root/demo/env.sh"
setup_environment
"$python" -m rwkv_speech.synthetic.pretrain_lm --out "$out" --texts "$(IFS=, && echo "$*")" --version "$version" \
    --n_layer "$n_layer" --n_embd "$n_embd" --vocab "$vocab" --steps "$steps" --positions "$positions" --device "$device" --compile "$compile"
echo "written to $out: train on it with load_model=$out/rwkv$version.safetensors, and but for vocab=world" \
    "with --vocab_file $out/vocab.txt"
