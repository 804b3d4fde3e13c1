"""The one exception that stands for a mistake in what the user gave."""


class InputError(ValueError):
    """Bad input: its message names the file, line, field or YAML key, what was found and expected.

    The command line prints the message alone and exits with code 2; Python callers catch it as the
    ``ValueError`` it is. Every other exception is a defect of embedtune and keeps its traceback.
    """


def require_positive(key: str, value: float) -> float:
    """Return ``value``.

    Raises:
        InputError: It is not above 0; the message names ``key``.
    """
    if not value > 0:
        raise InputError(f"{key}: expected a positive number, found {value}")
    return value
