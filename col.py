"""
Chain-of-Learngene: distil a large model into a short chain of smaller ones, once; a model of any
size in between then starts from its two neighbours.

Paper: Chain-of-Learngene: A Scalable Learngene-based Paradigm for Building and Initializing
Variable-Sized Small Language Models.

    python train.py config/col_tiny.py
    python col.py out/col_tiny out/mine --to=64x3     # a size between two of a finished chain

The ancestor model (AnsNet) teaches the largest checkpoint of the chain, and each checkpoint the
next smaller one (Eq. 1, the reverse KL). A descendant (DesNet), of a size between two checkpoints,
starts at

    theta  =  alpha expand(smaller)  +  (1 - alpha) subset(larger)          (LInit, section 3.4)

with alpha 1 at the smaller checkpoint and 0 at the larger one. A size smaller than the whole chain
is cut from its smallest checkpoint.

An AnsNet with another architecture or vocabulary cannot teach the chain token by token. Instead it
answers prompts; a bridge model with the chain's architecture is fine-tuned on the answers (Eq. 2)
and teaches the chain. Generating answers, and on-policy distillation, are in extras/minillm.py.
"""

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    configure,
)
from data.vocabulary import tokenizer_to_carry
from engine.errors import UserError, run_as_program
from engine.files import new_folder, read_json, write_json
from engine.hub import model_folder
from engine.log import read_metrics
from engine.parallel import choose_device, processes
from engine.report import format_count, format_si, steps_to_loss, validation_curve
from engine.stage import Origin, Result, Stage
from engine.teacher import planned_config
from expand import WIDTH_FIELDS, grow, roles_of
from let import distil, teacher_flops
from model import GPT, SIZE_FIELDS, GPTConfig, all_params, load, read_config

# ----------------------------------------------------------------------------------------------
# LInit


def default_alpha(small_params, large_params, params):
    """
    The weight of the smaller checkpoint, linear in a descendant's number of parameters: 1 at the
    smaller checkpoint, 0 at the larger one. The paper says "based on the relative distance"; of the
    possible readings, this one gives its 0.9 at 138M (section 3.4).
    >>> round(default_alpha(117, 345, 138), 1)
    0.9
    """
    return (large_params - params) / (large_params - small_params)


