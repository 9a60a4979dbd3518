"""
Direct preference optimisation (Rafailov et al.), and the post-training of a model family:
supervised fine-tuning, then DPO (Progressive training, Appendix E).

    python train.py config/posttrain_tiny.py
    python train.py config/posttrain_8b.py
    python -m extras.mt_bench out/posttrain_8b/progressive_8b-8b-dpo    # for the judge of Table 9

With pi the model, pi_ref a frozen copy of its starting point, and c the chosen (preferred) and r
the rejected answer to x,

    L = -log sigmoid( beta [log pi(c|x) / pi_ref(c|x)  -  log pi(r|x) / pi_ref(r|x)] )

where log pi(y|x) is summed over the answer's tokens.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from configurator import NonNegative, Positive
from data.instruct import Examples, shuffled
from data.loader import Source, fixed_batches, some_of
from engine.errors import UserError
from engine.files import read_json
from engine.stage import Origin, Stage
from engine.teacher import lazy_teacher
from model import load


def log_probability(model, x, y):
    """
    log pi(y|x), (n,), at least float32: the sum over the targets y (n, T) that are not -100. x:
    inputs (n, T), int64.
    """
    logits = model(x).logits
    exact = torch.promote_types(logits.dtype, torch.float32)
    # 0 for targets of -100
    losses = F.cross_entropy(logits.flatten(0, 1).to(exact), y.flatten(), reduction='none')
    return -losses.view(y.shape).sum(1)


def dpo(reference, beta=0.1):
    """
    The objective of DPO: (model, x, y, progress) -> (loss, number of pairs, scalars), with x and y
    (n, 2, T) int64 as from `pair_source`. reference: the frozen pi_ref, a folder or a GPT.
    """
    opened = lazy_teacher(reference)

    def objective(model, x, y, progress):
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        with torch.no_grad():
            ref_logp = log_probability(opened(x.device), x, y)
        logp = log_probability(model, x, y)
        chosen, rejected = (logp - ref_logp).view(-1, 2).unbind(1)  # log pi / pi_ref
        margin = beta * (chosen - rejected)
        data_loss = -logp[::2].sum() / (y[::2] >= 0).sum()  # nats per token of chosen answers
        scalars = dict(data_loss=data_loss, accuracy=(margin > 0).float().mean())
        return -F.logsigmoid(margin).mean(), torch.tensor(len(margin), device=x.device), scalars

    return objective


def pair_source(name, knobs):
    """
    The Source of a prepared set of preferences: inputs and targets (n, 2, T) int64, the preferred
    answer first. The validation loss is the cross entropy of preferred answers. name: the set;
    knobs: train.Run. Raises UserError for another kind of set.
    """
    train, val = (
        Examples(name, knobs.data_dir, split, 'preferences') for split in ('train', 'val')
    )
    T = knobs.block_size

    def read(positions):
        pairs = shuffled(positions, len(train) // 2, knobs.seed)[:, None]
        x, y = train.rows((2 * pairs + [0, 1]).flatten(), T)
        return x.reshape(-1, 2, T), y.reshape(-1, 2, T)

    def preferred(pairs):
        return val.rows(2 * np.asarray(pairs), T)

    validation = partial(fixed_batches, preferred, some_of(len(val) // 2, T, knobs.eval_tokens))
    # masked stays False, though targets are: the loss is a mean over pairs, not over targets
    return Source(read, validation, val.bytes_per_token, train.tokenizer)


@dataclass
class PostTraining:
    """Fine-tuning on the run's instructions, then DPO, of members of one or several families."""

    models: tuple[str, ...] = ()  # folders FAMILY/SIZE of the members, ascending in each family
    preferences: str = 'preferences'  # prepared set, data/instruct.py
    sft_epochs: Positive = 1.0  # passes over the instructions
    sft_learning_rate: NonNegative = 3e-5  # the maximum
    dpo_epochs: Positive = 1.0  # passes over the preferences
    dpo_learning_rate: NonNegative = 5e-7  # the maximum
    beta: Positive = 0.1  # the larger, the closer the model stays to pi_ref; 0.1 is our choice

    toy_corpora = dict(preferences='preferences')

    @property
    def corpora(self):
        """Corpora that the stages read besides the run's."""
        return [self.preferences]

    def stages(self, run):
        """Yield the stages: for each member, fine-tuning, then DPO. Raises UserError."""
        names = ['-'.join(Path(model).parts[-2:]) for model in self.models]  # FAMILY-SIZE
        if not names or len({*names}) < len(names):
            raise UserError('posttrain needs different --models=FAMILY/SIZE,FAMILY/SIZE')
        for name, model in zip(names, self.models):
            # toy runs start from random weights; a plan may name models that are not trained yet
            there = not run.toy and (Path(model).is_dir() or not run.dry_run)
            size = Path(model).name.removeprefix('independent-')
            config = run.given_config(model) if there else run.model_config(size)
            X, length = config.num_params(head=True), min(run.block_size, config.block_size)
            tokens = self.sft_epochs * count_examples(next(iter(run.corpora)), run) * length
            stage = Stage(f'{name}-sft', config, tokens, X)
            stage.labels = dict(family=name.removesuffix(size), size=size, phase='sft')
            stage.knobs = dict(learning_rate=self.sft_learning_rate)
            if there:
                stage.origin, stage.tokenizer = Origin('weights', (name,)), model
                stage.model = partial(load, model)
            tuned = yield stage
            # tokens count one sequence of a pair: so 2 X, and 2 x 2 X FLOPs for pi_ref's passes
            tokens = self.dpo_epochs * count_examples(self.preferences, run) / 2 * length
            stage = Stage(f'{name}-dpo', config, tokens, 2 * X, parent=tuned, begin=0)
            stage.more_flops = lambda progress, step, X=X: 4.0 * X * progress.step * step
            stage.labels = tuned.labels | dict(phase='dpo')
            stage.origin, stage.tokenizer = Origin('weights', (tuned.name,)), tuned.folder
            stage.model = partial(load, tuned.folder)
            stage.knobs = dict(learning_rate=self.dpo_learning_rate)
            stage.teaching = dict(objective='dpo', beta=self.beta, pairs=self.preferences)
            stage.teaching['teacher_params'] = X
            stage.objective = dpo(tuned.folder, self.beta)
            stage.source = partial(pair_source, self.preferences)
            yield stage


def count_examples(name, run):
    """The number of examples in a set's training split; a guess for plans without the set."""
    meta = Path(run.data_dir) / name / 'meta.json'
    if not meta.is_file():
        return 100_000
    return read_json(meta)['splits']['train']['documents']
