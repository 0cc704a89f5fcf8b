"""Print what is said in audio files or a stream: `python -m rwkv_speech predict`."""

import sys

from rwkv_speech.predict import main

if __name__ == "__main__":
    sys.exit(main())
