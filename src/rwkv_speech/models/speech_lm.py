"""SpeechLM: RWKV([initial state], [adapter](encoder(audio))) -> text, the parts put together."""

# U utterances · A audio tokens · T positions of the packed batch · V vocabulary · L layers · H heads · N head size

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rwkv_speech import tasks
from rwkv_speech.batch import BETWEEN_TURNS, Batch
from rwkv_speech.devices import Compute
from rwkv_speech.errors import UserError
from rwkv_speech.files import sha256_file
from rwkv_speech.models import splice
from rwkv_speech.models.adapter import Adapter
from rwkv_speech.models.checkpoint import Trained, find_checkpoint, load_trained, named_tensors, write_checkpoint
from rwkv_speech.models.ctc import CtcHead
from rwkv_speech.models.encoder import NoEncoder, SpeechEncoder
from rwkv_speech.models.parts import Parts, TrainedOn
from rwkv_speech.models.peft import as_frozen, settle, tune, tuned
from rwkv_speech.models.rwkv import RWKV
from rwkv_speech.models.state import Packing, State
from rwkv_speech.models.states import States, adapter_sha256, read_states
from rwkv_speech.models.text_model import build_text_model, check_sizes, one_token
from rwkv_speech.tokenizer import WorldTokenizer

logger = logging.getLogger(__name__)
_SOFT_PROMPT_STD = 0.02  # at the start; the first layer normalises what it reads


