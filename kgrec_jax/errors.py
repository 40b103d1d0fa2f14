"""Errors that are meant for the person at the keyboard."""


class KgrecError(Exception):
    """Bad input, in one line: what was found, where, what was expected, what to change.

    The command line prints `kgrec: MESSAGE` and ends with exit code 2, without a traceback.
    """


class Interrupted(KgrecError):
    """The run was stopped on request after its state was saved (exit code 130)."""
