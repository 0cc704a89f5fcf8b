"""Train the adapter and the initial state of a frozen RWKV-6 that hears through a frozen speech encoder."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from rwkv_speech.config import TEXT, TrainConfig
from rwkv_speech.errors import exit_code
from rwkv_speech.flags import parse


def with_own_folder(config: TrainConfig) -> TrainConfig:
    """With --resume no a --proj_dir that holds no run; nothing is ever deleted."""
    from rwkv_speech.models.checkpoint import LAST
    from rwkv_speech.reports.record import RUN
    from rwkv_speech.training.progress import say

    def holds_run(folder: Path) -> bool:
        return (folder / LAST).exists() or (folder / RUN).exists()

    folder = Path(config.proj_dir)
    if config.resume == "yes" or not holds_run(folder):
        return config
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    free = next(path for path in numbered if not holds_run(path))
    say(f"note: {folder} holds an earlier run; --resume no: this one goes into {free}")
    return dataclasses.replace(config, proj_dir=str(free))


def train(config: TrainConfig) -> None:
    """Build the model and the data that `config` names, train, and say where the weights are."""
    # Imported here: wrong flags are answered before torch is there, other mistakes before Lightning is.
    from rwkv_speech.checks import before_training
    from rwkv_speech.planning.run import is_from_sizes, plan_run

    if config.plan and is_from_sizes(config):
        print(plan_run(config))
        return

    before_training(config)
    import pytorch_lightning as pl

    from rwkv_speech.data.dataset import SpeechDataset
    from rwkv_speech.devices import compute_of
    from rwkv_speech.models.checkpoint import find_checkpoint, load_trained
    from rwkv_speech.models.parts import Parts
    from rwkv_speech.models.peft import load_updates
    from rwkv_speech.models.speech_lm import SpeechLM
    from rwkv_speech.training.ctc import fit_ctc
    from rwkv_speech.training.data import make_datasets, open_train_and_valid, state_names, transcribing
    from rwkv_speech.training.progress import say
    from rwkv_speech.training.run import fit, results, sole_run

    config = with_own_folder(config)
    compute = compute_of(config, "cpu")
    sources = open_train_and_valid(config)
    with nullcontext() if config.plan else sole_run(Path(config.proj_dir)):
        pl.seed_everything(config.seed, verbose=False)
        start = load_trained(find_checkpoint(config.init_from), config.task) if config.init_from else None
        learned, states = state_names(config, *sources, start)
        parts, hears = Parts.of(config), config.input != TEXT
        if start and start.parts and not hears:
            parts = start.parts.read_by(start.path, parts)
        elif start and start.parts:
            parts = parts.starting_from(start.parts, is_frozen=config.adapter_stays)
        model = SpeechLM.build(parts, compute, states, hears)
        if start:
            model.load_trained(start)
        if config.lora_from and parts.lora:
            load_updates(model.lm, config.lora_from, parts.lora, parts.train_parts)
        model.add_soft_prompts(learned, config.soft_prompt)
        model.transcribe_first(transcribing(config, learned, start))
        if config.adapter_stays:
            model.freeze_all_but(learned)
        data, valid, cache = make_datasets(config, model, *sources)
        if config.plan:
            return print(plan_run(config, model, cast(SpeechDataset, data)))  # a stream cannot be planned
        fit(model, config, data, valid, cache)
        if config.ctc:
            fit_ctc(model, config, cast(SpeechDataset, data), cache)
        say(results(Path(config.proj_dir)))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return exit_code(lambda: train(parse(TrainConfig, argv, __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
