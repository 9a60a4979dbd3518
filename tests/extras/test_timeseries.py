"""
The objective of LET on time series: the data as published, a language model that reads numbers,
accuracy from its folder.
"""

import numpy as np
import pytest
import torch

pytest.importorskip('sktime')
from test_train import metrics

import train  # noqa: E402
from data.loader import Share  # noqa: E402
from extras.timeseries import accuracy, japanese_vowels, vowel_source
from model import GPT, GPTConfig, load


def test_the_data_are_those_of_the_publication():
    (x, y), (test_x, test_y) = japanese_vowels()['train'], japanese_vowels()['test']
    assert (
        x.shape == (270, 29, 12)
        and test_x.shape == (370, 29, 12)
        and set(y[y != -100]) == set(range(9))
    )
    assert (
        (np.bincount(y[y != -100]) == 30).all()
        and ((y != -100).sum(1) == 1).all()
        and ((test_y != -100).sum(1) == 1).all()
    )
    lengths = (y != -100).argmax(1) + 1
    real = np.concatenate([row[:n] for row, n in zip(x, lengths)])
    assert (
        lengths.min() == 7
        and np.allclose(real.mean(0), 0, atol=1e-4)
        and np.allclose(real.std(0), 1, atol=1e-4)
    )


def test_every_epoch_reads_every_utterance_once_in_a_new_order():
    source = vowel_source(train.Run())
    first, second = source.read(np.arange(270)), source.read(np.arange(270, 540))
    assert not np.array_equal(first[0], second[0]) and np.array_equal(
        *(np.sort(e[0].reshape(270, -1).sum(1)) for e in (first, second))
    )
    assert (
        sum(count for _, _, count in source.validation(64, Share()))
        == 370
        == sum(
            count
            for rank in range(3)
            for _, _, count in source.validation(64, Share('cpu', rank, 3))
        )
    )


def test_a_model_that_reads_numbers_is_saved_and_loaded(tmp_path):
    model = GPT(GPTConfig.named('16x2', vocab_size=9, channels=12, block_size=29))
    model.save(tmp_path)
    x = torch.randn(2, 29, 12)
    assert torch.equal(load(tmp_path)(x).logits, model(x).logits) and 0 <= accuracy(tmp_path) < 0.5


def test_teacher_and_target_learn_the_speakers(tmp_path):
    train.main(
        [
            'config/let_timeseries.py',
            '--size=16x2',
            '--teacher_size=16x1',
            '--epochs=12',
            '--teacher_epochs=12',
            '--seeds=1',
            '--learning_rate=0.01',
            f'--out_dir={tmp_path}',
            '--device=cpu',
            '--data_dir=nowhere',
        ]
    )
    assert accuracy(tmp_path / 'let-0') > 0.6 and 'similarity' in metrics(tmp_path / 'let-0')[0]
    assert '\n| let ' in (tmp_path / 'report.md').read_text()
