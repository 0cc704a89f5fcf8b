"""Score trained weights: what each task of every data set is measured by, and the speed; or compare two results."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.config import EvalConfig
from rwkv_speech.errors import exit_code
from rwkv_speech.flags import parse


def score_all(config: EvalConfig) -> None:
    """Print and write the scores of each data set in --eval_data."""
    # Imported here: wrong flags and --help are answered before torch is there.
    from tqdm import tqdm

    from rwkv_speech.checks import before_evaluation
    from rwkv_speech.models.checkpoint import find_checkpoint, load_trained
    from rwkv_speech.reports.evaluation import write_evaluation
    from rwkv_speech.scoring.cascade import cascade
    from rwkv_speech.scoring.evaluate import evaluate, result_stem
    from rwkv_speech.scoring.processes import Progress

    before_evaluation(config)
    weights = "untrained" if config.untrained else str(find_checkpoint(config.checkpoint or Path(config.proj_dir)))
    then = {} if config.untrained else load_trained(weights).metrics  # of the training
    epoch = f", epoch {then['epoch']}" if "epoch" in then else ""
    print(f"weights: {weights}{epoch}" + (f", in training {then['validation']}" if "validation" in then else ""))
    with tqdm(total=0, unit="utterance", disable=None, leave=False) as bar:

        def show(progress: Progress) -> None:
            bar.total += progress.total
            bar.update(progress.done)

        for result in evaluate(config, show):
            stem = Path(config.proj_dir) / result_stem(result.name, weights)
            paths, note = result.write(stem.parent, stem.name), ""
            try:
                paths.append(write_evaluation(result, stem.with_name(f"{stem.name}.html"), weights))
            except ModuleNotFoundError as error:
                note = f"\n  note: no page, for it needs the package {error.name}: pip install 'rwkv-speech[train]'"
            if config.cascade:
                beside = cascade(config, result)
                paths += beside.write(stem.parent, stem.name.replace("eval-", "cascade-", 1))
                note += f"\n{beside.report()}"
            bar.write(f"{result.report()}\n  written to {', '.join(map(str, paths))}{note}")


def compare_two(config: EvalConfig) -> None:
    """Print and write how the second of two results differs from the first."""
    from rwkv_speech.scoring.compare import compare

    found = compare(config.compare, config.results[0], config.normalizer, config.seed)
    print(found.report())
    print(f"  written to {', '.join(map(str, found.write(Path(config.proj_dir))))}")


def run(config: EvalConfig) -> None:
    """What the flags ask for."""
    return compare_two(config) if config.compare else score_all(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: run(parse(EvalConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
