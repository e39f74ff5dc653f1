"""TensorBoard: event files in the run folder; look at them with `tensorboard --logdir RUN`."""

from __future__ import annotations

from upturn.tracking.events import Sink
from upturn.tracking.trackers._base import Metrics, Numbers, Run


def start(run: Run) -> Sink:
    """Write to RUN/tensorboard, a new file for each session."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"))

    def log(numbers: Numbers, step: int, when: float) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step, walltime=when)
        writer.flush()

    return Metrics("tensorboard", log, lambda finished: writer.close())
