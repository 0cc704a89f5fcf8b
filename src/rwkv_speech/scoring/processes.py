"""Evaluation on one device, or on several side by side, each with its share of every data set."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from rwkv_speech.config import TEXT, EvalConfig
from rwkv_speech.data.source import Source
from rwkv_speech.data.sources import open_source
from rwkv_speech.decoding.options import Options
from rwkv_speech.devices import accelerator, compute_of
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import find_checkpoint
from rwkv_speech.models.parts import Parts
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.scoring.share import Part, Recast, Role, Share, decode


@dataclass(frozen=True)
class Progress:
    """Utterances that are done, and that are there in addition to those told before."""

    done: int = 0
    total: int = 0


def data_sets(config: EvalConfig) -> list[str]:
    """The specifications in --eval_data."""
    return [spec.strip() for spec in config.eval_data.split(",")]


def decode_all(config: EvalConfig, role: Role | None = None) -> Iterator[Progress | list[Part]]:
    """Decode each data set, or with a `role` some of the only one in that: how far it is, and at the end of a set what
    each process found in its share.

    Raises UserError for weights and data that do not fit.
    """
    name, world_size = accelerator(config)
    if world_size == 1:
        for message in _decode(config, role, "cuda" if name == "gpu" else "cpu"):
            yield [message] if isinstance(message, Part) else message
        return
    context = multiprocessing.get_context("spawn")  # neither CUDA nor OpenMP's threads survive a fork
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_work, args=(config, role, rank, world_size, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # the process has it now: where it ends, the pipe does
        yield from _collected([receiver for receiver, _ in pipes])
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collected(pipes: list[Connection]) -> Iterator[Progress | list[Part]]:
    """What all processes send: a set's parts, in the processes' order, once each has sent its own."""
    parts: list[deque[Part]] = [deque() for _ in pipes]
    running = dict(enumerate(pipes))
    while running:
        ready = wait(list(running.values()))
        for rank in [rank for rank, pipe in running.items() if pipe in ready]:
            try:
                message = running[rank].recv()
            except EOFError as error:
                raise UserError(
                    f"--device: process {rank + 1} of {len(pipes)} ended early, expected it to decode its share; if "
                    "nothing above says why, it may have lacked memory: use fewer processes, or a smaller --micro_bsz"
                ) from error
            if isinstance(message, UserError):
                raise message
            if isinstance(message, Part):
                parts[rank].append(message)
            elif message is None:
                del running[rank]
            else:
                yield message
        while all(parts):
            yield [waiting.popleft() for waiting in parts]


def _work(config: EvalConfig, role: Role | None, rank: int, world_size: int, sender: Connection) -> None:
    """One process of several; Ctrl-C is the business of the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gpu = accelerator(config)[0] == "gpu"
    if not gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    try:
        for message in _decode(config, role, f"cuda:{rank}" if gpu else "cpu", rank, world_size):
            sender.send(message)
        sender.send(None)
    except UserError as error:
        sender.send(error)


def _decode(
    config: EvalConfig, role: Role | None, device: str, rank: int = 0, world_size: int = 1
) -> Iterator[Progress | Part]:
    """One process's share of every data set."""
    sources: list[Source] = [
        open_source(spec, audio_column=config.audio_column, text_column=config.text_column)
        for spec in data_sets(config)
    ]
    shares = [Share(Recast(source, role) if role else source, rank, world_size) for source in sources]
    yield Progress(total=sum(map(len, shares)))
    options, (model, task), reads = Options.of(config), _model(config, device), config.input == TEXT
    for share in shares:
        more = task, config.max_bad, config.history == "given", reads
        for found in decode(model, share, config.micro_bsz, options, *more):
            yield found if isinstance(found, Part) else Progress(done=found)


def _model(config: EvalConfig, device: str) -> tuple[SpeechLM, str]:
    """The model, and the state for all utterances, "" where each has its own."""
    parts, compute, task = Parts.of(config), compute_of(config, device), config.task or "asr"
    hears = config.input != TEXT
    if config.untrained:
        torch.manual_seed(config.seed)
        return SpeechLM.build(parts, compute, [task], hears).eval(), config.task
    path = find_checkpoint(config.checkpoint or Path(config.proj_dir))
    model = SpeechLM.from_pretrained(path, parts, compute, task, hears)
    return model, config.task or model.add_states(config.state)
