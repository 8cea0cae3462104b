"""Errors for readers: what the command line prints as one line, without a traceback.

Tracebacks are reserved for our own bugs. Every user error exits with code 2.
"""


class UserError(Exception):
    """Something the user can mend. ``str(error)`` names the file, row or option, what was wrong and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an override is wrong; the message starts with the option's path."""


class DataError(UserError):
    """A data set, a row or an image is wrong; the message names the file and the row."""


class ModelError(UserError):
    """A model folder or hub id cannot be used; the message names it."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or continued; the message names it."""


class ResourceError(UserError):
    """Memory, disk or a device is missing; the message says how much and which option to change."""


class RewardError(UserError):
    """A reward failed, or gave something else than a number a picture; the message names it."""


class ServiceError(UserError):
    """A service behind HTTP does not answer, or answers nonsense; the message names its address without secrets."""


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
