"""The one error that a person, not a programmer, can put right."""


class UserError(ValueError):
    """Bad input: one line that names the file or value and says what to do.

    The command prints it without a traceback. A data loader's worker hands an error on as text with its
    traceback; only the last line, this error's own, is kept.
    """

    def __init__(self, message: str) -> None:
        own = message.rsplit("UserError: ", 1)[-1].strip()
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in own))  # of a file, say


class NoSuchSplit(UserError):
    """The folder or file of a split is not there; without training images, validation may do by itself."""
