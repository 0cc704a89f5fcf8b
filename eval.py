"""Score trained weights: corpus WER and CER of every data set, and the speed."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.config import EvalConfig
from rwkv_speech.errors import exit_code
from rwkv_speech.flags import parse


def score_all(config: EvalConfig) -> None:
    """Print and write the scores of each data set in --eval_data."""
    # Imported here: wrong flags and --help are answered before torch is there.
    import torch
    from tqdm import tqdm

    from rwkv_speech.checks import before_evaluation
    from rwkv_speech.data.bad_files import BadFileLog
    from rwkv_speech.data.sources import open_source
    from rwkv_speech.decoding.options import Options
    from rwkv_speech.devices import compute_of
    from rwkv_speech.models.checkpoint import find_checkpoint
    from rwkv_speech.models.parts import Parts
    from rwkv_speech.models.speech_lm import SpeechLM
    from rwkv_speech.scoring.evaluate import evaluate, result_stem

    before_evaluation(config)
    weights = "untrained" if config.untrained else find_checkpoint(config.checkpoint or config.proj_dir)
    specs = [spec.strip() for spec in config.eval_data.split(",")]
    sources = [open_source(spec, audio_column=config.audio_column, text_column=config.text_column) for spec in specs]
    parts, compute, task = Parts.of(config), compute_of(config), config.task or "asr"
    if config.untrained:
        torch.manual_seed(config.seed)
        model = SpeechLM.build(parts, compute, [task]).eval()
    else:
        model = SpeechLM.from_pretrained(weights, parts, compute, task)
    then = model.metrics  # of the training
    epoch = f", epoch {then['epoch']}" if "epoch" in then else ""
    print(f"weights: {weights}{epoch}" + (f", WER in training {100 * then['wer']:.2f} %" if "wer" in then else ""))
    folder = Path(config.proj_dir)
    for spec, source in zip(specs, sources, strict=True):
        bad_files = BadFileLog(folder / "bad_files.jsonl", config.max_bad)
        with tqdm(total=len(source), unit="utterance", desc=spec, disable=None, leave=False) as bar:
            limits = (config.micro_bsz, bad_files, Options.of(config))
            result = evaluate(model, source, spec, *limits, task=config.task, progress=bar.update)
        print(result.report())
        paths = result.write(folder, result_stem(spec, str(weights)))
        print(f"  written to {' and '.join(map(str, paths))}")
        if skipped := bad_files.summary():
            print(f"  {skipped}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: score_all(parse(EvalConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
