"""
Knobs. A knob is a field of a dataclass: its type is checked, its trailing comment is its help.
The knobs of a run are

    defaults  <-  config/some_file.py (flat Python assignments)  <-  --key=value

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
import sys
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from engine.errors import UserError, nearest, unknown

# ----------------------------------------------------------------------------------------------
# types of knobs


class Range(NamedTuple):
    """The numbers from low to high, both included."""

    low: float
    high: float = math.inf


TINY = sys.float_info.min
MOST = 2**53  # what a float still counts one by one
Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(TINY)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
SaveDtype = Literal['auto', 'float32', 'bfloat16', 'float16']  # torch has no dtype auto: None
NAMES = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'text'}


def describe_type(kind):
    """A knob's type in words, for help and errors."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return f'a list, separated by commas, of {describe_type(arguments[0])}'
    if get_origin(kind) is Literal:
        return f'one of {", ".join(map(str, arguments))}'
    if get_origin(kind) is Annotated:
        low, high = arguments[1]
        limits = f'at least {low:g}' if high >= MOST else f'between {low:g} and {high:g}'
        if low == TINY:
            limits = 'above 0'
        return f'{NAMES[arguments[0]]}, {limits}'
    return NAMES[kind]


def check(value, kind):
    """
    `value` as a knob of type `kind`: 20e9 is a whole number, a single value a list of one. Raises
    ValueError if it does not fit.
    """
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else (value,)
        return tuple(check(one, arguments[0]) for one in values)
    if get_origin(kind) is Literal:
        if value in arguments and type(value) is not bool:
            return value
    elif get_origin(kind) is Annotated:
        value = check(value, arguments[0])
        low, high = arguments[1]
        if low <= value <= high:
            return value
    elif kind in (bool, str):
        if type(value) is kind and '\0' not in str(value):  # which no path may hold
            return value
    elif type(value) in (int, float) and math.isfinite(value):
        if kind is float:
            return float(value)
        if value == int(value):
            return int(value)
    raise ValueError


