"""`python -m rwkv_speech VERB`: work on runs and checkpoints beside training and decoding."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rwkv_speech.config import AnswerConfig
from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.flags import Parser, parse

# Each verb imports what it needs when it runs: --help and wrong words are answered before torch is there.


def _average(given: Namespace) -> Path:
    from rwkv_speech.models.average import average

    average([name for name in given.checkpoints.split(",") if name], given.output)
    return given.output


def _calibrate(given: Namespace) -> Path:
    from rwkv_speech.scoring.calibrate import calibrate

    path, before, now = calibrate(given.run, given.data, given.task)
    print(f"confidence before: {before.report()}\nconfidence now:    {now.report()}\n{now.table()}")
    return path


def _export(given: Namespace) -> Path:
    from rwkv_speech.models.checkpoint import export_published, find_checkpoint, load_trained

    export_published(load_trained(find_checkpoint(given.run)), given.file, given.task)
    return given.file


def _make_answers(given: Namespace) -> Path:
    config = parse(AnswerConfig, given.flags, "Let the frozen text model answer the transcripts of a manifest.")
    from rwkv_speech.decoding.make_answers import make_answers

    return make_answers(config)


def _report(given: Namespace) -> Path:
    from rwkv_speech.reports.page import write_report

    try:
        return write_report(given.run)
    except ModuleNotFoundError as error:
        raise UserError(
            f"report: found no package {error.name}, which draws the page; install rwkv-speech[train]"
        ) from error


def _parser() -> Parser:
    parser = Parser(prog="python -m rwkv_speech", description="Work on runs and checkpoints.")
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(metavar="VERB")

    average = verbs.add_parser("average", help="write the mean of several checkpoints", allow_abbrev=False)
    average.add_argument("--checkpoints", required=True, help="two or more files or folders, separated by commas")
    average.add_argument("--output", required=True, type=Path, help="the file to write, .safetensors")
    average.set_defaults(verb=_average)

    calibrate = verbs.add_parser("calibrate", help="make the confidence of words what it says", allow_abbrev=False)
    calibrate.add_argument("run", metavar="RUN", type=Path, help="a run's folder or a checkpoint, which is changed")
    calibrate.add_argument("--data", required=True, help="what was not trained on, in any form of --valid_data")
    calibrate.add_argument("--task", default="", help="initial state to decode with, where there are several")
    calibrate.set_defaults(verb=_calibrate)

    export = verbs.add_parser("export", help="write a checkpoint in the layout of the published adapter files")
    export.add_argument("run", metavar="RUN", type=Path, help="a run's folder or a checkpoint")
    export.add_argument("file", metavar="FILE", type=Path, help="the file to write, .pth")
    export.add_argument("--task", default="", help="the initial state to write, where there are several")
    export.set_defaults(verb=_export)

    # Its words are left to its own parser: none of them begins a flag here.
    answers = verbs.add_parser("make_answers", help="answer a corpus by text", add_help=False, prefix_chars="\0")
    answers.add_argument("flags", nargs="*")
    answers.set_defaults(verb=_make_answers)

    report = verbs.add_parser("report", help="write a run's report.html again")
    report.add_argument("run", metavar="RUN", type=Path, help="a run's folder, its --proj_dir")
    report.set_defaults(verb=_report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""

    def run() -> None:
        given = _parser().parse_args(argv)
        if given.verb is None:
            raise UserError(
                "VERB: found none, expected average, calibrate, export, make_answers or report; --help says what each "
                "does"
            )
        print(f"written to {given.verb(given)}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
