"""Knobs: what is merged, what is refused, and with which words."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT, run_command, succeeds

import train
from configurator import Count, Fraction, configure, convert, knob_help
from engine.errors import UserError
from train import Run


@dataclass
class General:
    """General knobs."""

    method: str = 'walk'  # which method
    learning_rate: float = 1e-3  # the maximum
    n_layer: int = 4  # layers
    compile: bool = False  # compile
    sizes: tuple[str, ...] = ()  # a list


@dataclass
class Walk:
    """Walking."""

    speed: float = 5.0  # km/h


def configured(*argv):
    return configure(list(argv), General, dict(walk=Walk))[:2]


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / 'a.py'
    file.write_text('import math\n_mine = 7\nlearning_rate = 2e-3\nn_layer = 2 ** 3\nspeed = 4\n')
    general, walk = configured('--n_layer=6', str(file))  # the command line wins wherever it stands
    assert general == General('walk', 2e-3, 6) and walk.speed == 4.0
    run, _, _ = configure(['config/let_1.4b.py'], Run, train.METHODS)
    assert (run.beta2, run.block_size) == (0.999, 1280)  # of config/_let.py, which it builds on


def test_values_may_follow_their_knobs_and_words_stand_anywhere():
    argv = ['--n_layer', '6', 'fast', '--compile', '--learning_rate=1e-2', '--sizes', 'a,b']
    run, _, origins = configure(argv, General, words=('method',))
    found = General('fast', 1e-2, 6, True, ('a', 'b'))
    assert run == found and origins.keys() == {f.name for f in dataclasses.fields(General)}


@pytest.mark.parametrize(
    'text, kind, value',
    [
        ('20e9', int, 20_000_000_000),
        ('1_000', int, 1000),
        ('true', bool, True),
        ('1b,2b', tuple[str, ...], ('1b', '2b')),
        ("('1b', '2b')", tuple[str, ...], ('1b', '2b')),
        ('1,2.5', tuple[float, ...], (1.0, 2.5)),
        ('', tuple[int, ...], ()),
    ],
)
def test_convert(text, kind, value):
    assert convert(text, kind) == value and type(convert(text, kind)) is type(value)


@pytest.mark.parametrize(
    'value, kind',
    [
        ('fast', float),
        ('1e999', float),
        ('__import__("os")', int),
        ('(' * 500, int),
        (10**400, Count),
        (1.5, Fraction),
        ('linear', Literal['cosine', 'wsd']),
        ((3, 0), tuple[Count, ...]),
    ],
)
def test_convert_refuses(value, kind):
    with pytest.raises((ValueError, TypeError, SyntaxError, OverflowError, MemoryError)):
        convert(value, kind)


@pytest.mark.parametrize(
    'argument, words',
    [
        ('--learning_rat=1', 'learning_rat.*did you mean learning_rate?'),
        ('--learning_rate=fast', 'learning_rate must be a number.*fast'),
        ('--sizes', '--sizes: sizes must be a list.*not left out'),
        ('n_layer=3', 'neither a config file'),
        ('--method=wlak', 'did you mean walk?'),
        ('config/progresive_tiny.py', 'no config file.*did you mean config/progressive_tiny.py?'),
    ],
)
def test_mistakes_are_one_clear_line(argument, words):
    with pytest.raises(UserError, match=words) as error:
        configured(argument)
    assert '\n' not in str(error.value)


def test_a_knob_of_another_method_is_refused_by_its_name():
    with pytest.raises(UserError, match="no knob 'width': it belongs to the method progressive"):
        configure(['--width=aki'], Run, train.METHODS)


@pytest.mark.parametrize(
    'source', ['n_layer = ', 'n_layers = 3', 'n_layer = "x"', '1/0', 'n_layer = lambda: 3']
)
def test_mistakes_in_a_config_file_name_it(tmp_path, source):
    (tmp_path / 'mistake.py').write_text(source)
    with pytest.raises(UserError, match='mistake.py'):
        configured(str(tmp_path / 'mistake.py'))


def test_every_knob_of_every_method_has_a_help_text_and_shows_its_choices():
    for cls in (train.Run, *train.METHODS.values()):
        helps = knob_help(cls)
        assert all(comment for _, comment in helps), cls
        names = [name for name, _ in helps if name]
        assert names == [field.name for field in dataclasses.fields(cls)]
    helps = knob_help(train.Run)
    assert 'one of cosine, wsd, constant' in dict(helps)['schedule']
    assert helps[helps.index(('', 'optimisation')) + 1][0] == 'batch_size'  # as in the source


@pytest.mark.parametrize('words', ['', '--method=col', 'config/progressive_8b.py'])
def test_the_help_fits_a_terminal_and_lists_the_methods(words):
    lines = succeeds(f'train.py {words} --help').splitlines()
    assert max(map(len, lines)) <= 100
    assert {line.split()[0] for line in lines if line.strip()} >= train.METHODS.keys()


def test_who_plans_waits_for_torch_alone():
    line = '-X importtime train.py config/progressive_8b.py --dry_run'
    process = run_command(line)
    assert process.returncode == 0, process.stderr[-500:]
    slow = r'\b(torch\.distributed\.(checkpoint|fsdp|tensor)|torch\._dynamo|matplotlib|datasets)$'
    assert not re.search(slow, process.stderr, re.MULTILINE)


def test_output_survives_any_locale_and_a_reader_that_stops():
    python = f'PYTHONIOENCODING=ascii {sys.executable}'
    shell = f'{python} train.py --help | head -1; exit ${{PIPESTATUS[0]}}'
    process = subprocess.run(['bash', '-c', shell], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.count('\n') == 1 and process.stderr == ''
