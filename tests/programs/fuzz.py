"""
A fuzzer: every command with odd knobs, odd fields of its files and damaged bytes.

    python tests/programs/fuzz.py FOLDER SEED FIRST LAST

runs the cases FIRST to LAST - 1 of a seed in this process, below FOLDER, and prints two lines of
JSON for each: what is about to be tried, and how it ended. A case is a function of seed and number.
"""

import contextlib
import csv
import importlib
import io
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ['TQDM_DISABLE'] = '1'

import torch  # noqa: E402

from engine.errors import DISK_ERRORS, UserError  # noqa: E402

torch.set_num_threads(1)

TEXTS = ['', ' ', 'x', 'None', 'nan', 'inf', '-inf', '[]', '{}', '()', '0x', 'é', '\udcff', 'a,b']
TEXTS += [
    'a/b',
    '..',
    '../..',
    '.',
    '/',
    '/dev/null',
    'x' * 300,
    '\n',
    '=',
    '--',
    '%s',
    '\0',
    '64x4',
]
TEXTS += ['True', 'false', '1,2', "'", '64x0', '0x4', '160000x160', '1e400', '9' * 400]
NUMBERS = ['-1', '0', '1', '2', '3', '7', '1.5', '-0.5', '1e18', '1e30', '-1e18', '1e-30', '2**64']
NUMBERS += ['0.999', '100', '16']
JSON_VALUES = [None, True, False, 0, 1, -1, 2, 1.5, 1e18, 10**30, -(10**9), float('nan')]
JSON_VALUES += [float('inf'), '', 'x', '../../canary/x', '\udcff', 'x' * 300, [], [1], [None], {}]
JSON_VALUES += [{'a': 1}, [[]], 'nan', '1', 10**6, 7, 0.3, [1.0, 2.0, 3.0, 4.0]]

# elsewhere, the offline corpora are made anew: a minute; without a dry run, hours are trained; a
# compiler takes longer than a case may
LONG = ('data_dir', 'dry_run', 'compile')
FAR = ('', '/', '..', '../..')  # that would be asking to write there, or to read the whole disk
TINY = '--block_size=16 --batch_size=2 --eval_tokens=32 --device=cpu --data_dir=data '
TINY += '--out_dir=out'
TRAIN = {
    'pretrain': '--size=16x1 --tokens=64',
    'progressive': '--sizes=16x1,16x2 --tokens=64,64',
    'growth': '--base=16x1 --target=16x2 --base_tokens=32 --tokens=64 '
    '--variants=random,aki+stack --seeds=1',
    'inheritune': '--size=16x2 --baselines=random --tokens=64',
    'let': '--size=16x2 --teacher_size=16x1 --teacher_tokens=32 --tokens=64 '
    '--variants=let --s_stop=0.5',
    'sweep': '--sizes=16x1 --longest=128 --first=1.0 --second=0.5 --warmup=1 --dry_run=True',
    'col': '--ancestor_size=16x3 --ancestor_tokens=64 --chain=16x2,16x1 --tokens=64 '
    '--descendants= --recovery_tokens=64',
    'timeseries': '--dry_run=True',
    'posttrain': '--models=model --data=pairs --preferences=prefs --sft_epochs=0.2 '
    '--dpo_epochs=0.5',
}
COMMANDS = [
    *[('train', f'--method={method} {TINY} {more}') for method, more in TRAIN.items()],
    ('train', f'--init_from=model --tokens=64 {TINY}'),
    ('train', f'--method=inheritune --reference=model --max_rounds=1 --tokens=64 {TINY}'),
    ('train', f'--data=pairs --tokens=64 {TINY}'),
    ('sample', '--model=model --max_new_tokens=2 --device=cpu'),
    ('sample', '--model=model --draft=model --max_new_tokens=2 --device=cpu'),
    ('evaluate', 'model --data_dir=data --eval_tokens=64 --kl_examples=2 --device=cpu'),
    ('evaluate', 'run --data_dir=data --eval_tokens=64 --kl_examples=2 --device=cpu'),
    ('expand', 'model out --to=32x2'),
    ('inheritune', 'model --data_dir=data --samples=2 --length=8 --device=cpu --out=out'),
    ('inheritune', 'model out --n=1'),
    ('col', 'run out --to=16x2'),
    ('scaling', 'fit few.csv --bootstrap=2'),
    ('scaling', 'advise --fit=fit.json --base_params=1e6 --base_tokens=1e7 --budget=1e15'),
    ('scaling', 'advise --paper=True --base_params=1e9 --base_tokens=1e12 --budget=1e21'),
    ('scaling', 'sunk_cost --paper=True --out=out'),
    ('scaling', 'optimal --paper=True --base_tokens=1e10 --out=out'),
    ('scaling', 'diagnose model --data_dir=data --samples=2 --block_size=8 --iterations=1'),
    ('scaling', 'toy --features=100'),
    (
        'evaluate',
        'model --drafts=model --draft_prompts=2 --data_dir=data --eval_tokens=64 --device=cpu',
    ),
    (
        'extras.mt_bench',
        'model --questions=q.jsonl --out=out.jsonl --max_new_tokens=2 --device=cpu',
    ),
    (
        'extras.alignment',
        'model --size=16x2 --data_dir=data --samples=16 --block_size=8 --device=cpu',
    ),
    ('data.prepare', 'prefs.jsonl --tokenizer=bytes --out=out --val_fraction=0.5'),
    ('data.prepare', 'text/*.txt --tokenizer=bytes --out=out --val_fraction=0.5'),
    ('data.prepare', 'text/*.jsonl --tokenizer=bytes --out=out --val_fraction=0.5'),
    ('expand', 'nobody/nothing out --to=32x2'),
    ('bench', '--size=16x1 --batch_size=1 --block_size=8 --rounds=1 --steps=1 --device=cpu'),
]


