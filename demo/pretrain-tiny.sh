#!/usr/bin/env bash
# Makes the embedded default again: about six hours on two cores. demo/pretrain-tiny.sh [FOLDER] leaves the shipped
# one alone and writes rwkv6.safetensors, vocab.txt, wavlm/ and, with the same vocabulary, rwkv7/ into FOLDER.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/output/tiny}

steps=${steps-13000}
steps7=${steps7-4600}
hours=${hours-8}
epoch_count=${epoch_count-4}

. "$root/demo/env.sh"
setup_environment
"$python" -m rwkv_speech.synthetic.pretrain_lm --out "$out" --world 1 --vocab 2048 --n_layer 4 --n_embd 192 --compile 1 \
    --steps "$steps"
mkdir -p "$out/rwkv7"
cp "$out/vocab.txt" "$out/rwkv7"
"$python" -m rwkv_speech.synthetic.pretrain_lm --out "$out/rwkv7" --world 1 --vocab 2048 --n_layer 4 --n_embd 192 \
    --version 7 --steps "$steps7"
"$python" -m rwkv_speech.synthetic.pretrain_encoder --out "$out/wavlm" --hours "$hours" --epochs "$epoch_count"
echo "written to $out; copy it over src/rwkv_speech/tiny/weights to make it the default"
