"""Every command that README and docs show is run, as it is written, at a tiny size."""

import glob
import importlib
import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT

from model import GPT, GPTConfig

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]

# what is tried elsewhere: it needs a network, a GPU, nanoGPT, a compiler, or SmolLM2's weights
ELSEWHERE = re.compile(
    r'torchrun|-m pytest|mt_bench|\.\.\.|\bpip\b|compile|nanogpt|from_gguf|smollm2|grown --data|'
    r'family/4b|tasks[=_]|out/a |prepare\.py (fineweb_edu|dolly|NAME)|--data=dolly'
)
SMALLER = {  # knobs that a command gets besides its own
    'train': ['--tokens=512', '--eval_tokens=512', '--batch_size=2'],
    'evaluate': ['--eval_tokens=256', '--kl_examples=2', '--draft_prompts=2'],
    'inheritune': ['--samples=2'],
    'data.prepare': ['--out=prepared'],
    'extras.alignment': ['--samples=16', '--block_size=16'],
    'bench': ['--size=64x2', '--block_size=32', '--rounds=1'],
    'scaling fit': ['--bootstrap=2', '--out=fitted'],
    'scaling diagnose': ['--samples=2'],
}


def commands():
    """{command: page} of all shell blocks that start `python FILE.py`, comments dropped."""
    found = {}
    for page in PAGES:
        for block in re.findall(r'```sh\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL):
            for line in block.replace('\\\n', ' ').splitlines():
                line = ' '.join(line.split('#')[0].split())
                if line.startswith('python ') and not ELSEWHERE.search(line):
                    found.setdefault(line, page.name)
    return found


@pytest.fixture(scope='module')
def workplace(data_dir, tmp_path_factory):
    """A clone in which the family of the quick start, a chain and a sweep were trained."""
    folder = tmp_path_factory.mktemp('clone')
    (folder / 'config').symlink_to(ROOT / 'config')
    (folder / 'data').symlink_to(data_dir)
    shape = dict(vocab_size=257, block_size=128)
    for i, size in enumerate(('32x2', '48x2', '64x2', '64x4')):
        save_stage(folder / 'out' / 'progressive_tiny' / size, GPTConfig.named(size, **shape), i)
    for size in ('64x2', '64x4'):
        save_stage(folder / 'out' / 'col_tiny' / size, GPTConfig.named(size, **shape), 0)
    save_stage(folder / 'out/scaling_tiny/48x2-66k', GPTConfig.named('48x2', **shape), 0)
    save_stage(folder / 'out/let_tiny/teacher', GPTConfig.named('32x2', **shape), 0)
    save_stage(folder / 'out/let_tiny/baseline', GPTConfig.named('32x12', **shape), 0)
    rows = [f'scratch,55536,0,{D}e5,0,{3 / D**0.1 + D % 3 / 99}' for D in (1, 2, 4, 8, 16)]
    loss = lambda D1, D2: 4 / D1**0.1 / D2 ** (0.1 - D1 / 200)  # noqa: E731
    grid = [(D1, D2) for D1 in (1, 2, 4) for D2 in (1, 2, 4, 8)]
    rows += [f'stk2,55536,{D1}e5,{D2}e5,0,{loss(D1, D2)}' for D1, D2 in grid]
    text = '\n'.join(['method,N,D1,D2,seed,loss', *rows])
    (folder / 'out/scaling_tiny/results.csv').write_text(text)
    GPT(GPTConfig.named('gpt2-32x12', **shape)).save(folder / 'gpt2', 'bytes')
    GPT(GPTConfig.named('64x2', **shape)).save(folder / 'some' / 'folder', 'bytes')
    (folder / 'mine.jsonl').write_text(
        '\n'.join(json.dumps(dict(instruction=f'n{i}', output='x')) for i in range(50))
    )
    preferred = [dict(prompt=f'n{i}', chosen='x', rejected='y') for i in range(50)]
    (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, preferred)))
    return folder


def save_stage(folder, config, number):
    """A finished stage, untrained."""
    from engine.stage import Result

    GPT(config).save(folder, 'bytes')
    numbers = dict(n_params=config.num_params(), params=1.0, tokens=8, flops=48.0, seconds=1.0)
    numbers |= dict(val_loss=5.5, bits_per_byte=8.0)
    Result(folder.name, str(folder), position=number, **numbers).write()
    line = dict(step=1, tokens=8, flops=48.0, loss=5.5, grad_norm=1.0, param_norm=1.0)
    (folder / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    (folder / 'stage.json').write_text('{"origin": {}}')


def test_there_are_commands():
    assert len(commands()) > 30


def test_the_quick_start_in_python_runs_as_it_is_printed(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    (snippet,) = re.findall(r'```python\n(import torch.*?)```', readme, re.DOTALL)
    exec(snippet, {})
    assert len(capsys.readouterr().out) > 10


@pytest.mark.parametrize('command', commands())
def test_a_command_of_the_documents_works(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    given = [word for word in shlex.split(command)[1:] if word != '-m']
    words = [name for word in given for name in glob.glob(word) or [word]]
    program = words.pop(0).removesuffix('.py').replace('/', '.')
    key = f'{program} {words[0]}' if program == 'scaling' else program
    if program == 'train' and words[0].startswith('config/'):
        words.append('--dry_run=True')  # at toy size they run in test_train.py
    else:
        words += SMALLER.get(key, [])
    for made in ('grown', 'child', 'out/mine', 'prepared'):  # by another command of the documents
        shutil.rmtree(made, ignore_errors=True)
    importlib.import_module(program).main(words)
    assert capsys.readouterr().out