def knobs_of(module, words):
    """The names of all knobs that a command has."""
    train = importlib.import_module('train')
    if module == 'train':
        chosen = [word.split('=')[1] for word in words if word.startswith('--method=')]
        classes = [train.Run, train.METHODS[(chosen or ['pretrain'])[0]]]
    else:
        found = importlib.import_module(module)
        diagnostics = importlib.import_module('extras.diagnostics')
        names = dict(
            sample='Options',
            evaluate='Evaluation',
            expand='FolderGrowth',
            inheritune='Attention',
            col='Interpolation',
            bench='Bench',
        )
        names |= {'data.prepare': 'Preparation', 'extras.mt_bench': 'Answering'}
        names |= {'extras.alignment': 'Options'}
        if module == 'scaling':
            verbs = dict(fit=found.Fitting, advise=found.Question)
            verbs |= dict(sunk_cost=found.SunkCost, optimal=found.Optimum)
            verbs |= dict(diagnose=diagnostics.Diagnosis, toy=diagnostics.Toy)
            classes = [verbs[words[0]]]
        else:
            classes = [getattr(found, names[module])]
    return sorted({field.name for cls in classes for field in fields(cls)})


def odd_knobs(rng, module, words):
    """The words of a command with one or two knobs set to something odd."""
    names = [name for name in knobs_of(module, words) if name not in LONG]
    for _ in range(rng.choice((1, 1, 2))):
        name, value = rng.choice(names), rng.choice(rng.choice((TEXTS, NUMBERS)))
        if name in ('out', 'out_dir', 'corpus') and value in FAR:
            value = 'elsewhere'
        if (name, value) == ('tokens', '0'):
            value = '1'  # 0 asks for 20 tokens a parameter, two at a time: minutes of honest work
        words = [*words, f'--{name}={value}']
    if rng.random() < 0.1:
        word = rng.choice(TEXTS)
        words = [*words, 'elsewhere' if word in FAR else word]
    return words


