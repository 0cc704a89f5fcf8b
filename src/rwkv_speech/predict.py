"""Print what is said in audio files or a stream; on demand write it as text, subtitles, tables or JSON."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_speech.config import PredictConfig, output_formats
from rwkv_speech.errors import exit_code
from rwkv_speech.flags import parse

if TYPE_CHECKING:
    from rwkv_speech.decoding.turns import Speaker
    from rwkv_speech.models.speech_lm import SpeechLM


def predict(config: PredictConfig) -> int:
    """The exit code: 1 if anything that was named could not be read. The rest is transcribed all the same.

    Files are written as soon as a transcript is there, whole or not at all, so that an interruption loses none.
    """
    # Imported here: wrong flags and --help are answered before torch is there.
    from rwkv_speech.checks import before_prediction, check_outputs, named_inputs
    from rwkv_speech.data.inputs import find_inputs
    from rwkv_speech.decoding.options import Options
    from rwkv_speech.decoding.results import Transcript, shifted
    from rwkv_speech.decoding.screen import Screen
    from rwkv_speech.decoding.transcriber import Recording, Transcriber
    from rwkv_speech.decoding.writers import Layout, exist, write_transcript
    from rwkv_speech.errors import UserError
    from rwkv_speech.tasks import Naming

    before_prediction(config)
    if config.chat:
        return predict_chat(config)
    if config.stream:
        return predict_stream(config)
    if config.session:
        return predict_session(config)
    formats = output_formats(config.output_format)
    inputs, faults = find_inputs(named_inputs(config))
    check_outputs(config, inputs, formats)
    if config.skip_existing:
        inputs = [found for found in inputs if not exist(Path(config.output_dir, found.output), formats)]
    if not inputs:
        return report(faults)
    model, task = load(config)
    options = Options.of(config)
    naming, states = Naming.among(list(model.initial_states), task), list[str]()
    for found in list(inputs):
        try:
            states.append(naming.state(found.task, found.lang or options.given_language))
        except UserError as error:
            faults.append(f"{found.label}: {error}")
            inputs.remove(found)
    report(faults)
    layout = Layout(config.max_line_width, config.max_line_count, config.max_words_per_line)
    transcriber = Transcriber(model, options, config.micro_bsz)
    screen = Screen(inputs, len(faults), bool(config.verbose))

    def recordings() -> Iterator[Recording]:
        for number, found in enumerate(inputs):
            blocks = partial(screen.watched, found)
            yield Recording(number, found.label, blocks, states[number], found.lang)

    try:
        for recording, result in transcriber.run(recordings()):
            found = inputs[recording.key]
            if isinstance(result, Transcript):
                result = shifted(result, found.offset)
                write_transcript(result, Path(config.output_dir, found.output), formats, layout)
            screen.show(recording.key, result)
    finally:
        screen.close()
    return int(screen.num_skipped > 0)


def predict_stream(config: PredictConfig) -> int:
    """Print what is said in the samples that come from standard input."""
    from rwkv_speech.decoding.live import transcribe_live
    from rwkv_speech.decoding.options import Options
    from rwkv_speech.decoding.transcribe import stream

    # What may still change is shown on a terminal alone.
    pace = config.pace or (0.5 if sys.stdout.isatty() and config.commit == "segment" else None)
    options = Options.of(config)
    model, task = load(config)
    opened = stream(model, options, config.commit, pace, config.stream_rate, config.micro_bsz, task)
    transcribe_live(opened, sys.stdin.buffer, sys.stdout)
    return 0


def predict_session(config: PredictConfig) -> int:
    """Print the answers to the next turns of a conversation, which is saved after each of them."""
    from rwkv_speech.checks import named_inputs
    from rwkv_speech.data.inputs import find_inputs
    from rwkv_speech.decoding.options import Options
    from rwkv_speech.decoding.session import Said, Session

    inputs, faults = find_inputs(named_inputs(config))
    if faults:  # what comes after would answer something else
        return report(faults)
    model, task = load(config, hears=bool(inputs))
    session, options = Session.begun(model, task, config.session), Options.of(config)

    def say(said: Said) -> None:
        for part in session.answer(said, options):
            print(part, end="", flush=True)
        print()
        session.save(config.session)

    for found in inputs:
        say(found.load())
    for line in filter(str.strip, config.text.splitlines()):
        say(line)
    return 0


def predict_chat(config: PredictConfig) -> int:
    """Answer what is said in the samples that come from standard input, turn by turn."""
    from rwkv_speech.decoding.options import Options
    from rwkv_speech.decoding.session import Session
    from rwkv_speech.decoding.transcriber import Transcriber
    from rwkv_speech.decoding.turns import Turns, converse_live

    speaker = speaker_of(config)
    model, task = load(config)
    session, options = Session.begun(model, task, config.session), Options.of(config)
    turns = Turns(Transcriber(model, options, 1).segmenter(), config.turn_silence, config.stream_rate)

    def remember() -> None:
        if config.session:
            session.save(config.session)

    converse_live(session, options, turns, sys.stdin.buffer, sys.stdout, speaker, remember)
    return 0


def speaker_of(config: PredictConfig) -> "Speaker | None":
    """What speaks answers, if anything does."""
    from rwkv_speech.decoding.turns import Speaker, synthesised_by

    name, _, voice = config.speak.partition(":")
    if name != "espeak":
        return Speaker(synthesised_by(config.speak), config.play) if config.speak else None
    from rwkv_speech.synthetic.espeak import Synthesizer, Voice

    synthesizer, chosen = Synthesizer(), Voice(voice or Voice.name)
    print("note: answers are spoken by a synthetic voice (eSpeak NG)", file=sys.stderr)
    return Speaker(lambda text: synthesizer.say(text, chosen).wav(), config.play)


def load(config: PredictConfig, hears: bool = True) -> "tuple[SpeechLM, str]":
    """The model of the checkpoint, or of the run, and the state for all inputs, "" where each has its own."""
    from rwkv_speech.devices import compute_of
    from rwkv_speech.models.parts import Parts
    from rwkv_speech.models.speech_lm import SpeechLM

    parts, compute = Parts.of(config), compute_of(config)
    path = config.checkpoint or Path(config.proj_dir)
    model = SpeechLM.from_pretrained(path, parts, compute, config.task or "asr", hears)
    return model, config.task or model.add_states(config.state)


def report(faults: Sequence[str]) -> int:
    """Say what could not be read; the exit code."""
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: predict(parse(PredictConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
