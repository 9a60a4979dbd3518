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

An AnsNet of another architecture or vocabulary cannot teach the chain token by token. It answers
prompts, a bridge of the chain's architecture is fine-tuned on its answers (Eq. 2), and the bridge
teaches the chain. Answers, and on-policy distillation, are in extras/minillm.py.
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
    The weight of the smaller checkpoint: how near a descendant is to it, in parameters. The paper
    says "based on the relative distance"; of the readings this one gives its 0.9 at 138M.
    >>> round(default_alpha(117, 345, 138), 1)
    0.9
    """
    return (large_params - params) / (large_params - small_params)


def subset(large, config):
    """A model of shape `config` cut out of a larger one: its first layers, heads and units."""
    check_part(config, large.config)
    old, state = large.state_dict(), {}
    for name, new in GPT.on_meta(config).state_dict().items():
        stem, kind = re.sub(r'^blocks\.\d+\.', '', name).rsplit('.', 1)
        part = old[name]
        for dim, role in zip(range(part.ndim), roles_of(stem, kind, tied=False)):
            if 'query' in (role or ''):  # the first queries of each group
                part = part.unflatten(dim, (large.config.n_kv_head, -1, config.head_dim))
                part = part.narrow(dim + 1, 0, config.n_head // config.n_kv_head)
                part = part.flatten(dim, dim + 2)
            part = part.narrow(dim, 0, new.shape[dim])
        state[name] = part.clone()
    return GPT.from_state(config, state)


def linit(small, large, config, alpha=None):
    """
    LInit: a model of shape `config` between two neighbours of a chain, in the smaller one's dtype.
    alpha None: by relative distance, over all parameters, tied ones counted once. The paper expands
    by replicating the last layers (bert2bert) and by "adjusting attention heads and hidden sizes",
    which we read as function-preserving copies of units (fpi). Two equal neighbours are the
    smallest checkpoint, given twice: a part of it. Raises UserError for a shape not in between.
    """
    if small.config == large.config:
        return subset(large, config)
    if alpha is None:
        alpha = default_alpha(*map(all_params, (small.config, large.config, config)))
    model, cut = grow(small, config, 'fpi', 'bert2bert'), subset(large, config).state_dict()
    for name, grown in model.state_dict().items():
        # theta = alpha * grown + (1 - alpha) * cut[name], in place
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
    """Whether one shape is nowhere larger than another."""
    return all(getattr(small, f) <= getattr(large, f) for f in SIZE_FIELDS)


def between(shapes, wanted):
    """
    (next smaller name, next larger one, GPTConfig) of a size among {name: GPTConfig}: the smaller
    one's architecture at the wanted size. Of a size smaller than the whole chain both names are
    that of its smallest checkpoint. Raises UserError for any other size.
    """
    ordered = sorted(shapes, key=lambda name: all_params(shapes[name]))
    larger = [name for name in ordered if fits(wanted, shapes[name])]
    smaller = [name for name in ordered if fits(shapes[name], wanted)]
    if larger == ordered:
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
    Yield (how far apart relative width and relative depth are, GPTConfig) of the shapes between two
    neighbours: widths in steps of a head; heads, groups and MLP as far between the neighbours' as
    the width is, where they come out whole.
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
    The GPTConfig of a named size; of WIDTHxLAYERS among {name: GPTConfig}; or of a number of
    parameters, embeddings and head included: among shapes within 1% of it, or else the closest, the
    one whose relative width is closest to its relative depth. For the paper's five numbers these
    are the paper's five shapes. Raises UserError outside the chain.
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
    best = min(found, key=lambda row: (max(row[0], 0.01), row[1], row[0]), default=[1])
    if best[0] > 0.1:
        wanted = size if named else format_count(size)
        raise UserError(f'no shape of {wanted} with whole heads lies within the chain')
    return best[-1]


# ----------------------------------------------------------------------------------------------
# what LInit is compared with: functions of AnsNet, neighbours and a descendant's shape


def single(smallest, config):
    """The smallest checkpoint of the chain alone, expanded (section 4.2)."""
    return grow(smallest, config, 'fpi', 'bert2bert')


def learngene_shape(ansnet, config):
    """
    The AnsNet's shape with the fewest layers, three at least, that reach a descendant's size: of
    GPT-2 XL 3, 5 and 7 for 138M, 220M and 277M, as in Table 9.
    """
    shapes = [replace(ansnet, n_layer=n) for n in range(3, ansnet.n_layer)]
    return next((c for c in shapes if all_params(c) >= all_params(config)), ansnet)


def learngene(ansnet, config, first):
    """
    Three layers of the AnsNet beside random ones, with its embeddings, final norm and head
    (Appendix I). first: Auto-Learngene, its first layers; else Vanilla-Learngene, its last ones.
    """
    model = subset(ansnet, learngene_shape(ansnet.config, config))
    model.blocks.load_state_dict(GPT(model.config).blocks.state_dict())
    kept = slice(3) if first else slice(-3, None)
    model.blocks[kept].load_state_dict(ansnet.blocks[kept].state_dict())
    return model


def cloned_shape(ansnet, config, times):
    """
    The shape of HyperCloning (Appendix K): `times` as wide, and with 10 layers for 7. The paper
    does not say so; its 645M and 2.42B are 138M with 20 layers of width 1536 and 3072.
    """
    wider = {field: times * getattr(config, field) for field in WIDTH_FIELDS}
    return replace(config, n_layer=round(config.n_layer * 10 / 7), **wider)


def hypercloning(small, large, config, times):
    """HyperCloning of what LInit gives: whole copies of its units, and its layers replicated."""
    made = linit(small, large, config)
    return grow(made, cloned_shape(None, config, times), 'clone', 'bert2bert')


class Start(NamedTuple):
    """What a descendant starts from."""

    build: Callable  # (the models it reads, the descendant's GPTConfig) -> a model
    reads: str = ''  # of ansnet, small, large (the neighbours) and smallest (of the chain)
    shape: Callable = lambda ansnet, config: config  # (AnsNet's GPTConfig, descendant's) -> its own
    taught: str = ''  # a distillation from the AnsNet, in place of next-token prediction


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
    """Chain-of-Learngene: an AnsNet, a chain distilled from it step by step, descendants."""

    ansnet: str = '64x6'  # a size, to be trained first; or, with a /, a model folder or hub name
    ansnet_tokens: Positive = 1.5e6  # training tokens of one that is trained here
    ansnet_data: str = ''  # sft_data in the vocabulary of an AnsNet that needs a bridge
    bridge: str = ''  # model folder or hub name between such an AnsNet and the chain; empty: none
    bridge_epochs: Positive = 10.0  # passes over the AnsNet's answers
    bridge_batch_size: Count = 8  # sequences in a step of these
    chain: tuple[str, ...] = ('64x4', '48x4', '48x2')  # largest first: sizes, which start as parts
    # of the one above; or, with a /, model folders or hub names, which start as they are
    sft_data: str = ''  # supervised set for fine-tuning and distillation; empty: text alone
    sft_epochs: Positive = 3.0  # passes over it
    tuning_learning_rate: NonNegative = 0.0  # the maximum, on supervised sets; 0: learning_rate
    distillation: Literal['reverse', 'minillm', 'forward', 'seqkd'] = 'reverse'  # Eq. 1: reverse
    tokens: Positive = 5e5  # of each distillation; on instructions with padding
    distillation_batch_size: Natural = 0  # sequences in a step of these; 0: batch_size
    samples: Count = 256  # minillm: answers in a batch, which serves 4 inner epochs
    share: Fraction = 0.2  # minillm: of the teacher in the distribution that answers are drawn from
    desnets: tuple[str, ...] = ('48x3', '64x2', '64x3')  # descendants: sizes in between
    alphas: tuple[Fraction, ...] = ()  # LInit with each of these, too (Figure 6)
    recovery_tokens: tuple[NonNegative, ...] = (3e5,)  # of each descendant, on text; 0: as it is
    recovery_epochs: Count = 1  # passes over these
    baselines: tuple[Literal[*BASELINES, 'direct'], ...] = ('random', 'single')  # direct: Table 3
    downstream: tuple[str, ...] = ()  # supervised sets on which descendants are tuned and scored
    downstream_epochs: Positive = 10.0  # passes over each
    downstream_batch_size: Natural = 0  # sequences in a step of these; 0: batch_size
    answers: Count = 64  # validation examples of each set that are answered and scored

    toy_corpora = dict(sft_data='signatures', downstream=('signatures',), ansnet_data='signatures')

    def stages(self, run):
        """The AnsNet and its bridge, the chain, the descendants and their tasks."""
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
        """Train or open the AnsNet, fine-tune it, and the bridge: the first one of the chain."""
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
        """Every checkpoint of the chain, taught by the one before it."""
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
            for student, teacher in teachers.items():  # they start alike: only the teacher differs
                stage = fresh(student, config, self.tokens)
                start_from(stage, 'subset', [start], subset, config)
                stage.begin, stage.labels = 0, dict(checkpoint=student, teacher=teacher.name)
                if data:
                    stage.knobs = self.tuning_knobs(self.distillation_batch_size)
                self.teach(stage, self.distillation, teacher)
                if data and run.eval_interval:  # the best by Rouge-L is kept (Appendix C.1)
                    from extras.minillm import score

                    n = stage.teaching['best_of'] = min(self.answers, 500)
                    which = data, run.data_dir, slice(n)
                    stage.observe = lambda model: dict(score=score(model, *which)['Rouge-L'])
                chain.setdefault(name, (yield stage))

    def tuned(self, name, config, start, data, epochs, batch_size=0):
        """A Stage of fine-tuning on a supervised set, from the Result `start`; None: random."""
        from extras.minillm import examples_in, use_set

        length = min(self.run.block_size, config.block_size)
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
        """Give a stage the objective, and the data, of a distillation from the Result `teacher`."""
        run, data = self.run, self.sft_data
        stage.also = (*stage.also, teacher)
        stage.teaching = dict(objective=distillation, teacher=teacher.name)
        if distillation in ('minillm', 'seqkd'):
            from extras import minillm

            getattr(minillm, distillation)(stage, teacher, self)
            return
        stage.teaching['teacher_params'] = teacher.params
        stage.more_flops = teacher_flops(teacher.params)
        stage.objective = distil(teacher.folder, 0.0, reverse=distillation == 'reverse')
        if data:
            from extras.minillm import use_set

            use_set(stage, Path(run.data_dir) / data)

    def descendants(self, shapes, chain):
        """Each descendant, from each start, after each number of recovery tokens; its tasks."""
        starts = {'linit': Start(linit, 'small large')}
        for alpha in self.alphas:
            starts[f'alpha-{alpha:g}'] = Start(partial(linit, alpha=alpha), 'small large')
        starts |= {name: BASELINES[name] for name in self.baselines if name != 'direct'}
        top, *_, smallest = chain
        for size, name, tokens in itertools.product(self.desnets, starts, self.recovery_tokens):
            start, wanted = starts[name], self.run.model_config(size)
            small, large, config = between(shapes, wanted)
            if name == 'single' and not fits(shapes[smallest], config):
                raise UserError(f'{size} lies below the chain: there is no single of it')
            several = f'-{format_si(tokens) or 0}' if len(self.recovery_tokens) > 1 else ''
            shape, passes = start.shape(shapes[top], config), self.recovery_epochs
            stage = fresh(f'{size}-{name}{several}', shape, passes * tokens)
            stage.labels = dict(start=name, recovery=tokens)
            if passes > 1:
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
        """Checkpoints; losses of the descendants at step 0 and after recovery; scores on tasks."""
        tables, curves = ([], [], []), {r.name: validation_curve(r) for r in results}
        for r in results:
            labels, record, data = r.labels, {'model': r.name}, r.labels.get('task')
            start = labels.get('start')
            if 'checkpoint' in labels:
                losses = [line['loss'] for line in read_metrics(r.folder) if 'loss' in line]
                variance = np.var(np.diff(losses)) / 2  # about its trend (Figure 5b)
                record |= {'taught by': labels['teacher'], 'variance': f'{variance:.2e}'}
                tables[0].append(record)
                data = self.sft_data  # Table 3
            elif data:
                record['recovery tokens'] = format_count(labels['recovery'])
                record['loss on answers'] = r.val_loss
                tables[2].append(record)
            elif start and not (self.sft_data and start in ('kd', 'seqkd')):  # which learn answers
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
    """The size in a model's name: gpt2 of openai-community/gpt2."""
    return model.rpartition('/')[2].lower()


