"""
Direct preference optimisation (Rafailov et al.), and the post-training of a model family: answers
first, then preferences (Progressive training, Appendix E).

    python train.py config/posttrain_tiny.py
    python train.py config/posttrain_8b.py

With pi the model and pi_ref the model that it started as, c the answer to x that is preferred and
r the other one,

    L = -log sigmoid( beta [log pi(c|x) / pi_ref(c|x)  -  log pi(r|x) / pi_ref(r|x)] )

log pi(y|x) is the sum over the answer's tokens. pi_ref does not change: its logarithms are
computed once and kept in the stage's folder, and training holds one model.
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from configurator import NonNegative, Positive
from data.corpus import check_vocabulary, open_corpus
from data.instruct import Examples, shuffled
from data.loader import Source, fixed_batches, some_of
from engine.errors import UserError
from engine.files import commit_file
from engine.parallel import barrier, choose_device, find_hardware, gather, processes, to_device
from engine.progress import progress_bar
from engine.stage import Origin, Result, Stage
from expand import compare
from model import load, read_config

# ----------------------------------------------------------------------------------------------
# pairs of examples


class Pairs:
    """One split of a prepared set of preferences (data/instruct.py), or its first `most` pairs."""

    def __init__(self, name, data_dir, split, most=sys.maxsize):
        self.examples = Examples(name, data_dir, split, kind='preferences')
        self.n = min(most, len(self.examples) // 2)

    def __len__(self):
        return self.n

    def rows(self, indices, block_size):
        """
        Inputs (n, 2, block_size) and targets (n, 2, block_size + 1) int64 of pairs, the preferred
        answer first. The targets' last column is the number of the pair.
        """
        indices = np.asarray(indices)
        x, y = self.examples.rows(np.stack([2 * indices, 2 * indices + 1], 1).ravel(), block_size)
        y = np.concatenate([y, indices.repeat(2)[:, None]], 1)
        return x.reshape(-1, 2, block_size), y.reshape(-1, 2, block_size + 1)

    def preferred(self, indices, block_size):
        """Inputs and targets (n, block_size) int64 of the preferred answers alone."""
        return self.examples.rows(2 * np.asarray(indices), block_size)


# ----------------------------------------------------------------------------------------------
# the objective


def log_probability(model, x, y):
    """log pi(y|x): the sum over targets y (n, T) that are not -100, of inputs x (n, T); (n,)."""
    logits = model(x).logits
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.flatten(0, 1).to(exact), y.flatten(), reduction='none')
    return -losses.view(y.shape).sum(1)


def log_ratios(model, x, y, reference):
    """
    (log pi / pi_ref of both answers, (n, 2); loss of the preferred ones in nats per token).
    x (n, 2, T), y (n, 2, T + 1) as `Pairs` lays them out, reference (all pairs, 2).
    """
    pairs, y = y[:, 0, -1], y[..., :-1]
    ours = log_probability(model, x.flatten(0, 1), y.flatten(0, 1)).view(-1, 2)
    loss = -ours[:, 0].sum() / (y[:, 0] >= 0).sum()
    return ours - reference[pairs], loss


def dpo(reference, beta=0.1):
    """The objective; reference: () -> log pi_ref of all pairs, (pairs, 2), on the device."""

    def objective(model, x, y, progress):
        ratios, data_loss = log_ratios(model, x, y, reference())
        chosen, rejected = ratios.unbind(1)
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
        scalars = dict(margin=beta * (chosen - rejected).mean(), data_loss=data_loss)
        scalars |= dict(accuracy=(chosen > rejected).float().mean())
        return loss, torch.tensor(len(x), device=x.device), scalars

    return objective


@torch.no_grad()
def reference_of(model, pairs, numbers, block_size, batch_size=8):
    """log pi_ref(y|x) of both answers of the pairs with these numbers, float32 (n, 2)."""
    found, device = [torch.zeros(0, 2)], model.wte.weight.device
    for first in progress_bar(range(0, len(numbers), batch_size), 'reference'):
        x, y = to_device(pairs.rows(numbers[first : first + batch_size], block_size), device)
        x, y = x.flatten(0, 1), y[..., :-1].flatten(0, 1)
        found.append(log_probability(model, x, y).view(-1, 2).float().cpu())
    return torch.cat(found)


def stored_reference(path, folder, pairs, knobs):
    """
    log pi_ref of all pairs under the model in `folder`, (pairs, 2) on the device: from the file
    `path`, or else computed, a share by each process, and written there.
    """
    hardware = find_hardware(knobs)
    if not any(gather(path.is_file())):
        model = load(folder, hardware.device).eval()
        mine = np.arange(hardware.rank, len(pairs), hardware.world_size)
        with hardware.autocast:
            shares = gather(reference_of(model, pairs, mine, knobs.block_size))
        reference = torch.empty(len(pairs), 2)
        for rank, share in enumerate(shares):
            reference[rank :: hardware.world_size] = share
        if hardware.is_main:
            save_file(dict(reference=reference), f'{path}.tmp')
            commit_file(f'{path}.tmp', path)
        barrier()
    reference = load_file(path)['reference']
    if reference.shape != (len(pairs), 2):
        raise UserError(f'{path} belongs to other preferences: delete its folder')
    return reference.to(hardware.device)


# ----------------------------------------------------------------------------------------------
# the method


GUESSED_EXAMPLES = dict(ultrachat=600_000, ultrafeedback=120_000)  # answers; a pair has two


@dataclass
class PostTraining:
    """Fine-tuning on the run's instructions, then DPO, of every member of a family."""

    models: tuple[str, ...] = ()  # folders of the members, ascending
    sizes: tuple[str, ...] = ()  # their sizes, for a plan without them and for toys
    preferences: str = 'preferences'  # prepared set, data/instruct.py
    sft_epochs: Positive = 1.0  # passes over the instructions
    sft_learning_rate: NonNegative = 3e-5  # the maximum
    dpo_epochs: Positive = 1.0  # passes over the preferences
    dpo_learning_rate: NonNegative = 5e-7  # the maximum
    beta: Positive = 0.1  # of the loss: how much a preference may move the model

    toy_corpora = dict(preferences='preferences')

    @property
    def corpora(self):
        """Corpora that the stages read besides the run's."""
        return [self.preferences]

    def stages(self, run):
        """For each member, fine-tuning and then DPO."""
        if not self.models or len(self.sizes) not in (0, len(self.models)):
            raise UserError('posttrain needs --models=FOLDER,...  and of each a size, or no sizes')
        self.run = run
        for i, name in enumerate(self.models):
            given = Result(Path(name).name, name)
            there = Path(name).is_dir() and not run.toy
            if not there and not self.sizes:
                raise UserError(f'no model {name}; a plan or a toy without it needs --sizes')
            config = run.given_config(name) if there else run.model_config(self.sizes[i])
            if there and not run.dry_run:
                check_vocabulary(open_corpus(self.preferences, run.data_dir), config, name)
            length = min(run.block_size, config.block_size)
            stage = Stage(f'{given.name}-sft', config, 0.0, config.num_params(head=True))
            stage.tokens = self.sft_epochs * self.count(run.data, 'supervised') * length
            stage.knobs = dict(learning_rate=self.sft_learning_rate)
            if there:
                stage.origin, stage.tokenizer = Origin('weights', (given.name,)), name
                stage.model = partial(load, name)
            stage.labels = dict(size=given.name, phase='sft')
            tuned = yield stage
            yield self.dpo_stage(given, tuned, config, length)

    def count(self, name, kind):
        """Examples of a prepared set's training split; a guess in plans without it. UserError."""
        if self.run.dry_run and not (Path(self.run.data_dir) / name / 'meta.json').is_file():
            return GUESSED_EXAMPLES.get(name, 10_000)
        meta = open_corpus(name, self.run.data_dir).meta
        if meta.get('kind') != kind and not self.run.toy:
            raise UserError(f'{name} is no set of {kind} examples, which posttrain needs')
        return meta['splits']['train']['documents']

    def dpo_stage(self, given, tuned, config, length):
        """The Stage of DPO from the Result of fine-tuning."""
        run, params = self.run, config.num_params(head=True)
        pairs = self.count(self.preferences, 'preferences') / 2
        # an example is a pair: its two answers are two sequences, hence 2 X
        stage = Stage(f'{given.name}-dpo', config, self.dpo_epochs * pairs * length, 2 * params)
        spent = 4.0 * params * pairs * length  # pi_ref: forward alone, of two answers
        stage.also = (Result(f'pi_ref of {given.name}', '', flops=spent),)
        stage.parent, stage.begin = tuned, 0  # its own data from the beginning
        stage.origin, stage.tokenizer = Origin('weights', (tuned.name,)), tuned.folder
        stage.model = partial(load, tuned.folder)
        stage.labels = dict(size=given.name, phase='dpo')
        stage.knobs = dict(learning_rate=self.dpo_learning_rate)
        if 20 * run.batch_size * length * config.vocab_size > 4e9:  # bytes of logits, all at once
            stage.knobs['micro_batch_size'] = run.micro_batch_size or 1
        stage.teaching = dict(objective='dpo', beta=self.beta, pairs=self.preferences)
        if not run.dry_run:  # another set under this name is another stage
            stage.teaching['sha256'] = open_corpus(self.preferences, run.data_dir).sha256[:16]
        reference = {}

        def source(knobs):
            few = [64] if knobs.toy else []  # the reference passes over all of them
            pairs = Pairs(self.preferences, knobs.data_dir, 'train', *few)
            path = Path(knobs.out_dir) / stage.name / 'reference.safetensors'
            reference['train'] = stored_reference(path, tuned.folder, pairs, knobs)
            return preference_source(self.preferences, pairs, knobs)

        stage.source, stage.objective = source, dpo(lambda: reference['train'], self.beta)
        return stage

    def summary(self, results):
        """How well each member prefers, and how alike two neighbours are after each phase."""
        run, records, logs = self.run, [], {}
        device = choose_device(run.device)
        val = Pairs(self.preferences, run.data_dir, 'val')
        block = min(run.block_size, *(read_config(r.folder).block_size for r in results))
        n = some_of(len(val), block, run.eval_tokens)
        for result in results:
            model = load(result.folder, device).eval()
            logs[result.name] = reference_of(model, val, np.arange(n), block)
        won = {}  # size: whether its implied reward prefers the right answer, for every pair
        for size in dict.fromkeys(r.labels['size'] for r in results):
            before, after = logs[f'{size}-sft'], logs[f'{size}-dpo']
            gain = after - before
            won[size] = gain[:, 0] > gain[:, 1]
            record = {'member': size, 'pairs': n}
            record['right by likelihood, tuned'] = share(before[:, 0] > before[:, 1])
            record['after DPO'] = share(after[:, 0] > after[:, 1])
            record['right by implied reward'] = share(won[size])
            record['margin'] = self.beta * (gain[:, 0] - gain[:, 1]).mean().item()
            records.append(record)
        examples = torch.from_numpy(val.preferred(np.arange(min(n, 256)), block)[0]).to(device)
        return [records, self.consistency(results, won, examples)]

    def consistency(self, results, won, examples):
        """Records of neighbours: KL and agreement after each phase; on which pairs both agree."""
        folders, records = {r.name: r.folder for r in results}, []
        for small, large in pairwise(won):
            record = {'members': f'{small} -> {large}'}
            for phase in ('sft', 'dpo'):
                pair = [load(folders[f'{m}-{phase}'], examples.device) for m in (small, large)]
                kl, _, agreement = compare(*pair, examples)
                record |= {f'KL, {phase}': kl, f'agreement, {phase}': agreement}
            record['same preference'] = share(won[small] == won[large])
            records.append(record)
        return records


def share(of):
    """The share of a bool tensor that is True."""
    return of.float().mean().item()


def preference_source(name, pairs, knobs):
    """The Source of a set of preferences; its validation loss is that of the preferred answers."""
    val = Pairs(name, knobs.data_dir, 'val')
    longer = (np.diff(pairs.examples.bounds) > knobs.block_size + 1).sum()
    if longer and not processes()[0]:
        print(f'{longer:,} answers are cut to {knobs.block_size} tokens')

    def read(positions):
        return pairs.rows(shuffled(positions, len(pairs), knobs.seed), knobs.block_size)

    rows = partial(val.preferred, block_size=knobs.block_size)
    n = some_of(len(val), knobs.block_size, knobs.eval_tokens)
    validation = partial(fixed_batches, rows, n)
    return Source(read, validation, val.examples.bytes_per_token, pairs.examples.tokenizer)
