"""Errors that users can fix: one line on the terminal and exit code 2, no traceback."""

import difflib
import errno
import importlib
import os
import sys

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # they come without a file name


class UserError(ValueError):
    """An error that the user can fix. Its message is one line and says what to do."""


def run_as_program(main):
    """
    Run main(sys.argv[1:]) and exit with the code it returns. A UserError, a file or disk error, or
    running out of memory prints one line and exits with code 2; Ctrl-C exits with 130. Characters
    that the terminal cannot encode are escaped. A closed pipe (| head) ends the program quietly,
    with 141.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        # redirect stdout, or Python's flush at exit would raise the error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as if SIGPIPE had ended it
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise  # not about a file or a disk: a bug
        message = f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    except RuntimeError as error:
        if 'out of memory' not in str(error) and 'allocate memory' not in str(error):
            raise
        message = f'{first_line(error)}: try a smaller --micro_batch_size'
    except KeyboardInterrupt:
        sys.stdout.flush()
        print('\ninterrupted', file=sys.stderr, flush=True)
        os._exit(130)  # a normal exit can abort if torch was interrupted while writing a file
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def nearest(name, known):
    """' (did you mean ...?)' with the known name closest to `name`, or '' if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f' (did you mean {close[0]}?)' if close else ''


def unknown(what, name, known):
    """
    A UserError, to be raised by the caller, for a name that is not in `known`: suggests the closest
    and lists all. what: the kind of name ('variant').
    """
    known = list(known)
    return UserError(f'no {what} {name!r}{nearest(name, known)}; choose from {", ".join(known)}')


def import_extra(module, need):
    """
    Import a module of requirements-extras.txt. Raises UserError if it is not installed. need: the
    beginning of that message, which says what the module is needed for.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        hint = 'pip install -r requirements-extras.txt'
        raise UserError(f'{need}: {hint}') from None


def first_line(error):
    """The type and the first line of an error's message, for use inside a UserError."""
    message = str(error).splitlines()
    return f'{type(error).__name__}: {message[0]}' if message else type(error).__name__
