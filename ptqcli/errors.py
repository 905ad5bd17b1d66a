"""What can go wrong, as a user reads it.

Every message is one line that says what is wrong, with which tensor, file or flag, and what to do. The commands turn the
class into an exit code: 1 for work that failed, 2 for a request that could not be understood or can never work.
"""


class PTQError(Exception):
    """Work that was asked for properly and failed; exit code 1."""

    exit_code = 1


class UsageError(PTQError):
    """A request that cannot work as it was written: a bad flag, recipe or path; exit code 2."""

    exit_code = 2
