"""
The interface between methods and the training loop.

A method (progressive training, Inheritune, ...) is a dataclass of knobs with one generator,
`stages(run)`. It yields a `Stage`; train.py trains it and sends back its `Result`. Optional
attributes of a method:

    summary(results)     returns blocks for the report: texts, tables, figures (engine/report.py)
    corpora              names of corpora that its stages read in addition to the run's
    toy_corpora          {knob: corpus that a toy run reads instead}
    reads_corpora        False if its stages do not read the run's corpora

An objective is a function (model, x, y, Progress) -> (loss, count, scalars). x and y are (B, T)
int64, y -100 where nothing is learned. The loss is a scalar tensor, a mean over `count` terms:
targets that are not -100, or pairs. scalars, {name: scalar tensor}, are logged as means over them.
model(x, y) has the loss, but no logits; model(x).logits, (B, T, V), take more memory than the
automatic micro-batch reckons with. val_loss is the plain cross entropy, whatever the objective.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Optional

from engine.errors import UserError
from engine.files import read_json, write_json


@dataclass
class Origin:
    """Where a stage's starting weights come from, as data; `describe` puts it into words."""

    kind: str = 'random'  # weights, last state, growth, layers, half width, subset, linit, ...
    models: tuple[str, ...] = ()  # names of the models the weights are made from
    settings: dict = field(default_factory=dict)  # how: {'width': 'aki', 'depth': 'stack'}


@dataclass
class Stage:
    """One training run of a method: what to train, from which weights, on how many tokens."""

    name: str  # its folder under out_dir
    config: Any  # GPTConfig of the model that is trained
    tokens: float  # training tokens T, rounded up to whole batches; 0: nothing is trained
    params: float  # X in FLOPs = 6 X T, as the method's paper counts it
    origin: Origin = field(default_factory=Origin)
    model: Callable | None = None  # () -> starting model, called when the stage runs; None: resume
    # the parent's last state, optimizer included, or without a parent start from random weights
    parent: Optional['Result'] = None  # passes on its compute (`before`) and its data position
    also: tuple['Result', ...] = ()  # others whose compute counts: a second parent, a teacher
    begin: int | None = None  # position in the data order, in tokens; None: the parent's
    knobs: dict = field(default_factory=dict)  # general knobs that differ from the run's
    objective: Callable | None = None  # see above; None: next_token
    teaching: dict = field(default_factory=dict)  # {'objective': its name, settings ...}: part of
    # what identifies the stage; 'teacher_params', if any, counts in the estimate of GPU memory
    more_flops: Callable | None = None  # (Progress, tokens per step) -> FLOPs so far beyond 6 X T
    source: Callable | None = None  # knobs -> data.loader.Source; None: the run's corpora
    tokenizer: str = ''  # folder or hub name of the model whose tokenizer is saved; '': the data's
    observe: Callable | None = None  # model -> {name: value}, logged at evaluations and at the end;
    # if a value is named `score`, the stage ends with the model that had the highest
    labels: dict = field(default_factory=dict)  # for the report: {'variant': 'let', 'seed': 0}
    once: bool = False  # trained once and shared by all --seeds of a run

    @property
    def position(self):
        """The position in the data order at which this stage begins, in tokens."""
        inherited = self.parent.position if self.parent else 0
        return inherited if self.begin is None else self.begin

    @property
    def before(self):
        """
        Compute spent before this stage, {model: FLOPs}: on all ancestors of the starting weights,
        teachers and their ancestors. A model that two parents share counts once.
        """
        spent = {}
        for result in (self.parent, *self.also):
            if result:
                spent |= result.before | {result.key: result.flops}
        return spent

    def flops(self, progress, step_tokens):
        """FLOPs of the steps until `progress`: 6 X T, and those of `more_flops`."""
        more = self.more_flops(progress, step_tokens) if self.more_flops else 0.0
        return 6.0 * self.params * progress.step * step_tokens + more


class Progress(NamedTuple):
    """How far a stage is: `step` of `steps`, from 0."""

    step: int
    steps: int

    def step_of(self, limit):
        """Convert `limit`, a number of steps or (if at most 1) a fraction of them, to steps."""
        return limit * self.steps if limit <= 1 else limit