def opened(model, run, **vocabulary):
    """
    (GPTConfig, Result) of a model that exists, whose cost may not be known; the second is None for
    a size, of the given vocab_size or the run's. A plan goes by the size in a model's name where
    there is no folder, and so does a toy, which trains it.
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
    """A Stage from random initialisation."""
    return Stage(name, config, tokens, config.num_params(head=True))


def start_from(stage, kind, models, build, config):
    """Let a stage begin with build(*models, config), of Results; of none, or of None, random."""
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
    How many times fewer steps a start needs to the last loss of random initialisation (Figures 4
    and 7 to 9), read between evaluations. curve, random: [(step, validation loss)] of both.
    """
    steps, own = (steps_to_loss(c, random[-1][1]) for c in (random, curve))
    if own is None:
        return 'never there'
    return f'{steps / own:.1f}x' if own else 'there at step 0'


# ----------------------------------------------------------------------------------------------
# the command line


@dataclass
class Interpolation:
    """Models of any size between two of a chain: col.py CHAIN_FOLDER TARGET --to=SIZE,..."""

    chain: str = ''  # folder of a run of this method, or of model folders
    target: str = ''  # folder to be made; of several sizes, a folder of folders
    to: tuple[str, ...] = ()  # named sizes, or WIDTHxLAYERS; or ...
    params: tuple[Positive, ...] = ()  # ... about so many parameters, embeddings and head included
    alpha: Annotated[float, Range(-1e9, 1)] = -1.0  # of the smaller one; below 0: by distance


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
    Write the model of a size, or of a number of parameters, to the folder `target`, from its
    neighbours among {name: folder}. Raises UserError.
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
    """Command line: CHAIN_FOLDER TARGET, then knobs."""
    words = ('chain', 'target')
    options, _, _ = configure(argv, Interpolation, program='col.py CHAIN TARGET', words=words)
    sizes = [(size, size) for size in options.to]
    sizes += [(format_count(params), params) for params in options.params]
    if not (options.target and sizes):
        raise UserError('usage: col.py CHAIN TARGET --to=SIZE,... or --params=NUMBER,...')
    folders = chain_folders(options.chain)  # before any is made, perhaps among them
    alpha = None if options.alpha < 0 else options.alpha
    for name, size in sizes:
        target = Path(options.target) / (name if len(sizes) > 1 else '')
        interpolate(folders, size, alpha, target)


if __name__ == '__main__':
    run_as_program(main)
