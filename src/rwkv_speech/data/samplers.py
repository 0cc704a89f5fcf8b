"""The micro batches of one rank, as a data loader asks for them."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from rwkv_speech.data.epoch import EpochPlan, Floats
from rwkv_speech.data.source import Part
from rwkv_speech.errors import UserError


class BatchSampler(Sampler[list[int]]):
    """One rank's share of an EpochPlan: micro batch `a` of a step is the step's slot a * world_size + rank.

    So the same `world_size * accumulate` micro batches make each optimizer step however they are dealt: one rank that
    accumulates four sees what two ranks see that accumulate two. Over all ranks every utterance comes exactly once per
    epoch (or as often as its part's weight says), shuffled or not; all ranks have equally many micro batches, some of
    them empty if there are fewer utterances than slots. The length is that of a whole epoch, the same for every epoch,
    wherever this one starts.

    `durations` (N,) seconds, NaN where unknown; `micro_batch`, `batch_seconds` and `parts` as in EpochPlan. Raises
    UserError for limits that cannot be used and for fewer utterances than ranks.
    """

    def __init__(
        self,
        durations: Floats,
        micro_batch: int,
        batch_seconds: float | None = None,
        *,
        parts: Sequence[Part] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        if accumulate < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}, accumulate {accumulate}")
        if len(durations) < world_size:
            raise UserError(
                f"data: {len(durations)} utterances cannot be shared among {world_size} processes; expected "
                "one each at least: give more data or fewer devices"
            )
        self._plan = EpochPlan(
            durations,
            micro_batch,
            batch_seconds,
            parts=parts,
            slots=world_size * accumulate,
            seed=seed,
            shuffle=shuffle,
        )
        self._rank, self._world_size, self._accumulate = rank, world_size, accumulate
        self.epoch = 0
        self._first_step = 0

    @property
    def sampler(self) -> "BatchSampler":
        """Itself: `set_epoch` is what Lightning calls, and only on a batch sampler's `.sampler`."""
        return self

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch."""
        return self._plan.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are given next, from its start unless it was chosen already."""
        if epoch != self.epoch:
            self.set_state(epoch, 0)

    def set_state(self, epoch: int, step: int) -> None:
        """Continue an epoch behind its first `step` optimizer steps; nothing of them is read."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step {step} of {self.steps_per_epoch}")
        self.epoch, self._first_step = epoch, step

    def __iter__(self) -> Iterator[list[int]]:
        planned = self._plan.epoch(self.epoch)
        for step in range(self._first_step, self.steps_per_epoch):
            for slot in range(self._rank, self._world_size * self._accumulate, self._world_size):
                yield planned.batch(step, slot)

    def __len__(self) -> int:
        return self.steps_per_epoch * self._accumulate
