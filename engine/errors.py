"""Errors that a person can fix: one line on the terminal and exit code 2, never a traceback."""

import difflib
import errno
import importlib
import os
import sys

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # these name no file


class UserError(ValueError):
    """A mistake that the person at the keyboard can fix; its message is one line."""


def run_as_program(main):
    """
    Call `main(argv)` as a command: UserErrors and unusable files print one line and exit with
    code 2, Ctrl-C exits with code 130. Text that a terminal cannot show is escaped, and a reader
    that stops reading (| head) ends the program quietly.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing at exit either
        sys.exit(128 + 13)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        message = f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    except RuntimeError as error:
        if 'out of memory' not in str(error) and 'allocate memory' not in str(error):
            raise
        message = f'{first_line(error)}: try a smaller --micro_batch_size'
    except KeyboardInterrupt:
        sys.stdout.flush()
        print('\ninterrupted', file=sys.stderr, flush=True)
        os._exit(130)  # a file that torch had half written may abort the end of Python
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def nearest(name, known):
    """' (did you mean ...?)' with the known name closest to `name`, or '' if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f' (did you mean {close[0]}?)' if close else ''


def unknown(what, name, known):
    """The UserError for a name that is not one of `known`: suggests the nearest, lists them all."""
    known = list(known)
    return UserError(f'no {what} {name!r}{nearest(name, known)}; choose from {", ".join(known)}')


def import_extra(module, need):
    """A module of requirements-extras.txt; UserError if it is missing. need: what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        hint = 'pip install -r requirements-extras.txt'
        raise UserError(f'{need}: {hint}') from None


def first_line(error):
    """The type and the first line of an error's message, for use inside a UserError."""
    message = str(error).splitlines()
    return f'{type(error).__name__}: {message[0]}' if message else type(error).__name__
