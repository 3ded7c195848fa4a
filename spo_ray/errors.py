"""The one exception type whose message is meant for the user as it is."""


class UserError(Exception):
    """Bad input or configuration: the message says what is wrong and what to do. Command lines exit with 2."""


class TrainingError(RuntimeError):
    """Training can't go on, and could not after a restart either: the message says why and what to do."""


class EvaluatorLostError(RuntimeError):
    """An evaluation actor died more often than Ray restarts it; a new actor may succeed."""


class RowRejectedError(Exception):
    """Raised by a row function for a row that can't be used; the message is the reason, of at most 300 characters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason if len(reason) <= 300 else f"{reason[:297]}...")  # it may quote the row


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
