"""
Knobs. A knob is a field of a dataclass: its type is checked, its trailing comment is its help.
The knobs of a run are

    defaults  <-  config/some_file.py (Python, which is run)  <-  --key=value or --key value

where later wins. Ranges and choices are part of a knob's type and are checked here, once:

    steps: Count = 10                                # a whole number, at least 1
    schedule: Literal['cosine', 'wsd'] = 'cosine'    # one of these
    sizes: tuple[str, ...] = ()                      # --sizes=32x2,48x2

An unknown name, a wrong type, a value out of range or a missing file is a UserError: one line
that says what was expected and suggests the nearest name.
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


MOST = 2**53  # what a float still counts one by one
Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(1e-12)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
SaveDtype = Literal['auto', 'float32', 'bfloat16', 'float16']  # torch has no dtype auto: None
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
    `value`, text or of Python, as a knob of type `kind`: 20e9 is a whole number, a single value a
    list of one. Raises ValueError, or what Python does at its syntax, if it does not fit.
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
        fits = is_text and '\0' not in value  # which no path may hold
    else:
        value = ast.literal_eval(value.strip().capitalize()) if is_text else value
        same_kind = (type(value) is bool) == (first is bool)
        fits = same_kind and math.isfinite(value) and first(value) == value
    if not fits or base is Annotated and not limits[0].low <= value <= limits[0].high:
        raise ValueError
    return value if base is Literal else first(value)


# ----------------------------------------------------------------------------------------------
# config files and the command line: settings are (where, knob, value); True is a bare name


def read_config_file(path):
    """The settings of a config file."""
    if not Path(path).is_file():
        raise UserError(f'no config file {path}{nearest(path, map(str, Path().glob("*/*.py")))}')
    try:
        return [(f'{path}: {k}', k, value) for k, value in runpy.run_path(path).items()]
    except Exception as error:  # whatever the file raises is its author's to fix
        raise UserError(f'{path} cannot be read: {first_line(error)}') from error


def read_arguments(argv, words):
    """
    The settings of config files, then of the command line: later ones win. words: names of knobs
    that need no --name before them.
    """
    files, options, argv, words = [], [], list(argv), list(words)
    while argv:
        arg = argv.pop(0)
        if arg in HELP:
            continue
        if arg.startswith('--'):
            knob, equals, value = arg[2:].partition('=')  # once: a value may contain '='
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
    """{knob: value} of settings, for knobs of the types `kinds`; methods: as of `configure`."""
    values = {}
    for where, knob, value in settings:
        if knob in kinds:
            try:
                values[knob] = convert(value, kinds[knob])
            except Exception:  # whatever Python says to such a text
                found = 'left out' if value is True else repr(value)[:80]
                message = f'{where}: {knob} must be {describe_type(kinds[knob])}, not {found}'
                raise UserError(message) from None
        elif not (knob.startswith('_') or callable(value) or inspect.ismodule(value)):
            owners = [name for name, cls in methods.items() if hasattr(cls, knob)]
            close = f': it belongs to the method {owners[0]}' if owners else nearest(knob, kinds)
            raise UserError(f'{where}: no knob {knob!r}{close}; see --help')
    return values


def configure(argv, general, methods=None, program='train.py', words=()):
    """
    The knobs of a run: an instance of the dataclass `general` and, with `methods`
    ({name: dataclass}), one of the method that the knob `method` names. words: knobs whose names
    may be left out, in this order. Returns (general, method or None, {knob: where it was set}).
    Raises UserError; prints the help and exits for --help.
    """
    settings, methods, classes = read_arguments(argv, words), methods or {}, [general]
    if methods:
        name = {knob: value for _, knob, value in settings}.get('method', general.method)
        if name not in list(methods):
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
    """Two columns in as many lines of at most 100 characters as they take."""
    text = f'    {left:31} {right}'
    return textwrap.fill(text, 100, subsequent_indent=' ' * 36, break_on_hyphens=False)


def knob_help(cls):
    """
    [(knob, its comment and its type)] of a dataclass, in order; the comments between knobs, which
    head a group of them, under the name ''.
    """
    kinds = get_type_hints(cls, include_extras=True)
    source = ''.join(map(inspect.getsource, cls.__mro__[-2::-1]))  # what it inherits first
    line = r'^    (?:# (.+)|(\w+): [^#\n]*(?:  # (.+))?)$'
    return [
        (name, heading or f'{comment} ({describe_type(kinds[name])})')
        for heading, name, comment in re.findall(line, source, re.MULTILINE)
        if heading or name in kinds
    ]
