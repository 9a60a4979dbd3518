"""
Late-to-Early Training beyond text (Appendix E): the same objective and loop on time-series
classification, on the ten data sets of the paper's Table 2 or another one of the UEA archive.

    python train.py config/let_timeseries.py                      # Japanese vowels, from scratch
    python train.py config/let_timeseries_qwen2.py --dry_run=True # the ten sets, from Qwen2-0.5B

The package sktime reads the sets. It ships JapaneseVowels and BasicMotions; others are read from
DATA_DIR/timeseries/NAME, or downloaded there. The model is the language model with numbers in place
of tokens: a linear map replaces the embedding, the classes replace the vocabulary, and only the
last step of a series has a target. The paper fine-tunes Qwen-0.5B with TimesNet as the teacher;
here the teacher is a small model of this kind, trained on the same set first.
"""

import statistics
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from configurator import NonNegative, Positive
from data.instruct import shuffled
from data.loader import Source, fixed_batches
from engine.errors import UserError, first_line, import_extra
from engine.hub import model_folder
from engine.report import by_label
from engine.stage import Origin, Stage
from let import Alignment, let_objective, pair_layers, teach
from model import GPT, load, read_config


class Shape(NamedTuple):
    """The sizes of a data set."""

    n: int  # series to train on
    length: int  # steps of the longest series
    channels: int
    classes: int


PAPERS = {  # the ten sets of Table 2: n, length, channels, classes, as the archive has them
    'EthanolConcentration': '261 1751 3 4',
    'FaceDetection': '5890 62 144 2',
    'Handwriting': '150 152 3 26',
    'Heartbeat': '204 405 61 2',
    'JapaneseVowels': '270 29 12 9',
    'PEMS-SF': '267 144 963 7',
    'SelfRegulationSCP1': '268 896 6 2',
    'SelfRegulationSCP2': '200 1152 7 2',
    'SpokenArabicDigits': '6599 93 13 10',
    'UWaveGestureLibrary': '120 315 3 8',
}


def shape_of(name, folder, planned=False):
    """
    The Shape of a data set; if `planned`, the published one of the paper's ten sets, without
    reading it. Raises UserError.
    """
    if planned and name in PAPERS:
        return Shape(*map(int, PAPERS[name].split()))
    splits = series_of(name, folder)
    classes = 1 + max(int(y.max()) for _, y in splits.values())
    return Shape(*splits['train'][0].shape, classes)


def read_split(name, split, folder):
    """
    ([array (steps, channels) of each series], labels) of a split, 'train' or 'test'. Raises
    UserError without sktime, or if the set cannot be read.
    """
    read = import_extra('sktime.datasets', 'time series need the package sktime')
    known = Path(read.__file__).parent / 'data' / name
    where = None if known.is_dir() else str(folder)  # sktime finds the sets it ships by itself
    how = dict(return_X_y=True, return_type='df-list', extract_path=where)
    try:
        if where:
            Path(where).mkdir(parents=True, exist_ok=True)
        frames, labels = read.load_UCR_UEA_dataset(name, split=split, **how)
        return [frame.to_numpy() for frame in frames], labels
    except Exception as error:  # from sktime's reader or its download
        raise UserError(
            f'{name} cannot be read from {folder}, or fetched ({first_line(error)}): '
            f'{name}/{name}_TRAIN.ts and {name}_TEST.ts belong there'
        ) from error


@cache
def series_of(name, folder):
    """
    {'train': (x, y), 'test': (x, y)}: x (n, length, channels) float32, with mean 0 and variance 1
    over the training split, 0 after the end of a series; y (n, length) int64, the class at the last
    step of a series, -100 elsewhere. Raises UserError without sktime or the data set.
    """
    train, labels = read_split(name, 'train', folder)
    test, more_labels = read_split(name, 'test', folder)
    steps, n = np.concatenate(train), len(train)
    shift, scale = np.nanmean(steps, 0), np.nanstd(steps, 0)
    scale[scale == 0] = 1.0
    rows = [(series - shift) / scale for series in (*train, *test)]
    rows = [torch.from_numpy(np.nan_to_num(row)).float() for row in rows]  # missing: 0, the mean
    x = pad_sequence(rows, batch_first=True).numpy()
    y = np.full(x.shape[:2], -100)
    _, classes = np.unique([*labels, *more_labels], return_inverse=True)
    y[range(len(rows)), [len(row) - 1 for row in rows]] = classes
    return dict(train=(x[:n], y[:n]), test=(x[n:], y[n:]))


