"""
Knobs, and what methods and the training loop say to each other.

A knob is a field of a dataclass: its type is checked, its trailing comment is its help. A run's knobs are

    defaults  <-  config/some_file.py (flat Python assignments)  <-  --key=value

where later wins. An unknown name, a wrong type or a missing file is a UserError: one line that names the nearest right
thing, exit code 2.

A method (progressive training, Inheritune, ...) is a dataclass of knobs with one generator, `stages(run)`: it yields a
`Stage`, the loop in train.py trains it, and the generator is sent the `Result`.
"""
import ast
import difflib
import errno
import json
import math
import os
import re
import runpy
import sys
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from inspect import getsource
from pathlib import Path


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: printed as one line, exit code 2, no traceback."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)   # of a write to an open file, which names no file


def run_as_program(main):
    """Call `main(argv)` as a command: UserErrors and unusable files are one line and exit code 2, Ctrl-C is exit code 130."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        print(f'error: {error.strerror}' + (f': {error.filename}' if error.filename else ''), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)


def move_into_place(temporary, path):
    """Give a file that is complete its name, once its content is on the disk: not even a power cut leaves a part under it."""
    with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path, text):
    """Write a text file so that a reader sees the old content or the new, never a part of it."""
    temporary = Path(f'{path}.tmp')
    temporary.write_text(text, encoding='utf-8')
    move_into_place(temporary, path)


def read_json(path, **kinds):
    """
    The object in a JSON file, a dict. kinds: {key: type of the value, or types} of what it must have. Raises UserError that names
    the file, FileNotFoundError where there is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise TypeError('no object')
        for key, kind in kinds.items():
            if not isinstance(found[key], kind) or isinstance(found[key], bool):
                raise TypeError(f'{key} is {found[key]!r}')
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {str(error)[:80]})') from None
    return found


def nearest(name, known):
    """' (did you mean ...?)' for the known name most like `name`, or '' when none is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' (did you mean {close[0]}?)' if close else ''


def unknown(what, name, known):
    """The UserError for a name that is none of the known ones: it says the nearest, and lists them all."""
    return UserError(f'there is no {what} {name!r}{nearest(name, known)}; there are {", ".join(known)}')


# ---------------------------------------------------------------------------------------------------------------------
# Stage and Result

@dataclass
class Stage:
    """One training run of a method: what to train, from which weights, on how many tokens."""
    name: str                                    # its folder under out_dir
    config: typing.Any                           # GPTConfig of the model that is trained
    tokens: float                                # training tokens T (rounded up to whole batches)
    params: float                                # X in FLOPs = 6 X T, as the method's paper counts it
    start: str = 'random initialisation'         # where the weights come from, in words (part of the stage's identity)
    model: typing.Callable | None = None         # builds the starting model if the stage really runs; None: random
    moments: typing.Callable | None = None       # builds the starting AdamW state, as checkpoint.load_moments; None: fresh
    parent: 'Result | None' = None               # stage it goes on from: its compute is counted, its data position continued
    data_after: 'Result | None' = None           # stage whose data position is continued without its weights; None: parent
    knobs: dict = field(default_factory=dict)    # general knobs that this stage sets otherwise than the run
    objective: typing.Callable | None = None     # (model, x, y, Progress) -> (loss, dict of scalars); None: next_token
    source: typing.Callable | None = None        # knobs -> data.loader.Source; None: text_source, the run's corpora
    score: typing.Callable | None = None         # model -> number; the best at an evaluation is kept; None: the last model is
    baseline_flops: float = 0.0                  # what training every model up to this one from scratch costs

    @property
    def inherited_flops(self):
        """FLOPs already spent on the weights this stage starts from, all ancestors counted."""
        return self.parent.total_flops if self.parent else 0.0


class Progress(typing.NamedTuple):
    """How far a stage is: `step` of `steps`, from 0 on."""
    step: int
    steps: int

    def after(self, limit):
        """Share of the way to `limit` (steps, or below 1 a fraction of all steps) that is gone: 0 at the start, at most 1."""
        return min(1.0, self.step / max(1.0, limit * self.steps if limit < 1 else limit)) if limit else 1.0


def next_token(model, x, y, progress):
    """The default objective: mean cross entropy of the next token, in nats."""
    return model(x, y).loss, {}


@dataclass
class Result:
    """What a finished stage left behind; `result.json` in its folder, written last and atomically."""
    name: str
    folder: str                  # the trained model, a Hugging Face folder
    n_params: int                # N: parameters without embeddings and head
    params: float                # X in FLOPs = 6 X T
    tokens: int                  # T: tokens trained on in this stage
    flops: float                 # 6 X T of this stage
    inherited_flops: float       # ... of all its ancestors
    baseline_flops: float        # ... of training every model up to this one from scratch (0: no such comparison)
    val_loss: float              # nats per token on the validation split
    bits_per_byte: float         # the same per byte of text: comparable between tokenizers
    position: int                # tokens drawn from the data order so far; the next stage continues here
    seconds: float               # wall-clock time of this stage

    @property
    def total_flops(self):
        """Compute in this model: this stage's and its ancestors'."""
        return self.flops + self.inherited_flops

    def text(self):
        """The content of result.json."""
        return json.dumps(asdict(self), indent=1) + '\n'

    def write(self):
        """Save as result.json in the stage's folder."""
        write_atomically(Path(self.folder) / 'result.json', self.text())

    @classmethod
    def of(cls, folder):
        """Read the result of a finished stage. Raises UserError when the folder holds none, or a damaged one."""
        path = Path(folder) / 'result.json'
        if not path.is_file():
            raise UserError(f'{folder} holds no finished stage (there is no result.json)')
        kinds = {f.name: (float, int) if f.type is float else f.type for f in fields(cls)}
        try:
            found = read_json(path, **kinds)
        except UserError as error:
            raise UserError(f'{error}; delete it to train this stage again') from None
        # the folder may have been moved since it was written, so where it stands now is what counts
        return cls(**{name: found[name] for name in kinds} | dict(folder=str(folder)))


