"""The one exception type whose message is meant for the user as it is."""


class UserError(Exception):
    """Bad input or configuration: the message says what is wrong and what to do. Command lines exit with 2."""
