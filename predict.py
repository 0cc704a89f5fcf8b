"""Print what is said in audio files."""

import sys
from collections.abc import Sequence

from rwkv_speech.config import PredictConfig
from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.flags import parse


def predict(config: PredictConfig) -> None:
    """One line per file: its text, and before it its name if there are several.

    A broken file does not stop the others; it is named at the end.
    """
    # Imported here: wrong flags and --help are answered before torch is there.
    from tqdm import tqdm

    from rwkv_speech.batch import BadSample
    from rwkv_speech.checks import audio_files, before_prediction
    from rwkv_speech.decoding.options import Options
    from rwkv_speech.decoding.transcribe import transcribe
    from rwkv_speech.devices import compute_of
    from rwkv_speech.models.parts import Parts
    from rwkv_speech.models.speech_lm import SpeechLM

    before_prediction(config)
    files = audio_files(config)
    parts, compute = Parts.of(config), compute_of(config)
    model = SpeechLM.from_pretrained(config.checkpoint or config.proj_dir, parts, compute, config.task or "asr")
    num_broken = 0
    results = transcribe(model, files, config.micro_bsz, config.task, Options.of(config))
    for number, result in tqdm(results, total=len(files), unit="file", disable=None if len(files) > 1 else True):
        name = files[number]
        if isinstance(result, BadSample):
            if len(files) == 1:
                raise UserError(result.reason)
            num_broken += 1
            tqdm.write(f"error: {result.reason}", file=sys.stderr)
            continue
        tqdm.write(result.text if len(files) == 1 else f"{name}\t{result.text}")
        if result.cut:
            tqdm.write(f"warning: {name}: the text was cut off; raise --max_new_tokens", file=sys.stderr)
    if num_broken:
        raise UserError(
            f"--file_path: {num_broken} of {len(files)} files could not be read; the others' texts are above"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: predict(parse(PredictConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
