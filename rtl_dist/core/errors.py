"""The ways a command can end other than well, each with its exit code.

A message is one line that names the file, key or field at fault and the cure; of a config with
several mistakes, one more for each. Commands print it to stderr; a traceback appears only for our
own faults or with ``--debug``.
"""


class RtlDistError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1
    was_told = False
    """It was printed already, before what might have kept it from that."""


class UserError(RtlDistError):
    """A mistake in the config, the arguments or the choice of checkpoint."""

    exit_code = 2


class DataError(RtlDistError):
    """The data set is missing, damaged or does not say what it should."""

    exit_code = 3


class StopRequested(RtlDistError):
    """The run was asked to stop, saved itself, and can be resumed by the same command."""

    exit_code = 75


class ShardError(DataError):
    """A whole shard is missing, unreadable or altered: no sample of it is ever substituted."""


class RemoteError(RtlDistError):
    """A remote place cannot be reached: no fault of the data's, and a new start may help."""


class WorkerError(RtlDistError):
    """A loader process was killed, or has no memory left."""


class OutOfMemory(RtlDistError):
    """The device's memory does not hold a microbatch; smaller ones may go on from the same step."""


def disk_refused(error: OSError, where: object, *, to: str = "write") -> RtlDistError:
    """What to say when ``where`` could not be written (or read)."""
    return RtlDistError(
        f"cannot {to} {where}: {error.strerror or error}; free space or correct the permissions,"
        " then start the same command again"
    )
