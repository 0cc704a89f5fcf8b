"""The embedded default: a tiny frozen RWKV-6, or RWKV-7, and a tiny frozen WavLM, made by demo/pretrain-tiny.sh."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"
# The names that `load_model` knows; of the encoder and the vocabulary, which both share, the first alone.
NAME = "tiny"
BASE_MODELS = {NAME: _WEIGHTS / "rwkv6.safetensors", "tiny7": _WEIGHTS / "rwkv7.safetensors"}
VOCAB_FILE = _WEIGHTS / "vocab.txt"
ENCODER = _WEIGHTS / "wavlm"

# Short words need finer audio tokens than the 100 ms of the published setting: 3 frames are 60 ms.
STACK = 3
ADAPTER_HIDDEN = 512

# The tiny encoder's convolutions: 10 ms filters every 1.25 ms, then two stages of smoothing to 50 Hz. They can start
# as a filter bank, which two cores train in minutes; WavLM-Large's seven small ones would need hours to become one.
CONV_KERNELS = (160, 8, 8)
CONV_STRIDES = (20, 4, 4)
