"""One of several processes that train with DeepSpeed on a CPU: Lightning's strategy without its refusal of one.

Takes a JSON list of runs, {"argv": what train.py takes, "die_at": the step whose point is the last thing it does}.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import train
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

from rwkv_speech import checks
from rwkv_speech.devices import accelerator
from rwkv_speech.training import run, strategies
from rwkv_speech.training.resume import ResumePoints


class OnCPU(DeepSpeedStrategy):
    """DeepSpeed over gloo; says at the end what the engine held and how often it stepped."""

    def __init__(self, **settings: object) -> None:
        super().__init__(process_group_backend="gloo", **settings)  # type: ignore[arg-type]

    @property
    def root_device(self) -> torch.device:
        """With an index, which the engine compares."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """DDP's: DeepSpeed's own does nothing but refuse a CPU before it."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Without the check that no device is given twice: the processes share one CPU."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def teardown(self) -> None:
        """Before the engine is gone."""
        if not isinstance(self.model, deepspeed.DeepSpeedEngine):
            return super().teardown()  # of a run that failed before it
        engine, zero = self.deepspeed_engine, self.deepspeed_engine.optimizer
        seen = {
            "steps": engine.global_steps,
            "calls": engine.micro_steps,
            "stage": engine.zero_optimization_stage(),
            "accumulate": engine.gradient_accumulation_steps(),
            "reduced": sum(getattr(p, "ds_numel", p.numel()) for group in _groups(zero) for p in group),
            "moments": sum(x["exp_avg"].numel() for x in zero.optimizer.state.values()),
            "frozen_with_grad": sum(p.grad is not None for p in engine.module.parameters() if not p.requires_grad),
        }
        folder = Path(self.lightning_module.config.proj_dir)  # type: ignore[union-attr, arg-type]
        (folder / f"engine-{self.global_rank}.json").write_text(json.dumps(seen))
        super().teardown()


def _groups(zero: Any) -> list[list[torch.Tensor]]:
    """The tensors whose gradients it reduces."""
    return zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.fp16_groups


class DyingPoints(ResumePoints):
    """Every process is killed once the point of step `die_at` is there."""

    die_at: int | None = None

    def _save(self, trainer, *place):  # type: ignore[no-untyped-def]
        super()._save(trainer, *place)
        if trainer.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # Shared memory between CPUs, which it would compile: gloo does.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    checks.check_devices = accelerator  # type: ignore[assignment]  # which does not refuse a CPU
    strategies.DeepSpeedStrategy = OnCPU  # type: ignore[misc]
    run.ResumePoints = DyingPoints  # type: ignore[misc]
    for given in json.loads(sys.argv[1]):
        DyingPoints.die_at = given.get("die_at")
        if code := train.main(given["argv"]):
            sys.exit(code)
