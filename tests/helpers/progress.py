"""What tests hand over where a run reports its progress."""


class InterruptedByTest(Exception):
    """The run is broken off here."""


class RecordedProgress:
    """Progress that remembers its steps, and breaks off at one."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.steps: list[tuple[int, int]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, what: str, done: int, total: int) -> None:
        self.steps.append((done, total))
        if done == self.interrupt_at:
            raise InterruptedByTest


def quiet(*_: object) -> None:
    """Progress that nobody watches."""