def parse(text, kind):
    """The value of `text` from the command line for a knob of type `kind`, or ValueError."""
    if get_origin(kind) is tuple:
        parts = [part.strip().strip('\'"') for part in text.strip().strip('()[]').split(',')]
        return tuple(parse(part, get_args(kind)[0]) for part in parts if part)
    if kind is str or get_origin(kind) is Literal:
        return check(text, kind)
    if kind is bool:
        return check({'true': True, '1': True, 'false': False, '0': False}.get(text.lower()), bool)
    try:
        return check(ast.literal_eval(text.strip()), kind)
    except (SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        raise ValueError from None


# ----------------------------------------------------------------------------------------------
# config files and the command line


class Setting(NamedTuple):
    """One assignment: where it was made, the knob, its value, and whether that is still text."""

    where: str
    knob: str
    value: object
    is_text: bool


def read_config_file(path):
    """The assignments of a config file as {name: value}. Names with a leading _ are private."""
    path = Path(path)
    if not path.is_file():
        folders = (path.parent, Path('config'))
        candidates = [str(found) for folder in folders for found in folder.glob('*.py')]
        raise UserError(f'no config file {path}{nearest(path, candidates)}')
    sys.path.insert(0, str(path.parent))  # a config may begin with  from another_config import *
    try:
        values = runpy.run_path(str(path))
    except Exception as error:  # whatever the file raises is its author's to fix
        reason = f'{type(error).__name__}: {error}'
        raise UserError(f'{path} cannot be read: {reason}') from error
    finally:
        sys.path.pop(0)
    return {k: v for k, v in values.items() if k[0] != '_' and not isinstance(v, ModuleType)}


def read_arguments(argv):
    """The Settings of config files and then of the command line: later ones win."""
    from_files, from_options = [], []
    for arg in argv:
        if arg.startswith('--'):
            knob, equals, text = arg[2:].partition('=')  # once: a value may contain '='
            from_options.append(Setting(arg, knob, text if equals else None, True))
        elif arg.endswith('.py'):
            for knob, value in read_config_file(arg).items():
                from_files.append(Setting(f'{arg}: {knob}', knob, value, False))
        else:
            raise UserError(f'{arg!r} is neither a config file (something.py) nor --key=value')
    return from_files + from_options


def apply_settings(settings, kinds, methods=None):
    """{knob: checked value} of Settings, for knobs of the types `kinds`. Raises UserError."""
    values = {}
    for where, knob, value, is_text in settings:
        if knob not in kinds and callable(value):
            continue  # a function that the config file imported or defined for itself
        if knob not in kinds:
            owners = [name for name, cls in (methods or {}).items() if knob in get_type_hints(cls)]
            close = f': it belongs to the method {" or ".join(owners)}' if owners else ''
            close = close or nearest(knob, kinds)
            raise UserError(f'{where}: no knob {knob!r}{close}; see --help')
        if value is None and kinds[knob] is bool:  # a bare flag
            value = 'True'
        if value is None:
            raise UserError(f'{where} has no value: write {where}=VALUE')
        try:
            values[knob] = (parse if is_text else check)(value, kinds[knob])
        except (ValueError, OverflowError):
            expected, close = describe_type(kinds[knob]), ''
            if get_origin(kinds[knob]) is Literal:
                close = nearest(value, get_args(kinds[knob]))
            raise UserError(f'{where}: {knob} must be {expected}, not {value!r}{close}') from None
    return values


def configure(argv, general, methods=None, program='train.py'):
    """
    The knobs of a run: an instance of the dataclass `general` and, with `methods`
    ({name: dataclass}), one of the method that the knob `method` names. Returns (general, method
    or None, {knob: where it was set}). Raises UserError; prints the help and exits for --help.
    """
    wants_help = '-h' in argv or '--help' in argv
    settings = read_arguments([arg for arg in argv if arg not in ('-h', '--help')])
    classes = [general]
    if methods:
        chosen = [setting.value for setting in settings if setting.knob == 'method']
        name = chosen[-1] if chosen else general().method
        if not isinstance(name, str) or name not in methods:
            raise unknown('method', name, methods)
        classes.append(methods[name])
    kinds = {}
    for cls in classes:
        kinds |= get_type_hints(cls, include_extras=True)
    values = apply_settings(settings, kinds, methods)
    instances = []
    for cls in classes:
        names = [f.name for f in fields(cls)]
        instances.append(cls(**{name: values[name] for name in names if name in values}))
    if wants_help:
        show_help(program, instances, methods)
        sys.exit(0)
    origins = {setting.knob: setting.where for setting in settings}
    return instances[0], instances[1] if methods else None, origins


def with_positionals(argv, *names):
    """argv with its first words turned into --name=word: expand.py SOURCE TARGET --to=8b."""
    names, arguments = list(names), []
    for arg in argv:
        if names and not arg.startswith('-'):
            arg = f'--{names.pop(0)}={arg}'
        arguments.append(arg)
    return arguments


# ----------------------------------------------------------------------------------------------
# help


WIDTH = 100  # columns of the help


def show_help(program, instances, methods=None):
    """Print every knob of the dataclass instances, grouped as in their source; then the methods."""
    print(f'usage: {program} [config/FILE.py] [--key=value ...]')
    for instance in instances:
        print(f'\n{(instance.__doc__ or "").strip().splitlines()[0]}')
        for name, comment in knob_help(type(instance)):
            value = getattr(instance, name, '')
            text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
            print_in_columns(f'--{name}={text}' if name else '', comment)
    if methods:
        print('\nThe methods, each with knobs of its own: --method=NAME --help')
        for name, cls in methods.items():
            print_in_columns(name, cls.__doc__.strip().splitlines()[0])


def print_in_columns(left, right):
    """Print two columns, the right one in as many lines as it takes; a heading if left is empty."""
    if not left:
        print(f'  {right}')
        return
    lines = textwrap.wrap(right, WIDTH - 36) or ['']
    if len(left) > 31:  # on a line of its own
        print(f'    {left[: WIDTH - 4]}')
        left = ''
    for i, line in enumerate(lines):
        print(f'    {"" if i else left:31} {line}'.rstrip())


def knob_help(cls):
    """
    [(knob, its comment, and its choices if its type lists them)] of a dataclass, in order; the
    comments between knobs, which head a group of them, under the name ''.
    """
    found, kinds = [], get_type_hints(cls, include_extras=True)
    sources = [inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c)]  # inherited
    for line in ''.join(sources).splitlines():
        if heading := re.match(r'    # (.+)$', line):
            found.append(('', heading[1]))
        elif (knob := re.match(r'    (\w+): [^#]*(?:  # (.+))?$', line)) and knob[1] in kinds:
            kind, comment = kinds[knob[1]], knob[2] or ''
            if Literal in (get_origin(kind), *map(get_origin, get_args(kind))):
                comment += f' ({describe_type(kind)})'
            found.append((knob[1], comment))
    return found
