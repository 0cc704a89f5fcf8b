"""Print what is said in audio files."""

import sys
from collections.abc import Sequence

from rwkv_speech.config import PredictConfig, parse
from rwkv_speech.errors import UserError, exit_code


def predict(config: PredictConfig) -> None:
    """One line per file: its text, and before it its name if there are several.

    A broken file does not stop the others; it is named at the end.
    """
    # Imported here: wrong flags and --help are answered before torch is there.
    from rwkv_speech.audio import AudioError, load_audio
    from rwkv_speech.devices import compute_of
    from rwkv_speech.models.speech_lm import Parts, SpeechLM
    from rwkv_speech.ops import native

    files = [name for name in config.file_path.split(",") if name]
    if not files:
        raise UserError("--file_path: found nothing, expected one or more audio files separated by commas")
    native.choose(config.wkv6)
    path, compute = config.checkpoint or config.proj_dir, compute_of(config)
    model = SpeechLM.from_pretrained(path, Parts.of(config), compute.lm_dtype, compute.device, compute.encoder_dtype)
    config.check_sizes(model.origin.n_layer, model.origin.n_embd)
    broken = []
    for start in range(0, len(files), config.micro_bsz):
        readable = {}
        for name in files[start : start + config.micro_bsz]:
            try:
                readable[name] = load_audio(name)
            except AudioError as error:
                broken.append(str(error))
        for name, result in zip(
            readable,
            model.transcribe(list(readable.values()), config.micro_bsz, config.max_new_tokens),
            strict=True,
        ):
            print(result.text if len(files) == 1 else f"{name}\t{result.text}")
            if result.cut:
                print(f"warning: {name}: the text was cut off; raise --max_new_tokens", file=sys.stderr)
    if broken:
        raise UserError("\n".join(broken))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: predict(parse(PredictConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
