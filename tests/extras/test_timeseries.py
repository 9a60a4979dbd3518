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
from conftest import ROOT  # noqa: E402
from test_train import metrics, planned  # noqa: E402

import train  # noqa: E402
from data.loader import Share  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.report import by_label  # noqa: E402
from extras import timeseries  # noqa: E402
from extras.timeseries import (  # noqa: E402
    PAPERS,
    accuracy,
    from_language_model,
    series_of,
    series_source,
    shape_of,
)
from model import GPT, GPTConfig, load  # noqa: E402

vowels = partial(series_of, 'JapaneseVowels', 'nowhere')


def write_set(folder, name, lengths=(5, 3)):
    """A data set as the archive has it: two channels, two classes, series of several lengths."""
    (folder / name).mkdir(parents=True)
    head = f'@problemName {name}\n@timeStamps false\n@missing false\n@univariate false\n'
    head += '@dimensions 2\n@equalLength false\n@classLabel true up down\n@data\n'
    for split in ('TRAIN', 'TEST'):
        lines = []
        for i in range(12):
            sign, label = (1, 'up') if i % 2 else (-1, 'down')
            steps = [sign * (step + i / 7) for step in range(lengths[i % len(lengths)])]
            lines.append(
                ','.join(map(str, steps)) + ':' + ','.join(['7'] * len(steps)) + f':{label}'
            )
        (folder / name / f'{name}_{split}.ts').write_text(head + '\n'.join(lines) + '\n')


def test_the_data_are_those_of_the_publication():
    (x, y), (test_x, _) = vowels()['train'], vowels()['test']
    shape = shape_of('JapaneseVowels', 'nowhere')
    assert shape == shape_of('JapaneseVowels', 'nowhere', planned=True) == (270, 29, 12, 9)
    assert test_x.shape == (370, 29, 12) and (np.bincount(y[y != -100]) == 30).all()
    lengths = (y != -100).argmax(1) + 1
    real = np.concatenate([row[:n] for row, n in zip(x, lengths)])
    assert lengths.min() == 7
    assert np.allclose(real.mean(0), 0, atol=1e-4) and np.allclose(real.std(0), 1, atol=1e-4)


def test_a_set_is_read_from_a_folder(tmp_path):
    write_set(tmp_path, 'Mine')
    x, y = series_of('Mine', str(tmp_path))['train']
    assert x.shape == (12, 5, 2) and shape_of('Mine', str(tmp_path)).classes == 2
    assert not x[..., 1].any()  # a channel that says nothing has no scale
    assert (y[0] == [-100, -100, -100, -100, 0]).all() and y[1, 2] == 1 and not x[1, 3:].any()


def test_a_set_that_is_not_here_is_named_with_where_it_belongs(tmp_path):
    with pytest.raises(UserError, match='NoSuchSet cannot be read .*NoSuchSet/NoSuchSet_TRAIN.ts'):
        series_of('NoSuchSet', str(tmp_path))


def test_every_epoch_reads_every_utterance_once_in_a_new_order():
    source = series_source(train.Run(), 'JapaneseVowels', 'nowhere')
    first, second = source.read(np.arange(270)), source.read(np.arange(270, 540))
    assert not np.array_equal(first[0], second[0])
    assert np.array_equal(*(np.sort(e[0].reshape(270, -1).sum(1)) for e in (first, second)))
    assert sum(count for _, _, count in source.validation(64, Share())) == 370
    shares = [source.validation(64, Share('cpu', rank, 3)) for rank in range(3)]
    assert sum(count for share in shares for _, _, count in share) == 370


def test_a_model_that_reads_numbers_is_saved_and_loaded(tmp_path):
    model = GPT(GPTConfig.named('16x2', vocab_size=9, channels=12, block_size=29))
    model.save(tmp_path)
    x = torch.randn(2, 29, 12)
    assert torch.equal(load(tmp_path)(x).logits, model(x).logits)
    assert 0 <= accuracy(tmp_path, vowels()) < 0.5


@pytest.mark.parametrize('size', ['16x2', 'gpt2-16x2'])
def test_a_target_begins_with_a_language_models_layers(tmp_path, size):
    torch.manual_seed(0)
    base = GPT(GPTConfig.named(size, vocab_size=50, block_size=64))
    base.save(tmp_path / 'base')
    shape = dict(vocab_size=9, channels=12, block_size=29, tied=False)
    model = from_language_model(tmp_path / 'base', GPTConfig.named(size, **shape))
    assert torch.equal(model.blocks[1].mlp.up.weight, base.blocks[1].mlp.up.weight)
    assert torch.equal(model.norm.weight, base.norm.weight)
    assert model(torch.randn(2, 29, 12)).logits.shape == (2, 29, 9)


def test_teacher_and_target_learn_two_sets(tmp_path):
    """On Japanese vowels and a set of one's own, from a language model's layers."""
    write_set(tmp_path / 'data' / 'timeseries', 'Mine')
    torch.manual_seed(0)
    GPT(GPTConfig.named('16x2', vocab_size=50, block_size=64)).save(tmp_path / 'base')
    sizes = [
        '--datasets=JapaneseVowels,Mine',
        '--teacher_size=gpt2-16x1',
        f'--base={tmp_path / "base"}',
    ]
    how = ['--epochs=12', '--teacher_epochs=12', '--seeds=1', '--learning_rate=0.01']
    where = [f'--out_dir={tmp_path / "run"}', f'--data_dir={tmp_path / "data"}', '--device=cpu']
    train.main(['config/let_timeseries.py', *sizes, *how, *where])
    let = tmp_path / 'run' / 'JapaneseVowels-let'
    assert accuracy(let, vowels()) > 0.6 and 'similarity' in metrics(let)[0]
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert json.loads((let / 'stage.json').read_text())['origin']['models'] == ['base']
    assert all(f'| {name} ' in report for name in ('JapaneseVowels', 'Mine'))


@pytest.mark.parametrize(
    'knobs, word',
    [
        (['--datasets='], 'this run has no stages'),
        (['--datasets=EthanolConcentration', '--base=BASE'], 'BASE has 64 positions'),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, monkeypatch, knobs, word):
    monkeypatch.chdir(tmp_path)
    GPT(GPTConfig.named('gpt2-16x2', vocab_size=50, block_size=64)).save('BASE')
    preset = ROOT / 'config' / 'let_timeseries.py'
    with pytest.raises(UserError, match=word):
        train.main([str(preset), *knobs, '--dry_run=True'])


def test_what_pads_a_series_is_not_aligned(monkeypatch):
    seen = []
    monkeypatch.setattr(timeseries, 'let_objective', lambda *a, **how: seen.append(how))
    planned('let_timeseries.py', '--dry_run=True', '--seeds=1')
    assert seen == [dict(padded=True)]


def test_the_papers_ten_sets_are_planned_without_them():
    stages = [stage for stage, _ in planned('let_timeseries_qwen2.py', '--dry_run=True')]
    assert list(by_label(stages, 'dataset')) == list(PAPERS)
    target = stages[1]
    assert target.config.n_layer == 24 and target.config.channels == 3 and not target.config.tied
    assert target.config.vocab_size == 4 and target.origin.models == ('Qwen2-0.5B',)
    assert stages[2].teaching['target_layer'] == 6
