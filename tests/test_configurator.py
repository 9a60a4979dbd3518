"""Knobs: what is merged, what is refused, and with which words."""

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT, run_command

import train
from configurator import (
    Count,
    Fraction,
    Positive,
    configure,
    convert,
    knob_help,
)
from engine.errors import UserError
from engine.files import write_atomically
from engine.stage import Result, Stage
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


METHODS = dict(walk=Walk)


def configured(*argv):
    return configure(list(argv), General, METHODS)[:2]


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / 'a.py'
    file.write_text(
        'import math\n_private = 7\nlearning_rate = 2e-3\nn_layer = 2 ** 3\nspeed = 4\n'
    )
    general, walk = configured('--n_layer=6', str(file))  # the command line wins wherever it stands
    assert (general.learning_rate, general.n_layer, general.compile, walk.speed) == (
        2e-3,
        6,
        False,
        4.0,
    )


def test_a_config_file_may_build_on_another():
    run, _, _ = configure(['config/let_1.4b.py'], Run, train.METHODS)
    assert (run.beta2, run.block_size) == (0.999, 1280)  # of config/_let.py


@pytest.mark.parametrize(
    'text, kind, value',
    [
        ('20e9', int, 20_000_000_000),
        ('1_000', int, 1000),
        ('3', float, 3.0),
        ('true', bool, True),
        ('False', bool, False),
        (True, bool, True),
        ('a=b', str, 'a=b'),
        ('', str, ''),
        ('1b,2b', tuple[str, ...], ('1b', '2b')),
        ("('1b', '2b')", tuple[str, ...], ('1b', '2b')),
        ('1,2.5', tuple[float, ...], (1.0, 2.5)),
        (7, tuple[int, ...], (7,)),
        ('', tuple[int, ...], ()),
    ],
)
def test_convert(text, kind, value):
    assert convert(text, kind) == value and type(convert(text, kind)) is type(value)


@pytest.mark.parametrize(
    'value, kind',
    [
        ('fast', float),
        ('nan', float),
        ('1e999', float),
        ('1.5', int),
        ('True', int),
        (True, int),
        (1, bool),
        ('2', bool),
        ('1,x', tuple[float, ...]),
        ('__import__("os")', int),
        ('(' * 500, int),
        ('[1]', float),
        ('\x00', int),
        (0, Count),
        (10**400, Count),
        (1.5, Fraction),
        (0.0, Positive),
        ('linear', Literal['cosine', 'wsd']),
        ((3, 0), tuple[Count, ...]),
        (None, str),
        (lambda: 1, float),
    ],
)
def test_convert_refuses(value, kind):
    with pytest.raises((ValueError, TypeError, SyntaxError, OverflowError, MemoryError)):
        convert(value, kind)


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--learning_rat=1'], ['learning_rat', 'did you mean learning_rate?']),
        (['--learning_rate=fast'], ['learning_rate must be a number', 'fast']),
        (['--n_layer=2.5'], ['n_layer must be a whole number']),
        (['--sizes'], ['--sizes: sizes must be a list', 'not left out']),
        (['n_layer=3'], ['neither a config file']),
        (['--method=wlak'], ['did you mean walk?']),
        (
            ['config/progresive_tiny.py'],
            ['no config file', 'did you mean config/progressive_tiny.py?'],
        ),
    ],
)
def test_mistakes_are_one_clear_line(argv, words):
    with pytest.raises(UserError) as error:
        configured(*argv)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'source',
    [
        'n_layer = ',
        'n_layers = 3',
        'n_layer = "x"',
        '1/0',
        'import sys; sys.path.nothing',
        'n_layer = lambda: 3',
        'n_layer = 10**400',
    ],
)
def test_mistakes_in_a_config_file_name_it(tmp_path, source):
    file = tmp_path / 'mistake.py'
    file.write_text(source)
    with pytest.raises(UserError, match='mistake.py'):
        configured(str(file))


def test_every_knob_of_every_method_has_a_help_text_and_shows_its_choices():
    for cls in (train.Run, *train.METHODS.values()):
        helps = knob_help(cls)
        assert all(comment for _, comment in helps), cls
        names = [name for name, _ in helps if name]
        assert names == [field.name for field in dataclasses.fields(cls)]
    helps = knob_help(train.Run)
    assert 'one of cosine, wsd, constant' in dict(helps)['schedule']
    place = helps.index(('', 'optimisation'))
    assert helps[place + 1][0] == 'batch_size'  # grouped as in the source