def places(value, path=()):
    """The paths to all values within some JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = list(enumerate(value))[:8]
    for key, child in items:
        yield from places(child, (*path, key))


def odd_json(rng, file):
    """Replace or remove one value of a JSON file; returns what was done."""
    text = file.read_text(encoding='utf-8')
    lines = file.suffix == '.jsonl'
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    path = rng.choice(list(places(content))[1:] or [()])
    if not path:
        file.write_text(json.dumps(rng.choice(JSON_VALUES)))
        return [file.name, 'all']
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    value = rng.choice([*JSON_VALUES, KeyError])
    if value is KeyError:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    texts = [json.dumps(line) for line in content] if lines else [json.dumps(content)]
    file.write_text('\n'.join(texts) + '\n')
    return [file.name, *map(str, path), repr(value)]


def odd_cell(rng, file):
    """Replace one cell of a CSV file."""
    rows = list(csv.reader(file.open()))
    row = rng.choice(rows)
    value = rng.choice([*TEXTS, *NUMBERS, '../../canary/x', '/'.join('..' * 9)])
    row[rng.randrange(len(row))] = value.replace('\udcff', '?')
    with open(file, 'w', newline='') as opened:
        csv.writer(opened).writerows(rows)
    return [file.name, value]


def odd_bytes(rng, file):
    """Flip, cut or insert bytes."""
    data = bytearray(file.read_bytes())
    place = rng.randrange(max(1, len(data)))
    how = rng.choice(('flip', 'cut', 'insert', 'empty'))
    if how == 'flip' and data:
        data[place] ^= 1 << rng.randrange(8)
    elif how == 'cut':
        del data[place:]
    elif how == 'insert':
        data[place:place] = bytes(rng.choice((b'\xff', b'\0', b'"', b'{', b'\n')))
    else:
        data.clear()
    file.write_bytes(bytes(data))
    return [file.name, how, place]


def odd_file(rng, words):
    """Damage one of the files that a command reads."""
    read = {part for word in words for part in (word, word.partition('=')[2])}
    files = []
    for name in sorted({name.split('/')[0] for name in read} - {''}):
        files += [Path(name)] if Path(name).is_file() else sorted(Path(name).rglob('*.*'))
    kinds = {}
    for path in files:
        kinds.setdefault(path.name, []).append(path)
    if not kinds:
        return []
    file = rng.choice(kinds[rng.choice(sorted(kinds))])
    if file.suffix in ('.json', '.jsonl') and rng.random() < 0.8:
        return odd_json(rng, file)
    if file.suffix == '.csv' and rng.random() < 0.8:
        return odd_cell(rng, file)
    return odd_bytes(rng, file)


def make_case(rng):
    """(module, arguments, what was damaged) of a case, in its folder."""
    module, line = rng.choice(COMMANDS)
    words, damage = line.split(), []
    if rng.random() < 0.5:
        words = odd_knobs(rng, module, words)
    else:
        damage = odd_file(rng, words)
    return module, words, damage


def run_case(module, words):
    """How a command ends: 'fine', 'one line', or what a person should never see."""
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            importlib.import_module(module).main(words)
    except UserError as error:
        return 'one line' if len(str(error)) < 2000 else f'long: {str(error)[:200]}'
    except SystemExit as end:
        return 'fine' if end.code in (0, None) else 'one line'
    except OSError as error:
        if error.filename is not None or error.errno in DISK_ERRORS:
            return 'one line'
        return kind_of(error)
    except BaseException as error:
        return kind_of(error)
    return 'fine'


def kind_of(error):
    """What and where: errors of one kind are one mistake."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))
    ]
    own = [f for f in frames if 'tests/programs' not in f.filename]
    where = own[-1] if own else frames[-1]
    name = Path(where.filename).relative_to(ROOT)
    return f'traceback: {type(error).__name__} at {name}:{where.lineno}: {str(error)[:150]}'


