"""A loss by which a test lets a process get a signal in one of its steps."""

import os

from embedtune.losses import InfoNCE


class Told(InfoNCE):
    """InfoNCE that sends its process a signal in its step ``at``, counted from 0."""

    def __init__(self, at: int, number: int, times: int = 1, rank: int = 0):
        super().__init__()
        self.left, self.number, self.times, self.rank = at, number, times, rank

    def forward(self, embeddings, target):
        if self.left == 0 and int(os.environ.get("LOCAL_RANK", 0)) == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        self.left -= self.training
        return super().forward(embeddings, target)


def told(at: int, number: int, **more: int) -> list[str]:
    """Return the arguments of a fit that is told so."""
    values = {"at": at, "number": int(number), **more}
    arguments = [f"--model.loss.init_args.{name}={value}" for name, value in values.items()]
    return ["--model.loss=told_losses.Told", *arguments]
