"""`python -m rwkv_speech VERB`: work on runs and checkpoints beside training and decoding."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_speech.config import AnswerConfig, PageConfig, ServeConfig
from rwkv_speech.errors import UserError, exit_code
from rwkv_speech.flags import Parser, parse

if TYPE_CHECKING:
    from rwkv_speech.models.states import States

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


@contextmanager
def _of_extra(name: str) -> Iterator[None]:
    """Says where a package that is not there belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"found no package {error.name}; install rwkv-speech[{name}]") from error


def _merge(given: Namespace) -> Path:
    from rwkv_speech.models.merge import merge

    return merge(given.run, given.folder, given.load_model)


def _page(given: Namespace) -> None:
    config = parse(PageConfig, given.flags, "A page to speak with the model: a microphone, files, turns with memory.")
    with _of_extra("page"):
        from rwkv_speech.serving.page import show
    show(config)


def _predict(given: Namespace) -> int:
    from rwkv_speech.predict import main

    return main(given.flags)


def _push(given: Namespace) -> None:
    from rwkv_speech.reports.card import Sharing, push

    sharing = Sharing(given.license, given.base_model, given.encoder, given.private, given.endpoint)
    print(f"written to {push(given.repo, given.checkpoint or given.proj_dir, sharing, given.folder)}")


def _report(given: Namespace) -> Path:
    from rwkv_speech.reports.page import write_report

    with _of_extra("train"):
        return write_report(given.run)


def _serve(given: Namespace) -> None:
    config = parse(ServeConfig, given.flags, "Answer requests for transcripts, in the API of openai's audio client.")
    with _of_extra("serve"):
        from rwkv_speech.serving.server import serve
    serve(config)


def _list_states(given: Namespace) -> None:
    from rwkv_speech.models.states import described, joined

    print(described(joined(_listed(given.source)).only(_listed(given.tasks))))


def _copy_states(given: Namespace) -> Path:
    from rwkv_speech.models.states import joined

    found = joined(_listed(given.source)).only(_listed(given.tasks))
    return _new_file(found.named(given.name) if given.name else found, given.file)


def _add_states(given: Namespace) -> Path:
    from rwkv_speech.models.states import add_states, read_states

    found = read_states(given.source, given.name or "asr").only(_listed(given.tasks))
    return add_states(given.run, found.named(given.name) if given.name else found)


def _average_states(given: Namespace) -> Path:
    from rwkv_speech.models.states import joined, mean

    return _new_file(mean(joined(_listed(given.source)).only(_listed(given.tasks)), given.name), given.file)


def _interpolate_states(given: Namespace) -> Path:
    from rwkv_speech.models.states import interpolated, joined

    found = joined(_listed(given.source)).only(_listed(given.tasks))
    return _new_file(interpolated(found, given.weight, given.name), given.file)


def _remove_states(given: Namespace) -> Path:
    from rwkv_speech.models.states import remove_states

    return remove_states(given.run, _listed(given.tasks))


def _new_file(states: "States", file: Path) -> Path:
    if file.exists():
        raise UserError(f"{file}: is there already, expected a new file; to put states into it: states add")
    states.write(file)
    return file


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


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

    merge = verbs.add_parser("merge", help="make a base model of a tuned run", allow_abbrev=False)
    merge.add_argument("run", metavar="RUN", type=Path, help="a run's folder or a checkpoint")
    merge.add_argument(
        "folder", metavar="FOLDER", type=Path, help="new folder of the base model and a checkpoint for it"
    )
    merge.add_argument("--load_model", default="", help="the run's base model, where it is no longer where it was")
    merge.set_defaults(verb=_merge)

    page = verbs.add_parser("page", help="speak with it in a browser", add_help=False, prefix_chars="\0")
    page.add_argument("flags", nargs="*")
    page.set_defaults(verb=_page)

    predict = verbs.add_parser("predict", help="print what is said in audio", add_help=False, prefix_chars="\0")
    predict.add_argument("flags", nargs="*")
    predict.set_defaults(verb=_predict)

    _add_push_verb(verbs)
    report = verbs.add_parser("report", help="write a run's report.html again")
    report.add_argument("run", metavar="RUN", type=Path, help="a run's folder, its --proj_dir")
    report.set_defaults(verb=_report)

    server = verbs.add_parser("serve", help="answer requests over HTTP", add_help=False, prefix_chars="\0")
    server.add_argument("flags", nargs="*")
    server.set_defaults(verb=_serve)
    _add_states_verbs(verbs.add_parser("states", help="list, copy, add, mix and remove the states of tasks"))
    return parser


def _add_push_verb(verbs: Any) -> None:
    push = verbs.add_parser("push", help="share a run on the Hugging Face hub", allow_abbrev=False)
    push.add_argument("repo", metavar="NAME/REPO", help="the repository, made if it is new")
    push.add_argument("--proj_dir", default="output", help="the run's folder; its best checkpoint is shared")
    push.add_argument("--checkpoint", default="", help="another checkpoint; empty: the best of --proj_dir")
    push.add_argument("--license", required=True, help="of the weights, as the hub names it, such as apache-2.0")
    push.add_argument("--base_model", default="", help="the base model's id on the hub, for the card")
    push.add_argument("--encoder", default="", help="the encoder's id on the hub, if it was trained with a folder")
    push.add_argument("--private", action="store_true", help="let nobody else see it")
    push.add_argument("--folder", type=Path, help="write to this new folder, and do not ask the hub")
    push.add_argument("--endpoint", default="", help="the hub's address; empty: the usual one")
    push.set_defaults(verb=_push)


def _add_states_verbs(parser: ArgumentParser) -> None:
    """What is done with states; SOURCE and RUN are a run's folder, a checkpoint or a file of states."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[Namespace], Path | None], text: str, *words: str, tasks: bool = False) -> Any:
        found = verbs.add_parser(name, help=text, allow_abbrev=False)
        for word in words:
            found.add_argument(word.lower(), metavar=word, type=Path if word != "SOURCE" else str)
        found.add_argument("--tasks", default="", required=tasks, help="which states, separated by commas; empty: all")
        found.set_defaults(verb=run)
        return found

    verb("list", _list_states, "names, sizes and what they were learned with", "SOURCE")
    copy = verb("copy", _copy_states, "write a file of states, .safetensors, or published, .pth", "SOURCE", "FILE")
    add = verb("add", _add_states, "put states into a run's best checkpoint or a file of states", "SOURCE", "RUN")
    for found in (copy, add):
        found.add_argument("--name", default="", help="another name for the one state")
    average = verb("average", _average_states, "write the mean of states", "SOURCE", "FILE")
    mix = verb("interpolate", _interpolate_states, "write what lies between two states", "SOURCE", "FILE", tasks=True)
    for found in (average, mix):
        found.add_argument("--name", required=True, help="the new state's name")
    mix.add_argument("--weight", required=True, type=float, help="of the second state; the first has 1 - weight")
    verb("remove", _remove_states, "take states out of a checkpoint or a file of states", "RUN", tasks=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""

    def run() -> int:
        given = _parser().parse_args(argv)
        if given.verb is None:
            raise UserError(
                "VERB: found none, expected average, calibrate, export, make_answers, merge, page, predict, push, "
                "report, serve or states; --help says what each does"
            )
        done = given.verb(given)
        if isinstance(done, Path):
            print(f"written to {done}")
        return done if isinstance(done, int) else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
