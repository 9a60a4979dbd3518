"""
The interface between methods and the training loop.

A method (progressive training, Inheritune, ...) is a dataclass of knobs with one generator,
`stages(run)`. It yields a `Stage`; train.py trains it and sends back its `Result`. A method may
also have

    summary(results)     blocks for its report: texts, tables, pictures (engine/report.py)
    corpora              names of corpora that its stages read besides the run's
    toy_corpora          {knob: corpus that a toy run reads instead}
    reads_corpora        False if its stages read none of the run's
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Optional

from engine.errors import UserError
from engine.files import read_json, write_atomically


@dataclass
class Origin:
    """Where a stage's starting weights come from: data. engine/report.py turns it into words."""

    kind: str = 'random'  # random, weights, growth, layers, half width, subset, interpolation
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
    model: Callable | None = None  # builds the starting model, when the stage runs; None: random
    parent: Optional['Result'] = None  # its compute is inherited, its data position continued
    also: tuple['Result', ...] = ()  # others whose compute it needs: a second parent, a teacher
    also_spent: float = 0.0  # FLOPs on what are no ancestors, smaller members or a reference
    data_after: Optional['Result'] = None  # continue this one's data position instead
    optimizer_state: Callable | None = None  # builds AdamW's starting state; None: fresh
    knobs: dict = field(default_factory=dict)  # general knobs that differ from the run's
    objective: Callable | None = (
        None  # (model, x, y, Progress) -> (loss, scalars); None: next_token
    )
    teaching: dict = field(default_factory=dict)  # what the objective is, as data
    teacher_params: float = 0.0  # of a teacher that are used, at 2 FLOPs each a token; ...
    taught_until: float | None = None  # ... until this step (below 1: share of all); None: the end
    more_flops: float = 0.0  # a token, beside 6 X and the teacher's: on answers that are drawn
    whole_batch: bool = False  # the objective is of a batch as a whole, not a mean over sequences
    tokenizer: str = ''  # folder or hub name of the model whose tokenizer is kept; '': the data's
    source: Callable | None = None  # knobs -> data.loader.Source; None: the run's corpora
    score: Callable | None = None  # model -> float; the best model is kept; None: the last one
    observe: Callable | None = None  # model -> {name: value}, logged at evaluations and the end
    baseline_flops: float = 0.0  # cost of training every model up to this one from scratch
    labels: dict = field(default_factory=dict)  # for the report: {'variant': 'let', 'seed': 0}

    @property
    def before(self):
        """
        {model: FLOPs} of all that was spent before: on every ancestor of the starting weights, once
        though two parents may share it, on those of a teacher, and beside them.
        """
        spent = {f'beside {self.name}': self.also_spent} if self.also_spent else {}
        for result in (self.parent, *self.also):
            if result:
                spent |= result.before | {result.key: result.flops}
        return spent

    @property
    def inherited_flops(self):
        """The sum of `before`."""
        return sum(self.before.values(), 0.0)

    def flops(self, progress, step_tokens):
        """FLOPs of the steps until `progress`, a teacher's passes and `more_flops` included."""
        taught = progress.step
        if self.taught_until is not None:
            taught = min(taught, math.ceil(progress.step_of(self.taught_until)))
        trained = (6.0 * self.params + self.more_flops) * progress.step
        return step_tokens * (trained + 2.0 * self.teacher_params * taught)

    @property
    def position(self):
        """Tokens drawn from the data order by the stages before this one."""
        before = self.data_after or self.parent
        return before.position if before else 0


class Progress(NamedTuple):
    """How far a stage is: `step` of `steps`, from 0."""

    step: int
    steps: int

    def step_of(self, limit):
        """The step at which `limit` (steps, or up to 1 a fraction of all steps) is reached."""
        return limit * self.steps if limit <= 1 else limit

    def fraction_of(self, limit):
        """Share of the way to `limit` (steps, or up to 1 a fraction of all steps), at most 1."""
        if not limit:
            return 1.0
        return min(1.0, self.step / max(1.0, self.step_of(limit)))


def next_token(model, x, y, progress):
    """The default objective: mean cross entropy of the next token, in nats."""
    return model(x, y).loss, {}


@dataclass
class Result:
    """What a finished stage left: `result.json` in its folder, written last and atomically."""

    name: str
    folder: str  # the trained model, a Hugging Face folder
    n_params: int  # N: parameters without embeddings and head
    params: float  # X in FLOPs = 6 X T
    tokens: int  # T: tokens trained on in this stage
    flops: float  # 6 X T of this stage, a teacher's forward passes, and what answers cost
    inherited_flops: float  # ... of all its ancestors, and also_spent
    baseline_flops: float  # ... of every model up to this one from scratch; 0: not compared
    val_loss: float  # nats per token on the validation split
    bits_per_byte: float  # the same per byte of text: comparable between tokenizers
    position: int  # tokens drawn from the data order so far; the next stage continues here
    seconds: float  # wall-clock time of this stage
    labels: dict = field(default_factory=dict)  # the stage's
    finished: float = 0.0  # seconds since 1970; orders a run's stages
    before: dict = field(default_factory=dict)  # {model: FLOPs} of which inherited_flops is the sum

    def __post_init__(self):
        if self.inherited_flops and not self.before:  # of an older result, the sum is known alone
            self.before = {f'before {self.key}': self.inherited_flops}

    @property
    def key(self):
        """What tells it from other models, in other runs too, wherever its folder is."""
        return f'{self.name} {self.finished:.3f}'

    @property
    def total_flops(self):
        """Compute in this model: this stage's and its ancestors'."""
        return self.flops + self.inherited_flops

    def text(self):
        """The content of result.json."""
        return json.dumps(asdict(self), indent=1) + '\n'

    def write(self):
        """Save as result.json in the stage's folder."""
        write_atomically(Path(self.folder) / 'result.json', self.text())

    @classmethod
    def of(cls, folder):
        """Read the result of a finished stage. Raises UserError for a missing or damaged one."""
        path = Path(folder) / 'result.json'
        if not path.is_file():
            raise UserError(f'{folder} holds no finished stage (no result.json)')
        types = {f.name: (float, int) if f.type is float else f.type for f in fields(cls)}
        del types['finished'], types['before']  # which older ones lack
        try:
            content = read_json(path, **types)
        except UserError as error:
            raise UserError(f'{error}; delete it to train this stage again') from None
        values = {name: content[name] for name in types}
        finished = content.get('finished')
        known = isinstance(finished, float) and math.isfinite(finished)
        values['finished'] = finished if known else path.stat().st_mtime
        before = content.get('before')
        if isinstance(before, dict) and all(isinstance(v, int | float) for v in before.values()):
            values['before'] = before
        return cls(**values | dict(folder=str(folder)))  # the folder may have been moved

    @classmethod
    def given(cls, name, folder, n_params=0, val_loss=float('nan')):
        """The Result of a model that was not trained here, at unknown cost."""
        nothing = dict(params=0.0, tokens=0, flops=0.0, inherited_flops=0.0, baseline_flops=0.0)
        unknown = dict(bits_per_byte=float('nan'), position=0, seconds=0.0)
        return cls(name, str(folder), n_params, val_loss=val_loss, **nothing, **unknown)
