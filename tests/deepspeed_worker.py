"""train.py with DeepSpeed on a CPU: Lightning's strategy without its refusal of one."""

import sys

import train
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

from rwkv_speech import lightning_run


class OnCPU(DeepSpeedStrategy):
    """DeepSpeed over gloo."""

    def __init__(self, **settings: object) -> None:
        super().__init__(process_group_backend="gloo", **settings)  # type: ignore[arg-type]

    def setup_environment(self) -> None:
        """DDP's: DeepSpeed's own does nothing but refuse a CPU before it."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Without the check that no GPU is given twice: every process has the same CPU."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()


if __name__ == "__main__":
    deepspeed_torch.build_shm_op = lambda: None  # shared memory for CPUs, which it would compile; gloo does
    lightning_run.DeepSpeedStrategy = OnCPU  # type: ignore[misc]
    sys.exit(train.main(sys.argv[1:]))
