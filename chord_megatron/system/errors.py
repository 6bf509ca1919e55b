"""The error that tells a user what to mend, and what ends a process from outside."""


class UserError(ValueError):
    """Something the user can mend: one sentence that names the thing and the remedy. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # quoted messages of others may have several lines


class Interruption(BaseException):
    """Raised by the handler of a signal, wherever the process is: what it interrupts has not failed."""


INTERRUPTIONS = (KeyboardInterrupt, SystemExit, Interruption)