def next_token(model, x, y, progress):
    """The default objective, next-token prediction: (mean cross entropy in nats, targets, {})."""
    output = model(x, y)
    return output.loss, output.count, {}


def describe(stage):
    """Describe in words a stage's shape, the origin of its weights and its objective."""
    origin, words = stage.origin, 'random initialisation'
    if origin.kind != 'random':
        words = f'{origin.kind} of {" and ".join(origin.models)}{in_brackets(origin.settings)}'
    if stage.teaching:
        settings = {k: v for k, v in stage.teaching.items() if k != 'objective'}
        words += f', objective {stage.teaching["objective"]}{in_brackets(settings)}'
    return f'{stage.config.n_layer} layers of width {stage.config.n_embd}, {words}'


def in_brackets(settings):
    """' (key value, key value)' of a dict, or ''."""
    shown = [f'{k} {v:g}' if type(v) is float else f'{k} {v}' for k, v in settings.items()]
    return f' ({", ".join(shown)})' if shown else ''


@dataclass
class Result:
    """The outcome of a finished stage: result.json in its folder, written last and atomically."""

    name: str
    folder: str  # the trained model, a Hugging Face folder
    n_params: int = 0  # N: parameters without embeddings and head
    params: float = 0.0  # X in FLOPs = 6 X T
    tokens: int = 0  # T: tokens trained on in this stage
    flops: float = 0.0  # of this stage: 6 X T, a teacher's forward passes, generated answers
    val_loss: float = math.nan  # nats per token on the validation split; NaN: not known
    bits_per_byte: float = math.nan  # the same loss, comparable between tokenizers
    position: int = 0  # tokens drawn from the data order so far; the next stage continues here
    seconds: float = 0.0  # wall-clock time of this stage
    memory: int = 0  # peak GPU memory of process 0 since training last resumed, bytes; 0: not known
    labels: dict = field(default_factory=dict)  # those of the Stage
    finished: float = 0.0  # Unix time in seconds; orders a run's stages
    before: dict = field(default_factory=dict)  # {model: FLOPs} of ancestors and teachers

    @classmethod
    def of_stage(cls, stage, knobs, steps, **found):
        """The Result of a stage after `steps` steps. knobs: the stage's; found: further fields."""
        step_tokens = knobs.batch_size * knobs.block_size
        start = stage.position // knobs.block_size * knobs.block_size  # at a whole sequence
        return cls(
            stage.name,
            str(Path(knobs.out_dir) / stage.name),
            n_params=stage.config.num_params(),
            params=stage.params,
            tokens=steps * step_tokens,
            flops=stage.flops(Progress(steps, steps), step_tokens),
            position=start + steps * step_tokens,
            labels=stage.labels,
            finished=time.time(),
            before=stage.before,
            **found,
        )

    @property
    def key(self):
        """Identifies this model across runs, even if its folder is moved."""
        return f'{self.name} {self.finished:.3f}'

    @property
    def inherited_flops(self):
        """FLOPs of all ancestors and teachers."""
        return sum(self.before.values(), 0.0)

    @property
    def total_flops(self):
        """FLOPs of this stage and of all ancestors and teachers."""
        return self.flops + self.inherited_flops

    @property
    def baseline_flops(self):
        """FLOPs of training every model up to this one from scratch; 0: not compared."""
        return self.labels.get('baseline_flops', 0.0)

    def write(self):
        """Save as result.json in the stage's folder."""
        write_json(Path(self.folder) / 'result.json', asdict(self))

    @classmethod
    def of(cls, folder):
        """Read the result of a finished stage. Raises UserError for a missing or damaged one."""
        path = Path(folder) / 'result.json'
        if not path.is_file():
            raise UserError(f'{folder} holds no finished stage (no result.json)')
        types = {f.name: (float, int) if f.type is float else f.type for f in fields(cls)}
        try:
            content = read_json(path, **types)
        except UserError as error:
            raise UserError(f'{error}; delete it to train this stage again') from None
        known = {name: content[name] for name in types}
        return cls(**known | dict(folder=str(folder)))  # the folder may have been moved


class Planned(NamedTuple):
    """A stage in a plan, and the Result it would have."""

    stage: Stage
    knobs: Any  # the general knobs with the stage's own values
    steps: int
    result: Result  # without a loss