def make_given(folder):
    """What the commands read: corpora, a model, a run, results and their fit."""
    from data.instruct import write_supervised
    from data.prepare import Preparation
    from model import GPT, GPTConfig

    (folder / 'text').mkdir(parents=True)
    os.chdir(folder)
    words = (ROOT / 'README.md').read_text(encoding='utf-8')
    for i in range(4):
        Path('text', f'{i}.txt').write_text(words[1000 * i : 1000 * i + 1000], encoding='utf-8')
    lines = [json.dumps(dict(text=words[500 * i : 500 * i + 500])) for i in range(8)]
    Path('text', 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    run_case(
        'data.prepare', 'text/*.txt --tokenizer=bytes --out=data/pydocs --val_fraction=0.5'.split()
    )
    pairs = [(dict(instruction=f'n{i}', input='', output=f'o{i}'), i % 4 == 0) for i in range(16)]
    write_supervised(pairs, Preparation('pairs', tokenizer='bytes'), Path('data/pairs'))
    write_supervised(
        pairs, Preparation('prefs', tokenizer='bytes'), Path('data/prefs'), 'preferences'
    )
    rows = [dict(prompt=f'n{i}', chosen=f'o{i}', rejected='no') for i in range(8)]
    Path('prefs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    Path('q.jsonl').write_text('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n')
    GPT(GPTConfig.named('16x2', vocab_size=257, block_size=16)).save(Path('model'), 'bytes')
    trained = run_case(
        'train', f'--method=progressive {TINY} --sizes=16x1,32x2 --tokens=64,64'.split()
    )
    assert trained == 'fine', trained
    Path('out').rename('run')
    base = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 4)]
    losses = [3 / (D1 * D2) ** 0.1 + 0.01 * (D1 % 3) for D1, D2 in base]
    rows = [('stk2', 1e6, D1 * 1e6, D2 * 1e5, 0, y) for (D1, D2), y in zip(base, losses)]
    rows += [('scratch', 1e6, 0, D2 * 1e6, 0, 3 / D2**0.1 + D2 % 3 / 99) for D2 in (1, 2, 4, 8, 16)]
    for name, chosen in (('results.csv', rows), ('few.csv', rows[4:])):  # stk2's: too few for a law
        with open(name, 'w', newline='') as file:
            csv.writer(file).writerows([('method', 'N', 'D1', 'D2', 'seed', 'loss'), *chosen])
    outcome = run_case('scaling', 'fit results.csv --bootstrap=2'.split())
    assert outcome == 'fine' and Path('run/report.md').is_file(), outcome


def main(folder, seed, first, last):
    """Run the cases of this seed, one after the other, and print what they do."""
    folder = Path(folder).resolve()
    canary = folder / 'canary'
    canary.mkdir(exist_ok=True, parents=True)
    if not (folder / 'given').is_dir():
        shutil.rmtree(folder / 'begun', ignore_errors=True)
        make_given(folder / 'begun')
        (folder / 'begun').rename(folder / 'given')
    in_use = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * 2**30,) * 2)
    for number in range(int(first), int(last)):
        rng = random.Random(f'{seed}-{number}')
        at = folder / 'cases' / str(number)
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(folder / 'given', at)
        os.chdir(at)
        module, words, damage = make_case(rng)
        print(
            json.dumps(dict(number=number, module=module, words=words, damage=damage)), flush=True
        )
        started = time.time()
        outcome = run_case(module, words)
        seconds = round(time.time() - started, 2)
        if any(canary.iterdir()):
            outcome = f'wrote outside: {sorted(canary.iterdir())}'
        if not Path('/dev/null').is_char_device():
            outcome = 'replaced /dev/null'
        print(json.dumps(dict(number=number, outcome=outcome, seconds=seconds)), flush=True)
        os.chdir(folder)
        shutil.rmtree(at)


if __name__ == '__main__':
    main(*sys.argv[1:])
