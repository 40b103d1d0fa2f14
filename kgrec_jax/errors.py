"""Errors that are meant for the person at the keyboard."""

import errno


class KgrecError(Exception):
    """Bad input, in one line: what was found, where, what was expected, what to change.

    The command line prints `kgrec: MESSAGE` and ends with exit code 2, without a traceback.
    """


class Interrupted(KgrecError):
    """The run was stopped on request after its state was saved (exit code 130)."""


# What a person can mend; any other error of the operating system is a bug of ours and keeps its traceback.
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
                   errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE, errno.EFBIG, errno.EIO}


def in_words(error: OSError) -> str:
    """What a person has to know of an error of the machine; any other is raised again."""
    if error.errno not in _OF_THE_MACHINE:
        raise error
    return f"{error.filename or 'writing'}: {error.strerror}; make room, change permissions or choose another place"