def subset(large, config):
    """
    A new GPT of shape `config`, cut out of a larger one: its first layers, heads and units. Raises
    UserError unless it fits.
    """
    check_part(config, large.config)
    old, state = large.state_dict(), {}
    for name, new in GPT.on_meta(config).state_dict().items():
        stem, kind = re.sub(r'^blocks\.\d+\.', '', name).rsplit('.', 1)
        part = old[name]
        for dim, role in zip(range(part.ndim), roles_of(stem, kind, tied=False)):
            if 'query' in (role or ''):  # keep the first query heads of each group
                part = part.unflatten(dim, (large.config.n_kv_head, -1, config.head_dim))
                part = part.narrow(dim + 1, 0, config.n_head // config.n_kv_head)
                part = part.flatten(dim, dim + 2)
            part = part.narrow(dim, 0, new.shape[dim])
        state[name] = part.clone()
    return GPT.from_state(config, state)


def linit(small, large, config, alpha=None):
    """
    LInit (section 3.4): a new GPT of shape `config` between two neighbours of a chain, in the
    smaller one's dtype. alpha None: default_alpha over all parameters, tied ones counted once. The
    paper expands by replicating the last layers (bert2bert) and by "adjusting attention heads and
    hidden sizes", which we read as function-preserving copies of units (fpi). For a size smaller
    than the whole chain both neighbours are its smallest checkpoint, from which the model is cut.
    Raises UserError for a shape not in between.
    """
    if small.config == large.config:  # below the chain
        return subset(large, config)
    if alpha is None:
        alpha = default_alpha(*map(all_params, (small.config, large.config, config)))
    model, cut = grow(small, config, 'fpi', 'bert2bert'), subset(large, config).state_dict()
    for name, grown in model.state_dict().items():
        # theta = alpha * grown + (1 - alpha) * cut[name], in place: the model owns these tensors
        grown.mul_(alpha).add_(cut[name], alpha=1 - alpha)
    return model


# ----------------------------------------------------------------------------------------------
# shapes between the checkpoints of a chain


def check_part(config, large):
    """Raise UserError unless a model of shape `config` can be cut out of a larger one."""
    for field, wanted in vars(config).items():
        found = getattr(large, field)
        part = wanted <= found if field in SIZE_FIELDS else wanted == found
        if not part and field not in ('init_std', 'block_size'):
            raise UserError(f'{field} = {wanted} cannot be cut out of {field} = {found}')
    if config.n_head // config.n_kv_head > large.n_head // large.n_kv_head:
        raise UserError(
            f'{config.n_head} heads on {config.n_kv_head} key heads cannot be cut out of '
            f'{large.n_head} on {large.n_kv_head}'
        )


def fits(small, large):
    """Whether the shape `small` is at most as large as `large` in each of SIZE_FIELDS."""
    return all(getattr(small, f) <= getattr(large, f) for f in SIZE_FIELDS)


def between(shapes, wanted):
    """
    Place a size in a chain: (name of the next smaller checkpoint, of the next larger one, GPTConfig
    with the smaller one's architecture at the wanted size). shapes: {name: GPTConfig} of the chain.
    For a size smaller than the whole chain both names are that of its smallest checkpoint. Raises
    UserError for other sizes outside the chain.
    """
    ordered = sorted(shapes, key=lambda name: all_params(shapes[name]))
    larger = [name for name in ordered if fits(wanted, shapes[name])]
    smaller = [name for name in ordered if fits(shapes[name], wanted)]
    if larger == ordered:  # it fits into every checkpoint, so it is smaller than the chain
        smaller = smaller or larger[:1]
    if not smaller or not larger:
        size = f'{wanted.n_embd}x{wanted.n_layer} with {wanted.n_head} heads'
        raise UserError(f'{size} lies outside the chain {", ".join(ordered)}')
    small, large = smaller[-1], larger[0]
    config = replace(shapes[small], **{f: getattr(wanted, f) for f in SIZE_FIELDS})
    check_part(config, shapes[large])
    return small, large, config


def shapes_between(small, large):
    """
    Yield (|relative width - relative depth|, GPTConfig) for the shapes between two neighbours: all
    depths, and widths in steps of a head. Heads, groups and MLP are interpolated like the width;
    shapes for which they are not whole numbers are skipped.
    """
    wider, deeper = large.n_embd - small.n_embd, large.n_layer - small.n_layer
    widths = range(0, wider + 1, small.head_dim)
    for more, layers in itertools.product(widths, range(deeper + 1)):
        sizes, rests = dict(n_layer=small.n_layer + layers), 0
        for field in WIDTH_FIELDS:
            low, high = getattr(small, field), getattr(large, field)
            way, rest = divmod(more * (high - low), wider or 1)
            sizes[field], rests = low + way, rests + rest
        if not rests:
            lean = abs(more / (wider or 1) - layers / (deeper or 1))
            yield lean, replace(small, **sizes)


def shape_of_size(shapes, size):
    """
    The GPTConfig of a size in the chain {name: GPTConfig}: a named size, WIDTHxLAYERS, or a number
    of parameters, embeddings and head included. For a number, take among the shapes within 1% of it
    (if there are none, the closest) the one whose relative width is closest to its relative depth;
    the paper's five numbers give its five shapes. Raises UserError outside the chain.
    """
    named = isinstance(size, str)
    if named and not re.fullmatch(r'\d+x\d+', size):
        return GPTConfig.named(size)
    ordered, found = sorted(shapes.values(), key=all_params), []
    for small, large in itertools.pairwise(ordered):
        for lean, shape in shapes_between(small, large):
            if f'{shape.n_embd}x{shape.n_layer}' == size:
                return shape
            if not named:
                found.append((abs(all_params(shape) / size - 1), lean, shape))
    # errors up to 1% count as equal, then `lean` decides; default: no shape was found
    best = min(found, key=lambda row: (max(row[0], 0.01), row[1], row[0]), default=[1])
    if best[0] > 0.1:  # more than 10% off
        wanted = size if named else format_count(size)
        raise UserError(f'no shape of {wanted} with whole heads lies within the chain')
    return best[-1]


# ----------------------------------------------------------------------------------------------
# baselines of LInit: functions from models and a descendant's GPTConfig to its starting model


def single(smallest, config):
    """Single expansion: the chain's smallest checkpoint, expanded to `config` (section 4.2)."""
    return grow(smallest, config, 'fpi', 'bert2bert')


def learngene_shape(ansnet, config):
    """
    The AnsNet's GPTConfig cut to as few layers as reach the number of parameters of `config`, at
    least three: for GPT-2 XL 3, 5 and 7 layers at 138M, 220M and 277M, as in Table 9.
    """
    shapes = [replace(ansnet, n_layer=n) for n in range(3, ansnet.n_layer)]
    return next((c for c in shapes if all_params(c) >= all_params(config)), ansnet)


def learngene(ansnet, config, first):
    """
    Three layers of the AnsNet and random ones, with its embeddings, final norm and head
    (Appendix I). first=True: its first three, at the bottom (Auto-Learngene); False: its last
    three, on top (Vanilla-Learngene).
    """
    model = subset(ansnet, learngene_shape(ansnet.config, config))
    model.blocks.load_state_dict(GPT(model.config).blocks.state_dict())  # all layers at random
    kept = slice(3) if first else slice(-3, None)
    model.blocks[kept].load_state_dict(ansnet.blocks[kept].state_dict())
    return model


def cloned_shape(ansnet, config, times):
    """
    The shape that HyperCloning grows a descendant to (Appendix K): `times` as wide, with 10/7 of
    the layers. The paper does not state the shape, but its 645M and 2.42B models have the size of
    138M (14 layers) grown to 20 layers of width 1536 and 3072. ansnet: not used.
    """
    wider = {field: times * getattr(config, field) for field in WIDTH_FIELDS}
    return replace(config, n_layer=round(config.n_layer * 10 / 7), **wider)


def hypercloning(small, large, config, times):
    """HyperCloning of LInit's model (Appendix K): `times` copies of units, layers replicated."""
    made = linit(small, large, config)
    return grow(made, cloned_shape(None, config, times), 'clone', 'bert2bert')


class Start(NamedTuple):
    """How a descendant starts: LInit, or a baseline."""

    build: Callable  # (*models that `reads` names, the descendant's GPTConfig) -> a GPT
    reads: str = ''  # space-separated: ansnet; small, large (neighbours); smallest (of the chain)
    shape: Callable = lambda ansnet, config: config  # (AnsNet's GPTConfig, descendant's) -> its own
    taught: str = ''  # distillation from the AnsNet, instead of next-token prediction; '': none


BASELINES = {
    'random': Start(GPT),
    'single': Start(single, 'smallest'),
    'auto-learngene': Start(partial(learngene, first=True), 'ansnet', learngene_shape),
    'van-learngene': Start(partial(learngene, first=False), 'ansnet', learngene_shape),
    'kd': Start(GPT, taught='forward'),
    'seqkd': Start(GPT, taught='seqkd'),
    'minillm': Start(GPT, taught='minillm'),
}
for n in (2, 4):
    cloned = partial(hypercloning, times=n), 'small large', partial(cloned_shape, times=n)
    BASELINES[f'hypercloning-{n}x'] = Start(*cloned)


# ----------------------------------------------------------------------------------------------
# the method


@dataclass
class ChainOfLearngene:
    """Chain-of-Learngene: an AnsNet, a chain distilled from it step by step, and descendants."""

    ansnet: str = '64x6'  # a size, to be trained first; or, with a /, a model folder or hub name
    ansnet_tokens: Positive = 1.5e6  # training tokens of an AnsNet that is trained here
    ansnet_data: str = ''  # sft_data, prepared with the tokenizer of an AnsNet that needs a bridge
    bridge: str = ''  # model folder or hub name between such an AnsNet and the chain; empty: none
    bridge_epochs: Positive = 10.0  # passes over the AnsNet's answers
    bridge_batch_size: Count = 8  # sequences per step of these
    chain: tuple[str, ...] = ('64x4', '48x4', '48x2')  # largest first: sizes, or names with a /
    # a size starts as a part of the checkpoint above it, a model folder or hub name as it is
    sft_data: str = ''  # supervised set for fine-tuning and distillation; empty: plain text
    sft_epochs: Positive = 3.0  # passes over it
    tuning_learning_rate: NonNegative = 0.0  # maximum rate on supervised sets; 0: learning_rate
    distillation: Literal['reverse', 'minillm', 'forward', 'seqkd'] = 'reverse'  # Eq. 1: reverse
    tokens: Positive = 5e5  # tokens of each distillation; on supervised sets padding counts
    distillation_batch_size: Natural = 0  # sequences per step of these; 0: batch_size
    samples: Count = 256  # minillm: answers per batch, which is used for 4 inner epochs
    share: Fraction = 0.2  # minillm: the teacher's weight in the mixture that answers come from
    desnets: tuple[str, ...] = ('48x3', '64x2', '64x3')  # descendants: sizes in between
    alphas: tuple[Fraction, ...] = ()  # also start descendants with these alphas (Figure 6)
    recovery_tokens: tuple[NonNegative, ...] = (3e5,)  # of each descendant, on text; 0: no training
    recovery_epochs: Count = 1  # passes over these tokens
    baselines: tuple[Literal[*BASELINES, 'direct'], ...] = ('random', 'single')  # direct: Table 3
    downstream: tuple[str, ...] = ()  # supervised sets to fine-tune and score descendants on
    downstream_epochs: Positive = 10.0  # passes over each
    downstream_batch_size: Natural = 0  # sequences per step of these; 0: batch_size
    answers: Count = 64  # validation examples of each set to answer and score

    toy_corpora = dict(sft_data='signatures', downstream=('signatures',), ansnet_data='signatures')

    def stages(self, run):
        """
        Yield the AnsNet and its bridge, the chain, the descendants and their tasks. `yield` hands a
        stage to train.py and is sent back its Result; the generators below add to shapes,
        {name: GPTConfig}, and chain, {name: Result}, largest first.
        """
        if run.toy:
            self.desnets, self.answers = self.desnets[:1], min(8, self.answers)
        self.run, shapes, chain = run, {}, {}
        yield from self.ansnets(shapes, chain)
        yield from self.distilled(shapes, chain)
        if not (run.dry_run or processes()[0]):
            folders = {n: os.path.relpath(r.folder, run.out_dir) for n, r in chain.items()}
            write_json(f'{run.out_dir}/chain.json', folders)
        yield from self.descendants(shapes, chain)

    def ansnets(self, shapes, chain):
        """
        Train or open the AnsNet and fine-tune it; if there is a bridge, fine-tune it on the
        AnsNet's answers. The bridge, else the AnsNet, is the first entry of `chain`.
        """
        data = self.ansnet_data if self.bridge else self.sft_data
        config, result = opened(self.ansnet, self.run)
        if not result:
            result = yield fresh('ansnet', config, self.ansnet_tokens)
        if data:
            result = yield self.tuned('ansnet-sft', config, result, data, self.sft_epochs)
        if not self.bridge:
            shapes['ansnet'], chain['ansnet'] = config, result
            return
        config, start = opened(self.bridge, self.run)
        how = self.sft_data, self.bridge_epochs, self.bridge_batch_size
        stage = self.tuned('bridge', config, start, *how)
        self.teach(stage, 'seqkd', result)
        shapes['bridge'], chain['bridge'] = config, (yield stage)

    def distilled(self, shapes, chain):
        """
        Yield every checkpoint, distilled from the one before it (Eq. 1); with the baseline `direct`
        (Table 3) the last one also from the first model of the chain.
        """
        run, data = self.run, self.sft_data
        for model in self.chain:
            name, above = size_in(model), [*chain][-1]
            config, start = opened(model, run, vocab_size=shapes[above].vocab_size)
            if '/' not in model:
                check_part(config, shapes[above])
                start = chain[above]
            elif start and data:
                start = yield self.tuned(f'{name}-sft', config, start, data, self.sft_epochs)
            shapes[name], teachers = config, {name: chain[above]}
            if 'direct' in self.baselines and model == self.chain[-1]:
                teachers[f'{name}-direct'] = [*chain.values()][0]
            for student, teacher in teachers.items():  # same start: only the teacher differs
                stage = fresh(student, config, self.tokens)
                start_from(stage, 'subset', [start], subset, config)
                stage.begin, stage.labels = 0, dict(checkpoint=student, teacher=teacher.name)
                if data:
                    stage.knobs = self.tuning_knobs(self.distillation_batch_size)
                self.teach(stage, self.distillation, teacher)
                if data and run.eval_interval:  # keep the weights of best Rouge-L (Appendix C.1)
                    from extras.minillm import score

                    n = stage.teaching['best_of'] = min(self.answers, 500)
                    which = data, run.data_dir, slice(n)
                    stage.observe = lambda model: dict(score=score(model, *which)['Rouge-L'])
                chain.setdefault(name, (yield stage))  # the first student; `direct` stays outside

    def tuned(self, name, config, start, data, epochs, batch_size=0):
        """A Stage that fine-tunes `start`, a Result (None: random weights), on a supervised set."""
        from extras.minillm import examples_in, use_set

        length = min(self.run.block_size, config.block_size)
        # an example fills a sequence, however short it is
        stage = fresh(name, config, epochs * length * examples_in(self, data))
        stage.knobs = self.tuning_knobs(batch_size)
        use_set(stage, Path(self.run.data_dir) / data)
        start_from(stage, 'weights', [start], lambda model, config: model, config)
        return stage

    def tuning_knobs(self, batch_size):
        """The general knobs of training on a supervised set. batch_size: 0 for the run's."""
        rate = self.tuning_learning_rate or self.run.learning_rate
        return dict(learning_rate=rate, batch_size=batch_size or self.run.batch_size)

    def teach(self, stage, distillation, teacher):
        """
        Set the objective, data and FLOPs of a stage that is distilled from the Result `teacher`.
        distillation: a choice of the knob of that name.
        """
        run, data = self.run, self.sft_data
        stage.also = (*stage.also, teacher)
        stage.teaching = dict(objective=distillation, teacher=teacher.name)
        if distillation in ('minillm', 'seqkd'):
            from extras import minillm

            getattr(minillm, distillation)(stage, teacher, self)  # the function of that name
            return
        stage.teaching['teacher_params'] = teacher.params
        stage.more_flops = teacher_flops(teacher.params)
        # alpha = 0: the divergence alone, as in Eq. 1
        stage.objective = distil(teacher.folder, 0.0, reverse=distillation == 'reverse')
        if data:
            from extras.minillm import use_set

            use_set(stage, Path(run.data_dir) / data)

    def descendants(self, shapes, chain):
        """Yield each descendant for each start and number of recovery tokens, then its tasks."""
        starts = {'linit': Start(linit, 'small large')}
        for alpha in self.alphas:
            starts[f'alpha-{alpha:g}'] = Start(partial(linit, alpha=alpha), 'small large')
        starts |= {name: BASELINES[name] for name in self.baselines if name != 'direct'}
        top, *_, smallest = chain  # names, largest model first
        for size, name, tokens in itertools.product(self.desnets, starts, self.recovery_tokens):
            start, wanted = starts[name], self.run.model_config(size)
            small, large, config = between(shapes, wanted)
            if name == 'single' and not fits(shapes[smallest], config):
                raise UserError(f'{size} lies below the chain, so single cannot be expanded to it')
            several = f'-{format_si(tokens) or 0}' if len(self.recovery_tokens) > 1 else ''
            shape, passes = start.shape(shapes[top], config), self.recovery_epochs
            stage = fresh(f'{size}-{name}{several}', shape, passes * tokens)
            stage.labels = dict(start=name, recovery=tokens)
            if passes > 1:  # over the same tokens
                stage.knobs = dict(unique_tokens=tokens)
            names = dict(ansnet=top, small=small, large=large, smallest=smallest)
            models = [chain[names[model]] for model in start.reads.split()]
            start_from(stage, name, models, start.build, config)
            if start.taught:
                self.teach(stage, start.taught, chain[top])
            result = yield stage
            for data in self.downstream:
                how = data, self.downstream_epochs, self.downstream_batch_size
                task = self.tuned(f'{result.name}-on-{data}', stage.config, result, *how)
                task.labels = stage.labels | dict(task=data)
                yield task

    @property
    def corpora(self):
        """Supervised sets that the stages read besides the run's data."""
        return list(filter(None, (self.sft_data, self.ansnet_data, *self.downstream)))

    def summary(self, results):
        """
        Three tables of records: checkpoints; descendants, with their losses at step 0 and after
        recovery; scores on downstream tasks.
        """
        tables, curves = ([], [], []), {r.name: validation_curve(r) for r in results}
        for r in results:
            labels, record, data = r.labels, {'model': r.name}, r.labels.get('task')
            start = labels.get('start')
            if 'checkpoint' in labels:
                losses = [line['loss'] for line in read_metrics(r.folder) if 'loss' in line]
                # about the trend: differences remove it and double the noise's variance (Figure 5b)
                variance = np.var(np.diff(losses)) / 2
                record |= {'taught by': labels['teacher'], 'variance': f'{variance:.2e}'}
                tables[0].append(record)
                data = self.sft_data  # checkpoints are scored on it (Table 3)
            elif data:
                record['recovery tokens'] = format_count(labels['recovery'])
                record['loss on answers'] = r.val_loss
                tables[2].append(record)
            # kd and seqkd train on answers: they have no loss on text to compare
            elif start and not (self.sft_data and start in ('kd', 'seqkd')):
                record |= {'N': r.n_params, 'loss at step 0': dict(curves[r.name]).get(0)}
                record['after recovery'] = r.val_loss
                random = curves.get(r.name.replace(f'-{start}', '-random'))
                if random and start != 'random':
                    record['speed-up'] = speed_up(curves[r.name], random)
                tables[1].append(record | {'FLOPs before': format_si(r.inherited_flops)})
            if data:
                from extras.minillm import score

                model = load(r.folder, choose_device(self.run.device)).eval()
                record |= score(model, data, self.run.data_dir, slice(-self.answers, None))
        return tables


def size_in(model):
    """The named size that a model's name ends in: openai-community/gpt2 -> gpt2."""
    return model.rpartition('/')[2].lower()


def opened(model, run, **vocabulary):
    """
    (GPTConfig, Result) of a model folder or hub name, with unknown cost unless it was trained here;
    (GPTConfig, None) of a size, which is still to be trained, with the given vocab_size or the
    run's. Without a local folder, a dry run goes by the size in the model's name; a toy run always
    does, and trains that size.
    """
    sized = partial(run.model_config, size_in(model), **vocabulary)
    if '/' not in model or run.toy:
        return sized(), None
    folder = model if run.dry_run else str(model_folder(model))
    if (Path(folder) / 'result.json').is_file():
        return read_config(folder), Result.of(folder)
    config = planned_config(folder) or sized()
    return config, Result(model, folder, config.num_params(), config.num_params(head=True))


def fresh(name, config, tokens=0.0):
    """A Stage that trains a model of this shape from random initialisation."""
    return Stage(name, config, tokens, config.num_params(head=True))


def start_from(stage, kind, models, build, config):
    """
    Make a stage start from build(*models, config), with the models of these Results; if there are
    none, or only None, its random initialisation stays.
    """
    models = [result for result in models if result]
    if models:
        stage.parent, *stage.also = models
        stage.tokenizer = models[0].folder
        stage.origin = Origin(kind, tuple(result.name for result in models))
        stage.model = lambda: build(*(load(result.folder) for result in models), config)


# ----------------------------------------------------------------------------------------------
# the report


def speed_up(curve, random):
    """
    How many times fewer steps a start needs to reach the final loss of random initialisation, as
    text (Figures 4 and 7 to 9); linear between evaluations. curve, random: [(step, validation
    loss)] of the start and of random initialisation.
    """
    steps, own = (steps_to_loss(c, random[-1][1]) for c in (random, curve))
    if own is None:
        return 'never there'
    return f'{steps / own:.1f}x' if own else 'there at step 0'


# ----------------------------------------------------------------------------------------------
# the command line


@dataclass
class Interpolation:
    """Make models of any size between two of a chain: col.py CHAIN_FOLDER TARGET --to=SIZE,..."""

    chain: str = ''  # folder of a run of this method, or one that holds model folders
    target: str = ''  # folder to create; for several sizes, one with a folder for each
    to: tuple[str, ...] = ()  # named sizes, or WIDTHxLAYERS; or ...
    params: tuple[Positive, ...] = ()  # ... numbers of parameters, embeddings and head included
    alpha: Annotated[float, Range(-1e9, 1)] = -1.0  # weight of the smaller; below 0: by distance


def chain_folders(folder):
    """{name: folder} of the models of a chain. Raises UserError for fewer than two."""
    listed = Path(folder) / 'chain.json'
    names = [path.parent.name for path in Path(folder).glob('*/config.json')]
    if listed.is_file():
        names = read_json(listed).values()
    if len(names) < 2:
        raise UserError(f'{folder} holds no chain: {len(names)} models')
    return {Path(name).name: Path(folder) / name for name in names}


def interpolate(folders, size, alpha, target):
    """
    Write the model of a size, or of a number of parameters, to the folder `target`, made from its
    neighbours in the chain. folders: {name: folder} of the chain; alpha: as of `linit`. Raises
    UserError for a size outside the chain.
    """
    shapes = {name: read_config(folder) for name, folder in folders.items()}
    small, large, config = between(shapes, shape_of_size(shapes, size))
    with new_folder(target) as unfinished:
        made = linit(load(folders[small]), load(folders[large]), config, alpha)
        made.save(unfinished, tokenizer_to_carry(folders[small]))
    where = f'between {small} and {large}' if small != large else f'a part of {small}'
    print(f'{target}: {format_count(all_params(config))} parameters in all, {where}')
    print(f'their losses:  python evaluate.py {target} {folders[small]} {folders[large]}')


def main(argv):
    """Command line: save models of the sizes asked for, made from CHAIN_FOLDER, in TARGET."""
    words = ('chain', 'target')
    options, _, _ = configure(argv, Interpolation, program='col.py CHAIN TARGET', words=words)
    sizes = [(size, size) for size in options.to]
    sizes += [(format_count(params), params) for params in options.params]
    if not (options.target and sizes):
        raise UserError('usage: col.py CHAIN TARGET --to=SIZE,... or --params=NUMBER,...')
    folders = chain_folders(options.chain)  # first: TARGET may be made among them
    alpha = None if options.alpha < 0 else options.alpha
    for name, size in sizes:
        target = Path(options.target) / (name if len(sizes) > 1 else '')
        interpolate(folders, size, alpha, target)


if __name__ == '__main__':
    run_as_program(main)
