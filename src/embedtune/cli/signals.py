"""A command that a signal ends leaves nothing half written, and says so in one line."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from embedtune.cli.mistakes import fail

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Of schedulers and of the keyboard. A fit takes them over while it trains (``StopOnSignal``)."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End what runs within at the first signal, with exit code 128 + its number.

    It is raised where the process is, so that whoever writes removes what is half written; a second
    one ends the process at once. A signal that is ignored, as under ``nohup``, stays so.
    """
    process, received = os.getpid(), list[int]()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a loader's worker has nothing to say
            os.kill(os.getpid(), number)
        received.append(number)
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()  # no other may take signals
    taken = [number for number in SIGNALS if is_main and signal.getsignal(number) != signal.SIG_IGN]
    former = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    except BaseException:
        if received:  # whatever it has led to on its way
            name = signal.Signals(received[0]).name
            fail(f"{name}: ended before it was done", code=128 + received[0])
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