def test_the_help_fits_a_terminal_and_lists_the_methods(capsys):
    for words in ([], ['--method=col'], ['config/progressive_8b.py']):
        with pytest.raises(SystemExit):
            train.main([*words, '--help'])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 100
        for method in train.METHODS:
            assert any(line.split()[:1] == [method] for line in lines), method


def test_values_may_follow_their_knobs_and_words_stand_anywhere():
    argv = ['--n_layer', '6', 'fast', '--compile', '--learning_rate=1e-2', '--sizes', 'a,b']
    run, _, origins = configure(argv, General, words=('method',))
    found = General('fast', 1e-2, 6, True, ('a', 'b'))
    assert run == found and origins.keys() == {f.name for f in dataclasses.fields(General)}


def test_who_plans_waits_for_torch_alone():
    for command in (
        'train.py config/progressive_8b.py --dry_run',
        'scaling.py advise --paper --base_params=1e9 --base_tokens=1e12 --budget=1e21',
    ):
        process = subprocess.run(
            [sys.executable, '-X', 'importtime', *command.split()],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr[-500:]
        slow = (
            r'\b(torch\.distributed\.(checkpoint|fsdp|tensor)|torch\._dynamo|matplotlib|datasets)$'
        )
        assert not re.search(slow, process.stderr, re.MULTILINE), command


def result(folder, inherited_flops=30.0, baseline_flops=0.0, labels=None, **changes):
    fields = dict(name='a', folder=str(folder), n_params=1, params=1.0, tokens=2, flops=12.0)
    fields |= dict(val_loss=1.5, bits_per_byte=2.0, position=2, seconds=1.0)
    labels = (labels or {}) | (dict(baseline_flops=baseline_flops) if baseline_flops else {})
    before = {'those before': inherited_flops} if inherited_flops else {}
    return Result(**fields | changes, labels=labels, before=before)


def test_result_survives_a_move_and_counts_its_ancestors(tmp_path):
    result(tmp_path).write()
    moved = tmp_path.rename(tmp_path.parent / 'moved')
    read = Result.of(moved)
    assert read.total_flops == 42.0 and read.folder == str(moved) and read.val_loss == 1.5
    assert sum(Stage('b', None, 10, 1.0, parent=read).before.values()) == 42.0


def test_an_ancestor_that_two_parents_share_counts_once(tmp_path):
    ancestor = result(tmp_path, name='ancestor', inherited_flops=0.0, flops=100.0)
    parents = []
    for name in ('small', 'large'):
        before = Stage(name, None, 10, 1.0, also=(ancestor,)).before
        folder = tmp_path / name
        folder.mkdir()
        Result(name, str(folder), flops=7.0, before=before).write()
        parents.append(Result.of(folder))
    made = Stage('made', None, 10, 1.0, parent=parents[0], also=(parents[1],))
    assert sum(made.before.values()) == 100 + 7 + 7


@pytest.mark.parametrize('content', ['', '{', '{"name": "a"}', '[]', '\x80'])
def test_a_damaged_result_is_named(tmp_path, content):
    (tmp_path / 'result.json').write_text(content, encoding='latin-1')
    with pytest.raises(UserError, match='result.json'):
        Result.of(tmp_path)


def test_write_atomically_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / 'a.txt', 'old')
    write_atomically(tmp_path / 'a.txt', 'new')
    with pytest.raises(UserError, match='not Unicode'):
        write_atomically(tmp_path / 'a.txt', 'an argument of odd bytes: \udcff')
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt'] and (
        tmp_path / 'a.txt'
    ).read_text() == 'new'


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    """/dev/null, as a pipe stands for it here, is not replaced by a file."""
    os.mkfifo(tmp_path / 'pipe')
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / 'pipe', 'text')
    assert os.read(reader, 10) == b'text' and (tmp_path / 'pipe').is_fifo()
    os.close(reader)


def test_bare_flags_and_knobs_of_other_methods():
    run, _, _ = configure(['--toy', '--dry_run'], Run, train.METHODS)
    assert run.toy and run.dry_run
    with pytest.raises(
        UserError, match='--seed: seed must be a whole number, at least 0, not left out'
    ):
        configure(['--seed'], Run, train.METHODS)
    words = "no knob 'width': it belongs to the method progressive"
    with pytest.raises(UserError, match=words):
        configure(['--width=aki'], Run, train.METHODS)


def test_output_survives_any_locale_and_a_reader_that_stops(data_dir):
    process = run_command('train.py', '--dry_run', '--help', PYTHONIOENCODING='ascii')
    assert process.returncode == 0, process.stderr
    shell = f'{sys.executable} train.py --help | head -1; exit ${{PIPESTATUS[0]}}'
    process = subprocess.run(['bash', '-c', shell], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.count('\n') == 1 and process.stderr == ''