# ---------------------------------------------------------------------------------------------------------------------
# types of knobs

def describe_type(kind):
    """A knob's type in words, for help and errors."""
    if typing.get_origin(kind) is tuple:
        return f'a list, separated by commas, of {describe_type(typing.get_args(kind)[0])}'
    return {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'a text'}[kind]


def check(value, kind):
    """`value` as a knob of type `kind` (20e9 is a whole number, a lone value a list of one); ValueError if it is not one."""
    if typing.get_origin(kind) is tuple:
        values = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(check(one, typing.get_args(kind)[0]) for one in values)
    if kind in (bool, str):
        if type(value) is kind:
            return value
    elif type(value) in (int, float) and math.isfinite(value):
        if kind is float:
            return float(value)
        if value == int(value):
            return int(value)
    raise ValueError


def parse(text, kind):
    """The value that `text` from the command line has for a knob of type `kind`; ValueError if it has none."""
    if typing.get_origin(kind) is tuple:
        parts = [part.strip().strip('\'"') for part in text.strip().strip('()[]').split(',')]
        return tuple(parse(part, typing.get_args(kind)[0]) for part in parts if part)
    if kind is str:
        return text
    if kind is bool:
        return check({'true': True, '1': True, 'false': False, '0': False}.get(text.strip().lower()), bool)
    try:
        return check(ast.literal_eval(text.strip()), kind)
    except (SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        raise ValueError from None


# ---------------------------------------------------------------------------------------------------------------------
# reading the command line and config files

def read_config_file(path):
    """The assignments of a config file as {name: value}; what starts with _ and modules stay private to it."""
    path = Path(path)
    if not path.is_file():
        candidates = [str(p) for folder in (path.parent, Path('config')) for p in folder.glob('*.py')]
        raise UserError(f'there is no config file {path}' + nearest(str(path), candidates))
    sys.path.insert(0, str(path.parent))   # a config may begin with  from another_config import *
    try:
        values = runpy.run_path(str(path))
    except Exception as error:   # whatever the file raises is the person's to mend, and this line says where
        raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    finally:
        sys.path.pop(0)
    return {k: v for k, v in values.items() if k[0] != '_' and not isinstance(v, types.ModuleType)}


def read_arguments(argv):
    """[(where it was said, key, value, value is still text)] in order of increasing precedence, and whether help is asked."""
    files, settings, wants_help = [], [], False
    for arg in argv:
        if arg in ('-h', '--help'):
            wants_help = True
        elif arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')   # once: a value may itself contain '='
            if not equals:
                raise UserError(f'{arg} has no value: write {arg}=VALUE')
            settings.append((arg, key, text, True))
        elif arg.endswith('.py'):
            files += [(f'{arg}: {key}', key, value, False) for key, value in read_config_file(arg).items()]
        else:
            raise UserError(f'{arg!r} is neither a config file (something.py) nor --key=value')
    return files + settings, wants_help


def knob_comments(cls):
    """{field: its trailing comment in the source}."""
    return dict(re.findall(r'^    (\w+): .*?  # (.+)$', getsource(cls), re.MULTILINE))


def show_help(program, instances):
    """Print every knob of the dataclass instances with its value and comment."""
    print(f'usage: {program} [config/FILE.py] [--key=value ...]\n')
    for instance in instances:
        print((type(instance).__doc__ or '').strip().splitlines()[0])
        comments = knob_comments(type(instance))
        for f in fields(instance):
            value = getattr(instance, f.name)
            text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
            print(f'  --{f.name}={text:<{max(1, 30 - len(f.name))}}  {comments.get(f.name, "")}')
        print()


def configure(argv, general, methods=None, program='train.py'):
    """
    The knobs of a run: an instance of the dataclass `general` and, with `methods` ({name: dataclass}), one of the method
    that the knob `method` names. Returns (general, method or None, {key: where it was set}).
    Raises UserError for what cannot be used; prints help and exits with 0 for --help.
    """
    settings, wants_help = read_arguments(argv)
    method = None
    if methods:
        name = next((value for _, key, value, _ in reversed(settings) if key == 'method'), general().method)
        if name not in methods:
            raise unknown('method', str(name), methods)
        method = methods[name]
    classes = [general] + ([method] if method else [])
    kinds = {key: kind for cls in classes for key, kind in typing.get_type_hints(cls).items()}
    values, origins = {}, {}
    for said, key, value, is_text in settings:
        if key not in kinds and callable(value):   # a function that the config file imported or defined for itself
            continue
        if key not in kinds:
            raise UserError(f'{said}: there is no knob {key!r}' + nearest(key, kinds) + '; --help lists them all')
        try:
            values[key] = (parse if is_text else check)(value, kinds[key])
        except ValueError:
            raise UserError(f'{said}: {key} wants {describe_type(kinds[key])}, not {value!r}') from None
        origins[key] = said
    instances = [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes]
    if wants_help:
        show_help(program, instances)
        sys.exit(0)
    return instances[0], instances[1] if method else None, origins


def check_ranges(instance, **ranges):
    """Raise UserError for a knob, or a value in a list, that is not within its range (least, largest or None)."""
    for knob, (least, largest) in ranges.items():
        values = getattr(instance, knob)
        for value in values if isinstance(values, tuple) else (values,):
            if value < least or largest is not None and value > largest:
                limits = f'at least {least:g}' if largest is None else f'between {least:g} and {largest:g}'
                raise UserError(f'{knob} must be {limits}, not {value:g}')


def differences(instance):
    """{knob: value} of a dataclass instance where it differs from the defaults."""
    def default(f):
        return f.default if f.default is not MISSING else f.default_factory()
    return {f.name: getattr(instance, f.name) for f in fields(instance) if getattr(instance, f.name) != default(f)}