class SpeechLM(nn.Module):
    """A frozen encoder and language model, and what is trained: the adapter and an initial state of each task."""

    def __init__(
        self,
        encoder: SpeechEncoder,
        lm: RWKV,
        tokenizer: WorldTokenizer,
        parts: Parts,
        task_names: Sequence[str] = (tasks.DEFAULT,),
    ) -> None:
        super().__init__()
        self.encoder, self.lm, self.tokenizer, self.parts = encoder, lm, tokenizer, parts
        parts = parts.filled()
        assert parts.stack is not None and parts.adapter_hidden is not None
        sizes = lm.sizes
        self.adapter = Adapter(encoder.width, sizes.C, parts.stack, parts.adapter_hidden)
        self.initial_states = nn.ParameterDict(
            {name: torch.zeros(sizes.n_layer, sizes.H, sizes.N, sizes.N) for name in task_names}
        )
        # By task, (P, C): read between audio and separator, where the state before the audio may have faded.
        self.soft_prompts = nn.ParameterDict()
        self.ctc: CtcHead | None = None  # frozen here: it is trained by itself
        self.confidence: dict[str, float] | None = None  # the weights of decoding.confidence, if it was calibrated
        self.separator_id = one_token(tokenizer, parts.separator)
        tune(lm, parts.lora, parts.train_parts)
        self._learned_with = ""  # what `adapter_sha256` was before the language model's changes became a part of it
        self.trained_on: TrainedOn | None = None
        self.metrics: dict[str, Any] = {}  # of the training, as the checkpoint says

    @classmethod
    def build(
        cls,
        parts: Parts,
        compute: Compute | None = None,
        task_names: Sequence[str] = (tasks.DEFAULT,),
        hears: bool = True,
    ) -> Self:
        """Frozen parts from their files, trained parts new; raises UserError for files that do not fit.

        One that does not hear reads text in place of audio: it has no encoder, and an adapter only if it loads one.
        """
        parts, compute = parts.filled(), compute or Compute()
        lm, tokenizer = build_text_model(parts, compute)
        check_sizes(parts, lm.sizes)
        encoder: SpeechEncoder = NoEncoder()
        if hears:
            encoder = SpeechEncoder.from_pretrained(parts.encoder_name(), compute.encoder_dtype, parts.frame_options)
        known = replace(parts, n_layer=lm.sizes.n_layer, n_embd=lm.sizes.C, base_sha256=sha256_file(parts.base_file()))
        return cls(encoder.to(compute.device), lm, tokenizer, known, task_names).to(compute.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        parts: Parts | None = None,
        compute: Compute | None = None,
        task: str = tasks.DEFAULT,
        hears: bool = True,
        endpoint: str = "",
    ) -> Self:
        """Load a run's folder, an own checkpoint, or a published `.pth`, which needs `parts` and has one state, `task`.

        Text that names nothing here, "NAME/REPO", is a repository on the hub, whose address is `endpoint` if that is
        not the usual one. `hears` as in `build`. Raises UserError if nothing is there, if the base model or the encoder
        is not the one that the checkpoint was trained on, and for a model to hear with whose checkpoint has no adapter.
        """
        trained = load_trained(find_checkpoint(path, endpoint), task)
        given = parts or Parts()
        if trained.parts is None and not given.load_model:
            raise UserError(
                f"{trained.path}: a published file does not name its base model; expected the model that it was "
                "trained on: give its path with --load_model"
            )
        if hears:
            trained.require_adapter()
        wanted = given if trained.parts is None else trained.parts.recorded_in(trained.path, given, hears)
        model = cls.build(wanted, compute, list(trained.initial_states), hears)
        model.load_trained(trained)
        if model.tuned:
            model._learned_with = model.adapter_sha256
        settle(model.lm, model.parts.train_parts)
        return model.eval()

    def load_trained(self, trained: Trained) -> None:
        """Take over all that was trained; raises UserError where shapes, the base model or what is trained differ."""
        if trained.parts is not None:
            self.parts.check_tuned(trained.parts, trained.path)
            self.parts.check_base(trained.parts.base_sha256, trained.path)
            self.encoder.check(trained.parts.encoder_sha256, trained.path)
        if trained.adapter and not self.encoder.width:  # of the encoder's width, whatever that is
            hidden, width = trained.adapter["0.weight"].shape
            known = Adapter(width // self.adapter.stack, self.lm.sizes.C, self.adapter.stack, hidden)
            self.adapter = known.to(next(self.task_parameters()).device)
        for name in sorted(set(trained.soft_prompts) & set(self.initial_states)):
            prompt = torch.empty_like(trained.soft_prompts[name], dtype=torch.float32)
            self.soft_prompts[name] = nn.Parameter(prompt.to(self.initial_states[name].device))
        parameters = dict(self.named_parameters())
        found = {name: x for name, x in trained.named_tensors().items() if name in parameters}
        wrong = [
            f"{name}: found {tuple(x.shape)}, expected {tuple(parameters[name].shape)}"
            for name, x in found.items()
            if x.shape != parameters[name].shape
        ]
        if wrong:
            raise UserError(
                f"{trained.path}: does not fit {self.parts.load_model} with encoder {self.parts.encoder}:\n  "
                + "\n  ".join(wrong)
            )
        if trained.ignored:
            names = ", ".join(trained.ignored)
            logger.warning("%s: left %d tensors that are not trained: %s", trained.path, len(trained.ignored), names)
        with torch.no_grad():
            for name, x in found.items():
                parameters[name].copy_(x)
        transcribes = trained.parts.transcribes if trained.parts else ()
        self._set_transcribes(name for name in transcribes if name in self.initial_states)
        head = trained.ctc_head()
        self.ctc = None if head is None else head.to(next(self.task_parameters()).device)
        self.trained_on, self.metrics, self.confidence = trained.trained_on, trained.metrics, trained.confidence

    def add_states(self, path: str | Path) -> str:
        """Take over the states of a file, in place of those of the same names; the name if it is one, else "".

        An empty path names no file. Raises UserError for states of another base model or adapter.
        """
        if not path:
            return ""
        known = self.parts.base_sha256, self.adapter_sha256
        own = States(Path("the weights"), dict(self.initial_states.items()), *known)
        new = read_states(path)
        new.check_fit(own)
        device = next(iter(self.initial_states.values())).device
        for name, x in new.states.items():
            self.initial_states[name] = nn.Parameter(x.float().to(device))
            if name in new.soft_prompts:
                self.soft_prompts[name] = nn.Parameter(new.soft_prompts[name].float().to(device))
            elif name in self.soft_prompts:
                del self.soft_prompts[name]
        self._set_transcribes({*self.parts.transcribes} - {*new.states} | new.transcribes)
        return next(iter(new.states)) if len(new.states) == 1 else ""

    @property
    def adapter_sha256(self) -> str:
        """What the states of this adapter are known by."""
        return self._learned_with or adapter_sha256(self.adapter.state_dict(), self.tuned)

    @property
    def tuned(self) -> dict[str, nn.Parameter]:
        """What is trained of the language model, by its names there."""
        return tuned(self.lm, self.parts.train_parts)

    def save(self, path: Path, **metrics: Any) -> None:
        """Write the trained tensors, atomically, with what they were trained on and `metrics`."""
        states, prompts = dict(self.initial_states.items()), dict(self.soft_prompts.items())
        tensors = named_tensors(self.adapter.state_dict(), states, prompts, self.tuned)
        is_same = not any(x.requires_grad for x in self.adapter.parameters())  # what confidence was calibrated with
        confidence = self.confidence if is_same else None
        write_checkpoint(path, tensors, self.parts, self.trained_on, metrics, self.ctc, confidence)

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters, what each task has, and what is trained of the language model, but for frozen ones:
        all that an optimizer may see.
        """
        yield from (x for x in (*self.adapter.parameters(), *self.task_parameters()) if x.requires_grad)
        yield from (x for x in self.tuned.values() if x.requires_grad)

    def task_parameters(self) -> Iterator[nn.Parameter]:
        """The initial states and soft prompts of all tasks."""
        yield from (*self.initial_states.values(), *self.soft_prompts.values())

    def add_soft_prompts(self, task_names: Sequence[str], length: int) -> None:
        """Give new soft prompts of so many vectors to those of the tasks that have none."""
        for name in [name for name in task_names if length and name not in self.soft_prompts]:
            new = torch.empty(length, self.lm.sizes.C, device=self.initial_states[name].device)
            self.soft_prompts[name] = nn.init.normal_(new, 0, _SOFT_PROMPT_STD)

    def transcribe_first(self, task_names: Iterable[str]) -> None:
        """Take texts of these tasks to begin with what was heard and the separator."""
        self._set_transcribes({*self.parts.transcribes, *task_names})

    def separator_of(self, task: str) -> int | None:
        """The token behind what was heard in the texts of a task that transcribes first, None of others."""
        return self.separator_id if task in self.parts.transcribes else None

    def _set_transcribes(self, task_names: Iterable[str]) -> None:
        self.parts = replace(self.parts, transcribes=tuple(sorted(task_names)))

    def freeze_all_but(self, task_names: Sequence[str]) -> None:
        """Let nothing but the states and soft prompts of these tasks be trained."""
        for x in (*self.adapter.parameters(), *self.tuned.values()):
            x.requires_grad_(False)
        for name, x in (*self.initial_states.items(), *self.soft_prompts.items()):
            x.requires_grad_(name in task_names)

    def initial_state(self, task_names: Sequence[str]) -> State:
        """The learned states at the start of a sequence of each task; the token shifts start at zero.

        Raises UserError for a task without a state.
        """
        missing = sorted(set(task_names) - set(self.initial_states))
        if missing:
            raise UserError(
                f"task {missing[0]!r}: found no initial state of it, expected one of "
                f"{', '.join(sorted(self.initial_states))}; train with --task {missing[0]}, or leave its utterances out"
            )
        zero = self.lm.zero_state(len(task_names))
        if not task_names:
            return zero
        # In training each state has a part, so that each has a gradient on all ranks and in every step.
        trained = [x for x, state in self.initial_states.items() if state.requires_grad and torch.is_grad_enabled()]
        apart = list(dict.fromkeys([*trained, *task_names]))
        if len(apart) == 1:  # read in place, not copied
            return zero._replace(wkv=self.initial_states[apart[0]][:, None].expand_as(zero.wkv))
        rows = [apart.index(name) for name in task_names]
        return zero._replace(wkv=torch.stack([self.initial_states[name] for name in apart], 1)[:, rows])

    def frames(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The encoder's frames (U, F, D) float32 and F of each utterance: the batch's own where it has them."""
        if batch.frames is not None and batch.frame_lengths is not None:
            return batch.frames.float(), batch.frame_lengths
        return self.encoder(batch.waveforms, batch.num_samples, batch.normalised)

    def audio_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Packed audio tokens (sum of A, C) and A of each utterance; 0 of those that read text."""
        if batch.input_ids and all(ids is not None for ids in batch.input_ids):
            if not self.encoder.width:
                return self._nothing(), batch.num_samples
            # In training the adapter has a part, of zero, in every step.
            frames = batch.waveforms.new_zeros(1, self.adapter.stack, self.encoder.width)
            return self.adapter(frames, torch.tensor([self.adapter.stack]))[0][:0], batch.num_samples
        return self.adapter(*self.frames(batch))

    def _nothing(self) -> Tensor:
        """No audio tokens, (0, C)."""
        return self.lm.embed(torch.empty(0, dtype=torch.int64, device=self.lm.emb.weight.device))

    def prefix(
        self, heard: int | Sequence[int], task: str, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> list[splice.Segment]:
        """What a text follows: the ids `before`, audio, the task's prompt, the ids `after`, soft prompt, separator.

        `heard` is the number of audio tokens, or the ids of a text that is read in place of audio.
        """
        prompt = self.tokenizer.encode(tasks.task_named(task).prompt)
        middle = splice.Audio(heard) if isinstance(heard, int) else splice.Prompt(heard)
        learned = self._soft_prompt_ids(task)
        return [splice.Prompt(before), middle, splice.Prompt([*prompt, *after, *learned, self.separator_id])]

    def _soft_prompt_ids(self, task: str) -> range:
        """The ids of a task's learned vectors, which follow those of the vocabulary, the tasks one after another."""
        names = list(self.soft_prompts)
        sizes = [len(x) for x in self.soft_prompts.values()]
        number = names.index(task) if task in names else len(names)
        first = self.lm.sizes.vocab + sum(sizes[:number])
        return range(first, first + sum(sizes[number : number + 1]))

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (n,) of the vocabulary and of soft prompts -> embeddings (n, C)."""
        beyond = ids - self.lm.sizes.vocab
        embedded = self.lm.embed(ids.clamp_max(self.lm.sizes.vocab - 1))
        if not len(self.soft_prompts):
            return embedded
        learned = torch.cat(list(self.soft_prompts.values()))[beyond.clamp_min(0)].to(embedded.dtype)
        return torch.where(beyond[:, None] < 0, embedded, learned)

    @property
    def between_turns(self) -> list[int]:
        """The ids that each turn of a conversation but the first begins with."""
        return self.tokenizer.encode(BETWEEN_TURNS)

    @torch.no_grad()
    def ctc_texts(self, batch: Batch) -> list[str]:
        """What the encoder alone hears in each utterance; for a model that has a CTC head."""
        assert self.ctc is not None
        return self.ctc.texts(*self.frames(batch))

    def forward(self, batch: Batch, kl_temperature: float = 2.0) -> Tensor:
        """The summed loss of a batch over its `num_targets`, float32.

        It is cross-entropy, but of an utterance with `teacher_ids` the divergence, at this temperature, from what the
        frozen model says that reads them, end of text included. With lengths and text on the host, where they are
        wanted, nothing here waits for the device.
        """
        audio, lengths = self.audio_tokens(batch)
        spliced, hidden, _ = self._read(audio, *self._sequences(batch, lengths.tolist()), keep_state=False)
        at = (spliced.labels != splice.IGNORE).nonzero()[:, 0]
        teacher_ids = batch.teacher_ids or [()] * len(batch)
        is_taught = torch.tensor([bool(ids) for ids in teacher_ids]).repeat_interleave(batch.text_lengths.cpu() + 1)
        chosen = at[~is_taught]
        targets, rows = (x.to(hidden.device, non_blocking=True) for x in (spliced.labels[chosen], chosen))
        loss = self.lm.head(hidden[rows], targets)
        if batch.teacher_ids is None:
            return loss
        rows = at[is_taught].to(hidden.device, non_blocking=True)
        return loss + self.lm.head(hidden[rows], teacher=(*self._teacher(batch), kl_temperature))

    @functools.cached_property
    def _ends(self) -> list[int]:
        return [self.tokenizer.eos_id, *self.tokenizer.ids_with(BETWEEN_TURNS.encode())]

    @torch.no_grad()
    def _teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of a batch's texts after their `teacher_ids`, read from no state: the hidden states (n, C) at their targets;
        and the tokens (k,) with which the frozen model ends a text, the end of text first.
        """
        texts = batch.text_ids.cpu().split(batch.text_lengths.tolist())
        sequences: list[list[splice.Segment]] = [
            [splice.Prompt(ids), splice.Text(text.tolist())]
            for ids, text in zip(batch.teacher_ids or (), texts, strict=True)
            if ids
        ]
        state = self.lm.zero_state(len(sequences))
        with as_frozen(self.lm):
            spliced, hidden, _ = self._read(self._nothing(), sequences, state, keep_state=False)
        ends = torch.tensor(self._ends)
        at = (spliced.labels != splice.IGNORE).nonzero()[:, 0]
        rows, ends = (x.to(hidden.device, non_blocking=True) for x in (at, ends))
        return hidden[rows], ends

    def _sequences(self, batch: Batch, num_audio: list[int]) -> tuple[list[list[splice.Segment]], State]:
        """What a batch is read as, the turns of a conversation as one sequence, and the states before it."""
        texts = batch.text_ids.cpu().split(batch.text_lengths.tolist())
        read, turns = batch.input_ids or [None] * len(batch), batch.turns or [0] * len(batch)
        sequences, task_names = list[list[splice.Segment]](), list[str]()
        for row, (text, task) in enumerate(zip(texts, batch.tasks, strict=True)):
            ids, before = read[row], self.between_turns if turns[row] > 1 else ()
            if turns[row] <= 1:
                sequences.append([])
                task_names.append(task)
            before = (*before, *batch.prompt_ids[row])
            sequences[-1] += self.prefix(num_audio[row] if ids is None else ids, task, before)
            sequences[-1].append(splice.Text(text.tolist()))
        return sequences, self.initial_state(task_names)

    @torch.no_grad()
    def prefill(
        self, audio: Tensor, sequences: Sequence[Sequence[splice.Segment]], state: State
    ) -> tuple[Tensor, State]:
        """Read U sequences with their audio tokens (sum of A, C) from the states before them.

        The logits (U, V) after each, and their states.
        """
        spliced, hidden, state = self._read(audio, sequences, state)
        return self.lm.head(hidden[(spliced.cu_seqlens[1:] - 1).to(hidden.device)]), state

    def _read(
        self,
        audio: Tensor,
        sequences: Sequence[Sequence[splice.Segment]],
        state: State,
        keep_state: bool = True,
    ) -> tuple[splice.Spliced, Tensor, State]:
        """The layout of the sequences, the hidden states (T, C), and the last state of each sequence."""
        spliced = splice.splice(sequences, self.tokenizer.eos_id)
        packing = Packing.of(spliced.cu_seqlens).to(audio.device)
        there = spliced.to(audio.device)
        x = splice.fill(there, audio, self.embed(there.token_ids))
        hidden, state = self.lm.hidden(x, state, packing, keep_state)
        return spliced, hidden[0], state
