"""The commands that README and docs show are run, at a tiny size."""

import glob
import re
import shlex
import shutil

import pytest
from conftest import ROOT, call, write_lines

from engine.stage import Result
from model import GPT, GPTConfig

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]

# what is tried elsewhere: it needs a network, a GPU, nanoGPT, a compiler, or SmolLM2's weights
ELSEWHERE = re.compile(
    r'mt_bench|compile|smollm2|tasks[=_]|out/a |out/larger$|--data=dolly|'
    r'prepare\.py (fineweb_edu|dolly|NAME)'
)
SMALLER = {  # knobs that a command gets besides its own
    'train.py config': ' --dry_run',  # at toy size they run in test_train.py
    'train.py': ' --tokens=512 --eval_tokens=512 --batch_size=2',
    'evaluate.py': ' --eval_tokens=256 --kl_examples=2 --draft_prompts=2',
    'inheritune.py': ' --samples=2',
    'data/prepare.py': ' --out=prepared',
    '-m extras.alignment': ' --samples=16 --block_size=16',
    'bench.py': ' --size=64x2 --block_size=32 --rounds=1',
    'scaling.py fit': ' --bootstrap=1 --out=fitted',
    'scaling.py advise out': ' --bootstrap=1',
    'scaling.py diagnose': ' --samples=2',
}


def commands():
    """All commands of shell blocks that start `python FILE.py`, without it and their comments."""
    found = {}
    for page in PAGES:
        for block in re.findall(r'```sh\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL):
            for line in block.replace('\\\n', ' ').splitlines():
                line = ' '.join(line.split('#')[0].split())
                if line.startswith('python ') and not ELSEWHERE.search(line):
                    found[line.removeprefix('python ')] = page.name
    return list(found)


@pytest.fixture(scope='module')
def workplace(data_dir, tmp_path_factory):
    """A clone in which the family of the quick start, a chain and a sweep were trained."""
    folder = tmp_path_factory.mktemp('clone')
    (folder / 'config').symlink_to(ROOT / 'config')
    (folder / 'data').symlink_to(data_dir)
    shape = dict(vocab_size=257, block_size=128)
    stages = [f'progressive_tiny/{size}' for size in ('32x2', '48x2', '64x2', '64x4')]
    stages += [
        'col_tiny/64x2',
        'col_tiny/64x4',
        'scaling_tiny/48x2-66k-stk2-262k',
        'let_tiny/teacher',
    ]
    for number, name in enumerate(stages):
        stage, size = folder / 'out' / name, (re.findall(r'\d+x\d', name) or ['32x2'])[0]
        GPT(GPTConfig.named(size, **shape)).save(stage, 'bytes')
        Result(stage.name, str(stage), flops=48.0, val_loss=5.5, position=number).write()
        line = dict(step=1, tokens=8, flops=48.0, loss=5.5, grad_norm=1.0, param_norm=1.0)
        write_lines(stage / 'metrics.jsonl', [line])
        (stage / 'stage.json').write_text('{"origin": {}}')
    GPT(GPTConfig.named('gpt2-32x12', **shape)).save(folder / 'gpt2', 'bytes')
    shutil.copytree(stage, folder / 'out' / 'let_tiny' / 'baseline')
    shutil.copytree(stage, folder / 'some' / 'folder')
    rows = [f'scratch,55536,0,{D}e5,0,{3 / D**0.1 + D % 3 / 99}' for D in (1, 2, 4, 8, 16)]
    loss = lambda D1, D2: 4 / D1**0.1 / D2 ** (0.1 - D1 / 200)  # noqa: E731
    grid = [(D1, D2) for D1 in (1, 2, 4) for D2 in (1, 2, 4)]
    rows += [f'stk2,55536,{D1}e5,{D2}e5,0,{loss(D1, D2)}' for D1, D2 in grid]
    text = '\n'.join(['method,N,D1,D2,seed,loss', *rows])
    (folder / 'out' / 'scaling_tiny' / 'results.csv').write_text(text)
    answers = [dict(instruction=f'n{i}', output='x') for i in range(50)]
    write_lines(folder / 'mine.jsonl', answers)
    pairs = [dict(prompt=f'n{i}', chosen='x', rejected='y') for i in range(50)]
    write_lines(folder / 'pairs.jsonl', pairs)
    return folder


def test_there_are_commands():
    assert len(commands()) > 40


@pytest.mark.parametrize('line', commands())
def test_a_command_of_the_documents_works(line, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for made in ('grown', 'child', 'out/mine', 'prepared'):  # by another command of the documents
        shutil.rmtree(made, ignore_errors=True)
    words = [name for word in shlex.split(line) for name in glob.glob(word) or [word]]
    more = next((more for start, more in SMALLER.items() if line.startswith(start)), '')
    command = call(shlex.join(words) + more)
    assert command.returncode == 0 and command.stdout, command.stderr
