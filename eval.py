"""Score trained weights: corpus WER and CER of every data set, and the speed."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.config import EvalConfig, parse
from rwkv_speech.errors import exit_code


def score_all(config: EvalConfig) -> None:
    """Print and write the scores of each data set in --eval_data."""
    # Imported here: wrong flags and --help are answered before torch is there.
    import torch

    from rwkv_speech.data.bad_files import BadFileLog
    from rwkv_speech.data.sources import open_source
    from rwkv_speech.devices import compute_of
    from rwkv_speech.models.speech_lm import Parts, SpeechLM
    from rwkv_speech.ops import native
    from rwkv_speech.scoring.evaluate import evaluate

    specs = [spec for spec in config.eval_data.split(",") if spec]
    sources = [open_source(spec, audio_column=config.audio_column, text_column=config.text_column) for spec in specs]
    native.choose(config.wkv6)
    compute = compute_of(config)
    if config.untrained:
        torch.manual_seed(config.seed)
        model = SpeechLM.build(Parts.of(config), compute.lm_dtype, compute.device, compute.encoder_dtype).eval()
    else:
        path = config.checkpoint or config.proj_dir
        model = SpeechLM.from_pretrained(
            path, Parts.of(config), compute.lm_dtype, compute.device, compute.encoder_dtype
        )
    config.check_sizes(model.origin.n_layer, model.origin.n_embd)
    folder = Path(config.proj_dir)
    for spec, source in zip(specs, sources, strict=True):
        bad_files = BadFileLog(folder / "bad_files.jsonl", config.max_bad)
        result = evaluate(model, source, spec, config.micro_bsz, bad_files, config.max_new_tokens)
        print(result.report())
        stem = "untrained-" if config.untrained else "eval-"
        paths = result.write(folder, stem + re.sub(r"[^\w.-]+", "-", Path(spec).stem if Path(spec).exists() else spec))
        print(f"  written to {' and '.join(map(str, paths))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: score_all(parse(EvalConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
