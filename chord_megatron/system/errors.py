"""The error that tells a user what to mend."""


class UserError(ValueError):
    """Something the user can mend: one sentence that names the thing and the remedy. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # quoted messages of others may have several lines
