"""
Late-to-Early Training beyond text (Appendix E): the same objective and loop on time-series
classification.

    python train.py config/let_timeseries.py

The data are nine speakers' Japanese vowels (Kudo et al., 1999), from the package sktime: 12
coefficients per step, 7 to 29 steps, 270 utterances to train on, 370 to test. The model is the
language model with numbers for tokens: a linear map replaces the embedding, the classes replace
the vocabulary, and only an utterance's last step has a target. The paper fine-tunes Qwen-0.5B with
TimesNet as the teacher; here teacher and target start at random.
"""

import statistics
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from configurator import Count, NonNegative, Positive
from data.loader import Source, to_device
from engine.errors import import_extra
from engine.report import spread
from engine.stage import Stage
from let import Alignment, pair_layers, teach
from model import load


@cache
def japanese_vowels():
    """
    {'train': (x, y), 'test': (x, y)}: x (n, 29, 12) float32, normalised by the training split, 0
    behind an utterance's end; y (n, 29) int64, its class at its last step, else -100. UserError
    without sktime.
    """
    datasets = import_extra('sktime.datasets', 'the time series need the package sktime')
    series, classes = {}, {}
    for split in ('train', 'test'):
        frame, labels = datasets.load_japanese_vowels(split=split, return_X_y=True)
        rows = frame.itertuples(index=False)
        series[split] = [np.stack([channel.to_numpy() for channel in row]).T for row in rows]
        classes[split] = np.array(labels).astype(np.int64) - 1
    steps = np.concatenate(series['train'])
    longest = max(len(utterance) for utterance in series['train'] + series['test'])
    splits = {}
    for split, utterances in series.items():
        x = np.zeros((len(utterances), longest, steps.shape[1]), np.float32)
        y = np.full((len(utterances), longest), -100, np.int64)
        for i, utterance in enumerate(utterances):
            x[i, : len(utterance)] = (utterance - steps.mean(0)) / steps.std(0)
            y[i, len(utterance) - 1] = classes[split][i]
        splits[split] = x, y
    return splits


def vowel_source(knobs):
    """The Source of the vowels: every epoch a new permutation; the test split to validate."""
    train_x, train_y = japanese_vowels()['train']
    test_x, test_y = japanese_vowels()['test']
    n = len(test_x)

    def read(positions):
        rows = []
        for epoch, place in zip(*np.divmod(positions, len(train_x))):
            generator = np.random.default_rng((knobs.seed, epoch))
            rows.append(generator.permutation(len(train_x))[place])
        return train_x[rows], train_y[rows]

    def validation(batch_size, share):
        mine = np.arange(n)[share.rank :: share.world_size]
        for rows in np.array_split(mine, -(-n // share.world_size // batch_size)):
            yield *to_device((test_x[rows], test_y[rows]), share.device), len(rows)

    return Source(read, validation, bytes_per_token=1.0, tokenizer='')


@torch.no_grad()
def accuracy(folder):
    """Share of the test split that the model in `folder` classifies correctly."""
    x, y = map(torch.from_numpy, japanese_vowels()['test'])
    asked = y != -100
    predicted = load(folder).eval()(x).logits[asked].argmax(-1)
    return (predicted == y[asked]).double().mean().item()


@dataclass
class TimeSeries:
    """LET on time series (Appendix E): a small teacher, then the target without and with it."""

    size: str = '64x4'  # target model
    teacher_size: str = '32x2'  # teacher, trained first on the same series
    epochs: Positive = 60.0  # of the target model
    teacher_epochs: Positive = 120.0  # passes of the teacher over the training series
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 0.5  # as a fraction of the steps
    pairing: str = 'L2E'  # as in let.py
    seeds: Count = 5  # runs with and without the teacher

    reads_corpora = False

    def stages(self, run):
        """The teacher; then for every seed the target model without it and with it."""
        x, y = japanese_vowels()['train']
        n, length, channels = x.shape
        shape = dict(vocab_size=int(y.max()) + 1, channels=channels, block_size=length)
        small = run.model_config(self.teacher_size, **shape)
        config = run.model_config(self.size, **shape)
        ours, theirs = pair_layers(self.pairing, small.n_layer, config.n_layer)
        alignment = Alignment(ours, theirs, self.lambda0, self.s_stop)

        def make(name, config, epochs, seed):
            stage = Stage(name, config, epochs * n * length, config.num_params(head=True))
            stage.source = vowel_source
            stage.knobs = dict(block_size=length, seed=run.seed + seed)
            stage.labels = dict(model=name.split('-')[0])
            return stage

        teacher = yield make('teacher', small, self.teacher_epochs, 0)
        for seed in range(self.seeds):
            yield make(f'baseline-{seed}', config, self.epochs, seed)
            stage = make(f'let-{seed}', config, self.epochs, seed)
            teach(stage, teacher.folder, alignment, small.num_params())
            yield stage

    def summary(self, results):
        """Test accuracy: the teacher's, and means over the seeds."""
        records = []
        for model in ('teacher', 'baseline', 'let'):
            runs = [r for r in results if r.labels['model'] == model]
            right = [accuracy(r.folder) for r in runs]
            record = {'model': model, 'accuracy': statistics.mean(right), 'sd': spread(right)}
            record['test loss'] = statistics.mean(r.val_loss for r in runs)
            records.append(record)
        return [records]
