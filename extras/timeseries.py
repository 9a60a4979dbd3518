"""
Late-to-Early Training beyond text (Appendix E): the same objective and loop on time-series
classification, on the ten data sets of the paper's Table 2 or another one of the UEA archive.

    python train.py config/let_timeseries.py                      # Japanese vowels, from nothing
    python train.py config/let_timeseries_qwen2.py --dry_run=True # the ten sets, from Qwen2-0.5B

The package sktime reads a set: it ships JapaneseVowels and BasicMotions, and others are read from
DATA_DIR/timeseries/NAME, or fetched there. The model is the language model with numbers for tokens:
a linear map replaces the embedding, the classes replace the vocabulary, and only a series' last
step has a target. The paper fine-tunes Qwen-0.5B with TimesNet as the teacher; here the teacher is
a small model of our own, trained on the same set first.
"""

import statistics
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import NonNegative, Positive
from data.loader import Source
from engine.errors import UserError, first_line, import_extra
from engine.hub import model_folder
from engine.parallel import to_device
from engine.stage import Origin, Stage
from let import Alignment, pair_layers, teach
from model import GPT, load, read_config


class Shape(NamedTuple):
    """What a data set looks like."""

    n: int  # series to train on
    length: int  # steps of the longest
    channels: int
    classes: int


PAPERS = {  # the ten sets of Table 2, as the archive describes them
    'EthanolConcentration': Shape(261, 1751, 3, 4),
    'FaceDetection': Shape(5890, 62, 144, 2),
    'Handwriting': Shape(150, 152, 3, 26),
    'Heartbeat': Shape(204, 405, 61, 2),
    'JapaneseVowels': Shape(270, 29, 12, 9),
    'PEMS-SF': Shape(267, 144, 963, 7),
    'SelfRegulationSCP1': Shape(268, 896, 6, 2),
    'SelfRegulationSCP2': Shape(200, 1152, 7, 2),
    'SpokenArabicDigits': Shape(6599, 93, 13, 10),
    'UWaveGestureLibrary': Shape(120, 315, 3, 8),
}


def read_split(name, split, folder):
    """([array (steps, channels) of each series], their labels) of a split. Raises UserError."""
    read = import_extra('sktime.datasets', 'time series need the package sktime')
    known = Path(read.__file__).parent / 'data' / name
    where = None if known.is_dir() else str(folder)
    how = dict(return_X_y=True, return_type='nested_univ', extract_path=where)
    try:
        if where:
            Path(where).mkdir(parents=True, exist_ok=True)
        frame, labels = read.load_UCR_UEA_dataset(name, split=split, **how)
        rows = frame.itertuples(index=False)
        return [np.stack([channel.to_numpy() for channel in row]).T for row in rows], labels
    except Exception as error:  # of its reader, or of its download
        wanted = f'{name}/{name}_TRAIN.ts and {name}_TEST.ts belong there'
        reason = f'cannot be read from {folder}, or fetched ({first_line(error)})'
        raise UserError(f'{name} {reason}: {wanted}') from error


@cache
def series_of(name, folder):
    """
    {'train': (x, y), 'test': (x, y)}: x (n, length, channels) float32, normalised by the training
    split, 0 behind a series' end; y (n, length) int64, its class at its last step, else -100.
    UserError without sktime, or without the data set.
    """
    found = {split: read_split(name, split, folder) for split in ('train', 'test')}
    steps = np.concatenate(found['train'][0])
    shift, scale = np.nanmean(steps, 0), np.nanstd(steps, 0)
    scale[scale == 0] = 1.0
    longest = max(len(series) for part, _ in found.values() for series in part)
    classes = sorted(set(found['train'][1]))
    splits = {}
    for split, (part, labels) in found.items():
        x = np.zeros((len(part), longest, steps.shape[1]), np.float32)
        y = np.full((len(part), longest), -100, np.int64)
        if unseen := set(labels) - set(classes):
            raise UserError(f'{name}: no series to train on is of class {min(unseen)}')
        for i, (series, label) in enumerate(zip(part, labels)):
            x[i, : len(series)] = np.nan_to_num((series - shift) / scale)  # a gap: the mean
            y[i, len(series) - 1] = classes.index(label)
        splits[split] = x, y
    return splits


def shape_of(name, folder):
    """The Shape of a data set that is here."""
    x, y = series_of(name, folder)['train']
    return Shape(*x.shape, int(y.max()) + 1)


