"""
Late-to-Early Training beyond text (paper 002, Appendix E): the same objective and loop on time-series classification.

    python train.py config/let_timeseries.py

The data are nine speakers' Japanese vowels (Kudo et al., 1999): 12 coefficients a step, 7 to 29 steps, 270 utterances to train
on, 370 to test, as the package sktime holds them. The model is the language model with numbers for tokens: a linear map takes
the place of the embedding, the classes that of the vocabulary, and only an utterance's last step has a target. Where the paper
fine-tunes Qwen-0.5B with TimesNet as the teacher, here teacher and target begin at random.
"""
import statistics
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from configurator import Stage, UserError, check_ranges
from data.loader import Source, to_device
from evaluate import table
from let import let, pair_layers
from model import load


@cache
def japanese_vowels():
    """
    {'train': (x, y), 'test': (x, y)}: x (n, 29, 12) float32, each channel with mean 0 and variance 1 over the training split
    and 0 behind an utterance's end; y (n, 29) int64, its class at its last step, else -100. Raises UserError without sktime.
    """
    try:
        from sktime.datasets import load_japanese_vowels
    except ImportError:
        raise UserError('the time series need the package sktime: pip install -r requirements-extras.txt') from None
    splits = {}
    for split in ('train', 'test'):
        series, labels = load_japanese_vowels(split=split, return_X_y=True)
        utterances = [np.stack([channel.to_numpy() for channel in row]).T for row in series.itertuples(index=False)]
        splits[split] = utterances, np.array(labels).astype(np.int64) - 1
    steps = np.concatenate(splits['train'][0])
    longest = max(len(utterance) for utterances, _ in splits.values() for utterance in utterances)
    for split, (utterances, labels) in splits.items():
        x = np.zeros((len(labels), longest, steps.shape[1]), np.float32)
        y = np.full((len(labels), longest), -100, np.int64)
        for i, utterance in enumerate(utterances):
            x[i, :len(utterance)] = (utterance - steps.mean(0)) / steps.std(0)
            y[i, len(utterance) - 1] = labels[i]
        splits[split] = x, y
    return splits


def vowel_source(knobs):
    """The Source of the vowels: every epoch a new permutation of the training split; all of the test split to validate."""
    (train_x, train_y), (test_x, test_y) = japanese_vowels()['train'], japanese_vowels()['test']

    def read(positions):
        epochs, places = np.divmod(positions, len(train_x))
        orders = {epoch: np.random.default_rng((knobs.seed, epoch)).permutation(len(train_x)) for epoch in set(epochs.tolist())}
        rows = np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places)])
        return train_x[rows], train_y[rows]

    def validation(batch_size, device, rank, world_size):
        for rows in np.array_split(np.arange(len(test_x))[rank::world_size], -(-len(test_x) // world_size // batch_size)):
            yield *to_device((test_x[rows], test_y[rows]), device), len(rows)
    return Source(read, validation, bytes_per_token=1.0, tokenizer='')


@torch.no_grad()
def accuracy(folder):
    """Share of the test split that the model in `folder` classifies rightly."""
    x, y = map(torch.from_numpy, japanese_vowels()['test'])
    asked = y != -100
    return (load(folder).eval()(x).logits[asked].argmax(-1) == y[asked]).double().mean().item()


@dataclass
class TimeSeries:
    """LET on time series (paper 002, Appendix E): a small teacher, then the target model without and with it."""
    size: str = '64x4'            # target model
    teacher_size: str = '32x2'    # teacher, trained first on the same series
    epochs: float = 60.0          # of the target model
    teacher_epochs: float = 120.0
    strength: float = 0.1         # lambda0
    stop: float = 0.5             # S_stop as a fraction of the steps
    pairing: str = 'L2E'          # as in let.py
    seeds: int = 5                # runs with and without the teacher

    reads_corpora = False

    def stages(self, run):
        """The teacher; then for every seed the target model without it and with it."""
        check_ranges(self, epochs=(1e-9, None), teacher_epochs=(1e-9, None), strength=(0, None), stop=(0, None), seeds=(1, None))
        x, y = japanese_vowels()['train']
        shape = dict(vocab_size=int(y.max()) + 1, channels=x.shape[2], block_size=x.shape[1])
        small, config = (run.model_config(size, **shape) for size in (self.teacher_size, self.size))
        layers = pair_layers(self.pairing, small.n_layer, config.n_layer)
        teacher = yield Stage('teacher', small, self.teacher_epochs * x[..., 0].size, small.num_params(head=True),
                              source=vowel_source, knobs=dict(block_size=x.shape[1]))
        for seed in range(self.seeds):
            for name in ('baseline', 'let'):
                taught = f', taught by teacher: layer {layers[0]} to {layers[1]}, {self.strength:g} until {self.stop:g}'
                yield Stage(f'{name}-{seed}', config, self.epochs * x[..., 0].size, config.num_params(head=True),
                            start='random initialisation' + taught * (name == 'let'), knobs=dict(seed=run.seed + seed, block_size=x.shape[1]),
                            source=vowel_source, objective=let(teacher.folder, layers[1], layers[0], self.strength, self.stop)
                            if name == 'let' else None)

    def summary(self, results):
        """Test accuracy: the teacher's, and means over the seeds."""
        rows = [['model', 'accuracy', 'standard deviation', 'test loss']]
        for name in ('teacher', 'baseline', 'let'):
            found = [r for r in results if r.name.split('-')[0] == name]
            right = [accuracy(r.folder) for r in found]
            rows.append([name, f'{statistics.mean(right):.1%}', f'{statistics.stdev(right):.1%}' if len(right) > 1 else '',
                         f'{statistics.mean(r.val_loss for r in found):.3f}'])
        return table(rows)
