"""
The objective of LET on time series: the data as published, a language model that reads numbers,
one that begins with another's layers, accuracy from its folder.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip('sktime')
from conftest import ROOT, refuses, succeeds  # noqa: E402
from test_train import plan_of  # noqa: E402

from engine.errors import UserError  # noqa: E402
from engine.log import read_metrics  # noqa: E402
from engine.report import by_label  # noqa: E402
from extras.timeseries import (  # noqa: E402
    PAPERS,
    accuracy,
    series_of,
    shape_of,
)
from model import GPT, GPTConfig  # noqa: E402

vowels = partial(series_of, 'JapaneseVowels', 'nowhere')


def write_set(folder, name):
    """A data set as the archive has it: two channels, two classes, series of 5 and 3 steps."""
    (folder / name).mkdir(parents=True)
    head = f'@problemName {name}\n@timeStamps false\n@missing false\n@univariate false\n'
    head += '@dimensions 2\n@equalLength false\n@classLabel true up down\n@data\n'
    for split in ('TRAIN', 'TEST'):
        lines = []
        for i in range(12):
            sign, n, label = (1, 3, 'up') if i % 2 else (-1, 5, 'down')
            steps = [str(sign * (step + i / 7)) for step in range(n)]
            lines.append(f'{",".join(steps)}:{",".join("7" * n)}:{label}')
        (folder / name / f'{name}_{split}.ts').write_text(head + '\n'.join(lines) + '\n')


def test_the_data_are_those_of_the_publication():
    (x, y), (test_x, _) = vowels()['train'], vowels()['test']
    shape = shape_of('JapaneseVowels', 'nowhere')
    assert shape == shape_of('JapaneseVowels', 'nowhere', planned=True) == (270, 29, 12, 9)
    assert test_x.shape == (370, 29, 12) and (np.bincount(y[y != -100]) == 30).all()
    lengths = (y != -100).argmax(1) + 1
    real = np.concatenate([row[:n] for row, n in zip(x, lengths)])
    assert np.allclose(real.std(0), 1, atol=1e-4)


def test_a_set_is_read_from_a_folder(tmp_path):
    write_set(tmp_path, 'Mine')
    x, y = series_of('Mine', str(tmp_path))['train']
    assert x.shape == (12, 5, 2) and shape_of('Mine', str(tmp_path)).classes == 2
    assert not x[..., 1].any()  # a channel that says nothing has no scale
    assert (y[0] == [-100, -100, -100, -100, 0]).all() and y[1, 2] == 1 and not x[1, 3:].any()
    with pytest.raises(UserError, match='NoSuchSet cannot be read .*NoSuchSet/NoSuchSet_TRAIN.ts'):
        series_of('NoSuchSet', str(tmp_path))


def test_teacher_and_target_learn_two_sets(tmp_path):
    """On Japanese vowels and a set of one's own, from a language model's layers."""
    write_set(tmp_path / 'data' / 'timeseries', 'Mine')
    torch.manual_seed(0)
    GPT(GPTConfig.named('16x2', vocab_size=50, block_size=64)).save(tmp_path / 'base')
    line = (
        f'train.py config/let_timeseries.py --datasets=JapaneseVowels,Mine --base={tmp_path}/base'
    )
    line += ' --teacher_size=gpt2-16x1 --epochs=12 --teacher_epochs=12 --seeds=1'
    line += f' --learning_rate=0.01 --out_dir={tmp_path}/run --data_dir={tmp_path}/data'
    succeeds(line)
    let = tmp_path / 'run' / 'JapaneseVowels-let'
    assert accuracy(let, vowels()) > 0.6 and 'similarity' in read_metrics(let)[0]
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert json.loads((let / 'stage.json').read_text())['origin']['models'] == ['base']
    assert all(f'| {name} ' in report for name in ('JapaneseVowels', 'Mine'))


def test_mistakes_are_found_before_training(tmp_path):
    GPT(GPTConfig.named('gpt2-16x2', vocab_size=50, block_size=64)).save(tmp_path / 'base')
    line = f'train.py {ROOT}/config/let_timeseries.py --dry_run --datasets='
    refuses(line, 'this run has no stages')
    refuses(f'{line}EthanolConcentration --base={tmp_path}/base', 'base has 64 positions')


def test_the_papers_ten_sets_are_planned_without_them():
    stages = [p.stage for p in plan_of('config/let_timeseries_qwen2.py').values()]
    assert list(by_label(stages, 'dataset')) == list(PAPERS)
    target = stages[1]
    assert (target.config.n_layer, target.config.channels, target.config.vocab_size) == (24, 3, 4)
    assert target.origin.models == ('Qwen2-0.5B',) and stages[2].teaching['target_layer'] == 6