def series_source(knobs, name, folder):
    """The Source of a data set: every epoch a new permutation; the test split to validate."""
    train_x, train_y = series_of(name, folder)['train']
    test_x, test_y = series_of(name, folder)['test']
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
def accuracy(folder, splits):
    """Share of the test split of series_of() that the model in `folder` classifies correctly."""
    x, y = map(torch.from_numpy, splits['test'])
    model, right = load(folder).eval(), 0
    for rows, wanted in zip(x.split(64), y.split(64)):
        asked = wanted != -100
        right += (model(rows).logits[asked].argmax(-1) == wanted[asked]).sum().item()
    return right / len(x)


def from_language_model(base, config):
    """A model of `config` with the layers and the final norm of the language model in `base`."""
    model, old = GPT(config), load(base).state_dict()
    state = model.state_dict()
    for name in state.keys() - {'wte.weight', 'lm_head.weight'}:
        state[name] = old[name][: len(state[name])].to(state[name])  # positions: the first ones
    model.load_state_dict(state)
    return model


@dataclass
class TimeSeries:
    """LET on time series (Appendix E): a small teacher, then the target without and with it."""

    datasets: tuple[str, ...] = ('JapaneseVowels',)  # of the UEA archive
    size: str = '64x4'  # target model; with a base that is not here yet, its size in a plan
    base: str = ''  # language model whose layers the target begins with: a folder or hub name
    teacher_size: str = '32x2'  # teacher, trained first on the same series
    epochs: Positive = 60.0  # of the target model
    teacher_epochs: Positive = 120.0  # passes of the teacher over the training series
    teacher_learning_rate: NonNegative = 0.0  # of the teacher; 0: learning_rate
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 0.5  # as a fraction of the steps
    pairing: str = 'L2E'  # as in let.py
    reads_corpora = False

    def stages(self, run):
        """For every data set the teacher; then the target without it and with it."""
        self.folder = str(Path(run.data_dir) / 'timeseries')
        if not self.datasets or len(set(self.datasets)) < len(self.datasets):
            raise UserError(f'datasets={",".join(self.datasets)} must be different ones')
        if run.toy:
            self.base, self.datasets = '', ('JapaneseVowels',)
        planned = run.dry_run
        for name in self.datasets:
            known = planned and name in PAPERS
            shape = PAPERS[name] if known else shape_of(name, self.folder)
            yield from self.on(name, shape, run)

    def on(self, name, shape, run):
        """The stages of one data set."""
        fields = dict(vocab_size=shape.classes, channels=shape.channels, block_size=shape.length)
        fields['tied'] = False  # what reads numbers is no head
        small = run.model_config(self.teacher_size, **fields)
        config = run.model_config(self.size, **fields)
        if self.base and not (run.dry_run and not Path(self.base).is_dir()):
            base = read_config(model_folder(self.base))
            if base.pos == 'learned' and base.block_size < shape.length:
                longest = f'{shape.length} steps, {self.base} has {base.block_size} positions'
                raise UserError(f'{name} has series of {longest}')
            config = replace(base, **fields)
        ours, theirs = pair_layers(self.pairing, small.n_layer, config.n_layer)
        alignment = Alignment(ours, theirs, self.lambda0, self.s_stop)

        def make(kind, config, epochs):
            X = config.num_params(head=True)
            stage = Stage(f'{name}-{kind}', config, epochs * shape.n * shape.length, X)
            stage.source = partial(series_source, name=name, folder=self.folder)
            stage.knobs = dict(block_size=shape.length)
            stage.labels = dict(dataset=name, model=kind)
            if self.base and kind != 'teacher':
                stage.origin = Origin('weights', (Path(self.base).name,))
                stage.model = partial(from_language_model, self.base, config)
            return stage

        stage = make('teacher', small, self.teacher_epochs)
        stage.once = True
        if self.teacher_learning_rate:
            stage.knobs['learning_rate'] = self.teacher_learning_rate
        teacher = yield stage
        yield make('baseline', config, self.epochs)
        stage = make('let', config, self.epochs)
        teach(stage, teacher.folder, alignment, small.num_params())
        yield stage

    def summary(self, results):
        """Test accuracy on every data set: the teacher's, and means over the seeds (Table 2)."""
        records = []
        for name in self.datasets:
            splits = series_of(name, self.folder)
            for model in ('teacher', 'baseline', 'let'):
                runs = [
                    r for r in results if (r.labels['dataset'], r.labels['model']) == (name, model)
                ]
                right = [accuracy(r.folder, splits) for r in runs]
                record = {'data set': name, 'model': model, 'accuracy': statistics.mean(right)}
                record['sd'] = statistics.stdev(right) if len(right) > 1 else None
                record['test loss'] = statistics.mean(r.val_loss for r in runs)
                records.append(record)
        return [records]
