"""
Settings, called knobs. A knob is a field of a dataclass: its annotation gives the type, range or
choices, its trailing comment is the help text. Values come from

    defaults  <-  config/some_file.py (executed as Python)  <-  --key=value or --key value

where later sources override earlier ones. Values are checked here and nowhere else:

    steps: Count = 10                                # an integer, at least 1
    schedule: Literal['cosine', 'wsd'] = 'cosine'    # one of these
    sizes: tuple[str, ...] = ()                      # --sizes=32x2,48x2

An unknown name, a wrong type, a value out of range or a missing file raises UserError with one line
that says what was expected and, for a name, suggests the closest known one.
"""

import ast
import inspect
import math
import re
import runpy
import textwrap
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from engine.errors import UserError, first_line, nearest, unknown

# ----------------------------------------------------------------------------------------------
# types of knobs


class Range(NamedTuple):
    """The numbers from low to high, both included."""

    low: float
    high: float = math.inf


MOST = 2**53  # the largest integer up to which float64 is exact
Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(1e-12)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
SaveDtype = Literal['auto', 'float32', 'bfloat16', 'float16']  # auto, or a dtype's name in torch
HELP = {'-h', '--help'}
NAMES = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}


def describe_type(kind):
    """A knob's type in words, for help and errors."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return f'a list, separated by commas, of {describe_type(arguments[0])}'
    if get_origin(kind) is Literal:
        return f'one of {", ".join(arguments)}'
    if get_origin(kind) is Annotated:
        low, high = arguments[1]
        limits = f'at least {low:g}' if high >= MOST else f'between {low:g} and {high:g}'
        return f'{NAMES[arguments[0]]}, {limits}'
    return NAMES[kind]


def convert(value, kind):
    """
    Convert `value`, a string or a Python object, to a knob of type `kind`. 20e9 is accepted as an
    integer, and a single value as a tuple of one. Raises ValueError for a value that does not fit,
    or whatever Python raises when it parses the string (SyntaxError, TypeError, MemoryError, ...).
    """
    (first, *limits), base = get_args(kind) or [kind], get_origin(kind)
    is_text = isinstance(value, str)
    if base is tuple:
        if is_text:
            value = [part.strip(' \'"') for part in value.strip('()[] ').split(',')]
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(one, first) for one in values if one != '')
    if base is Literal:
        fits = value in get_args(kind)
    elif first is str:
        fits = is_text and '\0' not in value  # paths must not contain NUL
    else:
        # capitalize() lets 'true' and 'false' pass, and does not affect numbers
        value = ast.literal_eval(value.strip().capitalize()) if is_text else value
        same_kind = (type(value) is bool) == (first is bool)  # although True == 1
        fits = same_kind and math.isfinite(value) and first(value) == value
    if not fits or base is Annotated and not limits[0].low <= value <= limits[0].high:
        raise ValueError
    return value if base is Literal else first(value)


# ----------------------------------------------------------------------------------------------
# config files and the command line; a setting is (where it was given, knob, value), and a --knob
# without a value has the value True


def read_config_file(path):
    """Execute a config file and return its settings. Raises UserError if that fails."""
    if not Path(path).is_file():
        raise UserError(f'no config file {path}{nearest(path, map(str, Path().glob("*/*.py")))}')
    try:
        return [(f'{path}: {k}', k, value) for k, value in runpy.run_path(path).items()]
    except Exception as error:  # the file is the user's code and may raise anything
        raise UserError(f'{path} cannot be read: {first_line(error)}') from error


def read_arguments(argv, words):
    """
    The settings from config files, followed by those from the command line, so that later ones
    override earlier ones. words: the knobs that positional arguments set, in this order. Raises
    UserError.
    """
    files, options, argv, words = [], [], list(argv), list(words)
    while argv:
        arg = argv.pop(0)
        if arg in HELP:
            continue
        if arg.startswith('--'):
            knob, equals, value = arg[2:].partition('=')  # at the first: a value may contain '='
            if not equals:  # the next word is the value, unless it is another option or a config
                alone = not argv or argv[0].startswith('--') or argv[0].endswith('.py')
                value = alone or argv.pop(0)
            options.append((arg, knob, value))
        elif words:
            options.append((arg, words.pop(0), arg))
        elif arg.endswith('.py'):
            files += read_config_file(arg)
        else:
            raise UserError(f'{arg!r} is neither a config file (something.py) nor --key=value')
    return files + options


def check(settings, kinds, methods):
    """
    Convert settings to {knob: value}. kinds: {knob: type}; methods: as in `configure`, so that the
    error for another method's knob can name that method. Raises UserError.
    """
    values = {}
    for where, knob, value in settings:
        if knob in kinds:
            try:
                values[knob] = convert(value, kinds[knob])
            except Exception:  # convert() raises many types for malformed text
                found = 'left out' if value is True else repr(value)[:80]
                message = f'{where}: {knob} must be {describe_type(kinds[knob])}, not {found}'
                raise UserError(message) from None
        elif not (knob.startswith('_') or callable(value) or inspect.ismodule(value)):
            # neither a knob nor a private name, function or import of a config file
            owners = [name for name, cls in methods.items() if hasattr(cls, knob)]
            close = f': it belongs to the method {owners[0]}' if owners else nearest(knob, kinds)
            raise UserError(
                f'{where}: no knob {knob!r}{close}; see --help (in a config file, names that are '
                'no knobs begin with _)'
            )
    return values


def configure(argv, general, methods=None, program='train.py', words=()):
    """
    Parse a command line into dataclasses. general: the dataclass of the general knobs. methods:
    {name: dataclass}, of which the knob `method` selects one. words: the knobs that positional
    arguments set, in this order. Returns (an instance of general, an instance of the method or
    None, {knob: where it was set}). Raises UserError; --help prints the help and exits.
    """
    settings, methods, classes = read_arguments(argv, words), methods or {}, [general]
    if methods:
        name = {knob: value for _, knob, value in settings}.get('method', general.method)
        if name not in list(methods):  # a config file may give an unhashable name
            raise unknown('method', name, methods)
        classes = [methods[name], general]
    kinds = {}
    for cls in classes:
        kinds |= get_type_hints(cls, include_extras=True)
    values = check(settings, kinds, methods)
    made = []
    for cls in classes:
        own = values.keys() & cls.__dataclass_fields__
        made.append(cls(**{knob: values[knob] for knob in own}))
    if HELP & {*argv}:
        show_help(program, made, methods)
    origins = {knob: where for where, knob, _ in settings if knob in values}
    return made[-1], made[0] if methods else None, origins


# ----------------------------------------------------------------------------------------------
# help


def show_help(program, instances, methods):
    """Print every knob of dataclass instances, grouped as in their source; exit."""
    print(f'usage: {program} [config/FILE.py, which is run as Python] [--key=value or --key value]')
    for instance in instances:
        print(f'\n{inspect.getdoc(instance)}')
        for name, comment in knob_help(type(instance)):
            knob = name and f'--{name}={getattr(instance, name)}'
            print(in_columns(knob, comment) if name else f'  {comment}')
    if methods:
        print('\nThe methods, each with knobs of its own: --method=NAME --help')
    for name, cls in methods.items():
        print(in_columns(name, cls.__doc__.strip().splitlines()[0]))
    raise SystemExit


def in_columns(left, right):
    """Format two columns, wrapped to lines of at most 100 characters."""
    text = f'    {left:31} {right}'
    return textwrap.fill(text, 100, subsequent_indent=' ' * 36, break_on_hyphens=False)


def knob_help(cls):
    """
    [(knob, its comment and its type)] of a dataclass, in source order. A comment line between knobs
    is the heading of a group and has the name ''.
    """
    kinds = get_type_hints(cls, include_extras=True)
    source = ''.join(map(inspect.getsource, cls.__mro__[-2::-1]))  # base classes first
    # a heading (# text), or a field with an optional trailing comment
    line = r'^    (?:# (.+)|(\w+): [^#\n]*(?:  # (.+))?)$'
    return [
        (name, heading or f'{comment} ({describe_type(kinds[name])})')
        for heading, name, comment in re.findall(line, source, re.MULTILINE)
        if heading or name in kinds
    ]