def series_source(knobs, name, folder):
    """The Source of a data set: reshuffled every epoch, validated on the test split."""
    (x, y), (test_x, test_y) = series_of(name, folder).values()

    def read(positions):
        rows = shuffled(positions, len(x), knobs.seed)
        return x[rows], y[rows]

    validation = partial(fixed_batches, lambda rows: (test_x[rows], test_y[rows]), len(test_x))
    return Source(read, validation, bytes_per_token=1.0, tokenizer='')


@torch.no_grad()
def accuracy(folder, splits):
    """Share of the test split of series_of() that the model in `folder` classifies correctly."""
    x, y = map(torch.from_numpy, splits['test'])
    model, right = load(folder).eval(), 0
    for rows, wanted in zip(x.split(64), y.split(64)):
        right += (model(rows).logits.argmax(-1) == wanted).sum().item()  # padding, -100, never is
    return right / len(x)


def from_language_model(base, config):
    """A model of `config` with the layers and the final norm of the language model in `base`."""
    model, old = GPT(config), load(base)
    model.blocks, model.norm = old.blocks, old.norm
    if config.pos == 'learned':
        model.wpe.weight.data = old.wpe.weight.data[: config.block_size].to(torch.float32)
    return model


@dataclass
class TimeSeries:
    """LET on time series (Appendix E): a small teacher, then the target without and with it."""

    datasets: tuple[str, ...] = ('JapaneseVowels',)  # of the UEA archive
    size: str = '64x4'  # target model; with a base, its size for a plan before it is downloaded
    base: str = ''  # language model whose layers the target begins with: a folder or hub name
    teacher_size: str = '32x2'  # teacher, trained first on the same series
    epochs: Positive = 60.0  # of the target model
    teacher_epochs: Positive = 120.0  # passes of the teacher over the training series
    teacher_learning_rate: NonNegative = 0.0  # of the teacher; 0: learning_rate
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 0.5  # step at which L_proj ends; up to 1: fraction of all steps
    pairing: str = 'L2E'  # as in let.py
    reads_corpora = False

    def stages(self, run):
        """Yield for every data set the teacher, then the target without it and with it."""
        self.folder = str(Path(run.data_dir) / 'timeseries')
        if run.toy:
            self.base, self.datasets = '', ('JapaneseVowels',)
        for name in dict.fromkeys(self.datasets):
            yield from self.on(name, shape_of(name, self.folder, run.dry_run), run)

    def on(self, name, shape, run):
        """Yield the stages of the data set `name`, of a Shape. Raises UserError."""
        fields = dict(
            vocab_size=shape.classes,
            channels=shape.channels,
            block_size=shape.length,
            tied=False,  # the input map reads channels, the head writes classes
        )
        small = run.model_config(self.teacher_size, **fields)
        config = run.model_config(self.size, **fields)
        if self.base:
            here = not run.dry_run or Path(self.base).is_dir()  # a plan downloads nothing
            base = read_config(model_folder(self.base)) if here else config
            if base.pos == 'learned' and base.block_size < shape.length:
                raise UserError(
                    f'{name} has series of {shape.length} steps, {self.base} has '
                    f'{base.block_size} positions'
                )
            config = replace(base, **fields)

        def make(kind, config, epochs):
            X = config.num_params(head=True)
            stage = Stage(f'{name}-{kind}', config, epochs * shape.n * shape.length, X)
            stage.source = partial(series_source, name=name, folder=self.folder)
            stage.knobs = dict(block_size=shape.length)
            stage.labels = dict(dataset=name, model=kind)
            return stage

        stage = make('teacher', small, self.teacher_epochs)
        stage.once = True
        if self.teacher_learning_rate:
            stage.knobs['learning_rate'] = self.teacher_learning_rate
        teacher = yield stage
        for kind in ('baseline', 'let'):
            stage = make(kind, config, self.epochs)
            if self.base:
                stage.origin = Origin('weights', (Path(self.base).name,))
                stage.model = partial(from_language_model, self.base, config)
            if kind == 'let':
                layers = pair_layers(self.pairing, small.n_layer, config.n_layer)
                how = Alignment(*layers, self.lambda0, self.s_stop)
                objective = let_objective(teacher.folder, how, padded=True)
                teach(stage, 'let', teacher.name, objective, small.num_params(), asdict(how))
            yield stage

    def summary(self, results):
        """Records of the test accuracy on every data set, means over the seeds (Table 2)."""
        records = []
        for name, found in by_label(results, 'dataset').items():
            for model, runs in by_label(found, 'model').items():
                right = [accuracy(r.folder, series_of(name, self.folder)) for r in runs]
                record = {'data set': name, 'model': model, 'accuracy': statistics.mean(right)}
                record['sd'] = statistics.stdev(right) if len(right) > 1 else None
                records.append(record)
        return [records]
