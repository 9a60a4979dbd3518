"""
Chain-of-Learngene: distil a short chain of sizes once, then initialise any size in between in
seconds.

    python train.py config/col_tiny.py
    python col.py out/col_tiny out/mine --to=64x3     # a size between two of a finished chain

An ancestor (AnsNet) is distilled into the largest checkpoint of a chain, that into the next
smaller one, and so on (stepwise, reverse KL, Eq. 1). A descendant (DesNet) of a size between two
checkpoints starts at

    theta  =  alpha grow(smaller)    +  (1 - alpha) subset(larger)          (LInit, section 3.4)

where alpha is the relative distance, 1 at the smaller one. An ancestor of another architecture or
vocabulary first writes answers, on which a bridge model of the chain's is fine-tuned (Eq. 2).
"""

import itertools
import re
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from configurator import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    SaveDtype,
    configure,
)
from data.corpus import check_vocabulary, open_corpus, verify_corpus
from data.instruct import Examples, supervised_source
from data.loader import Share, validation_batches
from data.vocabulary import same_tokenizer, tokenizer_in, tokenizer_to_carry
from engine.errors import UserError, run_as_program
from engine.files import new_folder, read_json, write_json
from engine.hub import model_folder
from engine.log import progress_bar
from engine.loss import evaluate
from engine.parallel import choose_device, processes
from engine.report import format_count, table
from engine.stage import Origin, Result, Stage
from engine.teacher import planned_config
from expand import DEPTH, ROLES, WIDTH_FIELDS, grow
from let import distil, teacher_flops
from model import GPT, SIZE_FIELDS, GPTConfig, all_params, load, read_config

# ----------------------------------------------------------------------------------------------
# LInit


def default_alpha(small_params, large_params, params):
    """
    The weight of the smaller checkpoint: relative distance in parameters, within 0 and 1. (Of the
    readings of "based on the relative distance" the one that gives the paper's 0.9 at 138M.)
    >>> round(default_alpha(117, 345, 138), 1)
    0.9
    """
    if large_params == small_params:
        return 1.0
    return min(1.0, max(0.0, (large_params - params) / (large_params - small_params)))


def subset(large, config):
    """A model of shape `config` cut out of a larger one: its first layers, heads and units."""
    check_between(config, large.config, config)
    D, per_group = config.head_dim, large.config.n_head // large.config.n_kv_head
    C, mlp = torch.arange(config.n_embd), torch.arange(config.n_mlp)
    heads = torch.arange(config.n_kv_head)[:, None] * per_group
    heads = heads + torch.arange(config.n_head // config.n_kv_head)  # the first ones of each group
    queries = (heads.flatten()[:, None] * D + torch.arange(D)).flatten()
    kept = {'write': C, 'read': C, 'gain': C, 'mlp': mlp, 'from mlp': mlp}
    kept |= {'query': queries, 'from query': queries, 'kv': torch.arange(config.n_kv_head * D)}
    old, state = large.state_dict(), {}
    for name in GPT.on_meta(config).state_dict():
        tensor = old[name]
        stem = re.sub(r'^blocks\.\d+\.', '', name).rsplit('.', 1)[0]
        for dim, role in zip(range(tensor.ndim), ROLES.get(stem, ('gain',))):
            if role in kept:
                tensor = tensor.index_select(dim, kept[role].to(tensor.device))
        if stem == 'wpe':
            tensor = tensor[: config.block_size]
        state[name] = tensor.clone()
    return GPT.from_state(config, state)


@torch.no_grad()
def linit(small, large, config, alpha=None, depth='bert2bert'):
    """
    theta = alpha grow(small) + (1 - alpha) subset(large), of shape `config` between two
    neighbours of a chain, in the smaller one's dtype. Mixing helps where the larger one has taught
    the smaller. alpha None: by relative distance in all parameters, tied ones once. depth: how the
    smaller one's layers are replicated, as in expand.py. A shape below the chain, whose smallest
    model is given twice, is a part of it. Raises UserError for a shape that does not lie between.
    """
    if small.config.pos == 'learned':
        config = replace(config, block_size=min(config.block_size, small.config.block_size))
    if small.config == large.config and not fits(small.config, config):
        return subset(large, config)
    check_between(small.config, large.config, config)
    if alpha is None:
        alpha = default_alpha(*map(all_params, (small.config, large.config, config)))
    grown = grow(small, config, 'fpi', depth).state_dict()
    cut = subset(large, config).state_dict()
    state = {n: alpha * tensor + (1 - alpha) * cut[n].to(tensor) for n, tensor in grown.items()}
    return GPT.from_state(config, state)


# ----------------------------------------------------------------------------------------------
# shapes between the models of a chain


def check_between(small, large, config):
    """Raise UserError unless `config` lies between two shapes that differ in size alone."""
    for f in fields(GPTConfig):
        low, high, wanted = (getattr(shape, f.name) for shape in (small, large, config))
        if f.name in SIZE_FIELDS:
            if not low <= wanted <= high:
                raise UserError(f'{f.name} = {wanted} is outside the chain: {low} to {high}')
        elif f.name not in ('init_std', 'block_size') and not low == wanted == high:
            found = f'{f.name} is {low!r} and {high!r}, wanted is {wanted!r}'
            raise UserError(f'a chain of mixed architectures: {found}')
    if config.n_head // config.n_kv_head > large.n_head // large.n_kv_head:
        wanted = f'{config.n_head} heads on {config.n_kv_head} key heads'
        found = f'{large.n_head} on {large.n_kv_head}'
        raise UserError(f'{wanted} cannot be cut out of {found}')


def fits(small, large):
    """Whether one shape is nowhere larger than another."""
    return all(getattr(small, f) <= getattr(large, f) for f in SIZE_FIELDS)


def neighbours(shapes, config):
    """
    The names of the next smaller and larger of {name: GPTConfig} around a shape; where all are
    larger, twice that of the smallest, of which it is a part. UserError.
    """

    def weight(name):
        shape = shapes[name]
        return shape.n_layer * shape.n_embd * (shape.n_head * shape.head_dim + shape.n_mlp)

    smaller = [name for name, shape in shapes.items() if fits(shape, config)]
    larger = [name for name, shape in shapes.items() if fits(config, shape)]
    if len(larger) == len(shapes) and not smaller:
        smaller = [min(larger, key=weight)]
    if not smaller or not larger:
        wanted = f'{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}'
        known = [f'{n} ({s.n_layer}, {s.n_head}, {s.n_embd})' for n, s in shapes.items()]
        raise UserError(f'{wanted} lie outside the chain: {", ".join(known)}')
    return max(smaller, key=weight), min(larger, key=weight)


def shapes_between(small, large, step):
    """
    (how far width and depth lean apart, GPTConfig) of the shapes between two neighbours of a chain:
    heads, groups and MLP lie as far between the neighbours' as the width, where they are whole.
    """
    wider, deeper = large.n_embd - small.n_embd, large.n_layer - small.n_layer
    for more, layers in itertools.product(range(0, wider + 1, step), range(deeper + 1)):
        sizes, rests = dict(n_embd=small.n_embd + more, n_layer=small.n_layer + layers), 0
        for field in ('n_head', 'n_kv_head', 'n_mlp'):
            low, high = getattr(small, field), getattr(large, field)
            way, rest = divmod(more * (high - low), wider or 1)
            sizes[field], rests = low + way, rests + rest
        if not rests:
            lean = abs(more / wider - layers / deeper) if wider and deeper else 0.0
            yield lean, replace(small, **sizes)


def shape_of_size(shapes, size):
    """
    The GPTConfig of a named size; or among {name: GPTConfig} that of WIDTHxLAYERS, or of about so
    many parameters, embeddings and head included: of all within 1%, else of the closest, the one as
    far between its neighbours in width as in depth. For the paper's five numbers these are the
    paper's five shapes. Raises UserError outside the chain.
    """
    named = isinstance(size, str)
    if named and not re.fullmatch(r'\d+x\d+', size):
        return GPTConfig.named(size)
    ordered, found = sorted(shapes.values(), key=all_params), []
    for small, large in itertools.pairwise(ordered):
        even = small.n_embd % 64 == large.n_embd % 64 == 0 and not named  # what hardware likes
        inside = named or all_params(small) <= size <= all_params(large)
        for lean, shape in shapes_between(small, large, 64 if even else 1) if inside else ():
            if not named:
                found.append((abs(all_params(shape) / size - 1), lean, shape))
            elif f'{shape.n_embd}x{shape.n_layer}' == size:
                return shape
    if named and ordered[0].head_dim == 16:
        return GPTConfig.named(size)  # a small one, which may lie below the chain
    if not found:
        wanted = size if named else format_count(size)
        known = [f'{c.n_embd}x{c.n_layer} ({format_count(all_params(c))})' for c in ordered]
        raise UserError(f'no shape of {wanted} with whole heads lies between {" and ".join(known)}')
    return min(found, key=lambda row: (max(row[0], 0.01), row[1], row[0]))[-1]


def between(shapes, wanted):
    """(the names of a shape's neighbours, the smaller one's GPTConfig at that size). UserError."""
    small, large = neighbours(shapes, wanted)
    config = replace(shapes[small], **{f: getattr(wanted, f) for f in SIZE_FIELDS})
    least = shapes[small] if fits(shapes[small], config) else config
    check_between(least, shapes[large], config)
    return small, large, config


# ----------------------------------------------------------------------------------------------
# earlier learngenes


KEPT = 3  # layers that are a learngene (Appendix I)


def earlier_learngene(ancestor, n_layer, which):
    """
    A model of n_layer layers by an earlier method, as Appendix I has it. auto (Auto-Learngene): the
    ancestor's first three layers, random ones after them; van (Vanilla): random ones, then its
    last three. Embeddings, final norm and head are the ancestor's.
    """
    model = GPT(replace(ancestor.config, n_layer=n_layer)).to(ancestor.wte.weight)
    kept = min(KEPT, n_layer, ancestor.config.n_layer)
    first, source = (0, 0) if which == 'auto' else (n_layer - kept, ancestor.config.n_layer - kept)
    old, new = ancestor.state_dict(), model.state_dict()
    for name in new:
        match = re.match(r'blocks\.(\d+)\.(.+)', name)
        layer = int(match[1]) - first if match else 0
        if not match:
            new[name] = old[name]
        elif 0 <= layer < kept:
            new[name] = old[f'blocks.{source + layer}.{match[2]}']
    model.load_state_dict(new)
    return model


# ----------------------------------------------------------------------------------------------
# descendants: how each of them starts


@dataclass
class Descendant:
    """A size between two checkpoints, and what it may start from."""

    method: Any  # ChainOfLearngene
    run: Any
    size: str
    configs: dict  # {name: GPTConfig}, of ancestor, chain and descendants
    chain: dict  # {name: Result}, of the ancestor and the chain

    def __post_init__(self):
        shapes = {name: self.configs[name] for name in self.chain}
        self.config = self.configs[self.size]
        self.small, self.large = neighbours(shapes, self.config)

    def stage(self, start, config=None):
        """A Stage of the recovery training, from random initialisation."""
        shape, method = config or self.config, self.method
        X = shape.num_params(head=True)
        tokens = method.recovery_epochs * method.recovery_tokens
        stage = Stage(f'{self.size}-{start}', shape, tokens, X)
        stage.labels = dict(descendant=self.size, start=start)
        stage.tokenizer = self.chain[self.small].folder
        stage.knobs = batch_of(method.recovery_batch_size)
        if method.recovery_learning_rate:
            stage.knobs['learning_rate'] = method.recovery_learning_rate
        if method.recovery_epochs > 1:
            stage.knobs['unique_tokens'] = method.recovery_tokens
        return stage

    def interpolated(self, start='linit', alpha=None, config=None, build=lambda made: made):
        """
        A Stage that starts from LInit, with another alpha than the method's if one is given; or
        from what `build` makes of it, of the shape `config`.
        """
        if alpha is None and self.method.alpha >= 0:
            alpha = self.method.alpha
        stage = self.stage(start, config)
        small, large = self.chain[self.small], self.chain[self.large]
        shown = 'by distance' if alpha is None else alpha
        stage.origin = Origin('interpolation', (self.small, self.large), dict(alpha=shown))
        if not fits(self.configs[self.small], self.config):
            stage.origin = Origin('subset', (self.small,))
        stage.parent, stage.also = small, (large,)
        of = self.config
        stage.model = lambda: build(linit(load(small.folder), load(large.folder), of, alpha))
        return stage


def single(d):
    """The smallest checkpoint of the chain alone, expanded (section 4.4)."""
    name, stage = d.method.chain[-1], d.stage('single')
    small = stage.parent = d.chain[name]
    stage.origin = Origin('growth', (name,), dict(width='fpi', depth='bert2bert'))
    stage.model = lambda: grow(load(small.folder), d.config, 'fpi', 'bert2bert')
    return stage


def learngene(d, which):
    """An earlier method's, with the fewest layers, three at least, that reach this size."""
    top, wanted = d.configs['ancestor'], all_params(d.config)
    k = min(KEPT, top.n_layer)
    while k < top.n_layer and all_params(replace(top, n_layer=k)) < wanted:
        k += 1  # of GPT-2 XL 3, 5 and 7 for 138M, 220M and 277M, as in Table 9
    stage = d.stage(f'{which}-learngene', replace(top, n_layer=k))
    ancestor = stage.parent = d.chain['ancestor']
    stage.origin = Origin('layers', ('ancestor',), dict(number=k, chosen_by=which))
    stage.model = lambda: earlier_learngene(load(ancestor.folder), k, which)
    return stage


def taught(d, start, distillation):
    """From random initialisation, taught by the ancestor."""
    stage = d.stage(start)
    d.method.teach(stage, distillation, d.chain['ancestor'], d.run)
    return stage


def hypercloning(d):
    """
    What LInit gives, cloned to twice its width (Appendix K). The paper's sizes, 645M and 2.42B from
    138M, are not explained there: twice the width of 138M is 475M.
    """
    config = replace(d.config, **{field: 2 * getattr(d.config, field) for field in WIDTH_FIELDS})
    build = partial(grow, config=config, width='clone')
    stage = d.interpolated('hypercloning', config=config, build=build)
    stage.origin.settings['then'] = 'clone'
    return stage


STARTS = {
    'linit': Descendant.interpolated,
    'random': lambda d: d.stage('random'),
    'single': single,
    'auto-learngene': partial(learngene, which='auto'),
    'van-learngene': partial(learngene, which='van'),
    'kd': partial(taught, start='kd', distillation='forward'),
    'seqkd': partial(taught, start='seqkd', distillation='seqkd'),
    'minillm': partial(taught, start='minillm', distillation='minillm'),
    'hypercloning': hypercloning,
}


# ----------------------------------------------------------------------------------------------
# the method


@dataclass
class ChainOfLearngene:
    """Chain-of-Learngene: an ancestor, a chain distilled step by step, descendants in between."""

    ancestor: str = ''  # model folder or hub name; empty: train one of ancestor_size first
    ancestor_size: str = '64x6'  # its size, if it is trained here, or not here yet for a plan
    ancestor_tokens: Positive = 1.5e6  # training tokens of that
    bridge: str = ''  # ancestor of any architecture and vocabulary: it answers, `ancestor` learns
    bridge_data: str = ''  # supervised set in bridge's vocabulary, on which it is tuned first
    bridge_answers: Natural = 0  # how many of sft_data's prompts it answers; 0: all
    chain: tuple[str, ...] = ('64x4', '48x4', '48x2')  # sizes of the checkpoints, largest first
    public: tuple[str, ...] = ()  # their public checkpoints, if start is public
    start: Literal['public', 'subset', 'random'] = 'subset'  # what students start from
    sft_data: str = ''  # supervised set on which everyone is fine-tuned first; empty: none
    sft_epochs: Positive = 3.0  # passes over it
    sft_learning_rate: NonNegative = 0.0  # of fine-tuning and bridge; 0: learning_rate
    sft_batch_size: Natural = 0  # sequences in a step of these; 0: batch_size
    distillation: Literal['reverse', 'minillm', 'forward', 'seqkd'] = 'reverse'  # Eq. 1: reverse
    tokens: Positive = 5e5  # of each distillation; on instructions with padding
    samples: Count = 256  # minillm: answers in a batch ...
    inner_epochs: Count = 4  # ... and how often each is used
    share: Fraction = 0.2  # minillm: of the teacher in the distribution that answers are drawn from
    clip: Fraction = 0.2  # minillm: of the ratio of new to old probabilities, to either side
    length: Count = 512  # minillm: tokens of prompt and answer
    direct: bool = False  # the smallest also from the ancestor (Table 3), at equal tokens
    score_examples: Natural = 0  # answers by whose Rouge-L the best checkpoint is kept; 0: the last
    descendants: tuple[str, ...] = ('48x3', '64x2', '64x3')  # sizes in between
    alpha: Annotated[float, Range(-1, 1)] = -1.0  # of the smaller one; below 0: by distance
    alphas: tuple[Fraction, ...] = ()  # LInit with each of these, too (Figure 6)
    recovery_tokens: NonNegative = 3e5  # of each descendant, on the run's data; 0: as it starts
    recovery_epochs: Count = 1  # passes over these
    recovery_learning_rate: NonNegative = 0.0  # of that; 0: learning_rate
    recovery_batch_size: Natural = 0  # sequences in a step of that; 0: batch_size
    baselines: tuple[Literal[*STARTS], ...] = ('random', 'single')  # what LInit is compared with
    downstream: tuple[str, ...] = ()  # supervised sets on which descendants are tuned and scored
    downstream_epochs: Positive = 10.0  # passes over each
    downstream_learning_rate: NonNegative = 1e-5  # the maximum, on each
    downstream_batch_size: Natural = 0  # sequences in a step, on each; 0: batch_size
    answers: Count = 64  # of each set's validation examples that are answered and scored, ...
    answer_tokens: Count = 48  # ... in at most so many tokens

    def stages(self, run):
        """Ancestor and bridge, the chain, the descendants, and their downstream tasks."""
        self.data_dir, self.device = run.data_dir, choose_device(run.device)
        configs = self.configs(run)
        teacher = yield from self.ancestors(run, configs['ancestor'])
        chain = {'ancestor': teacher}
        for i, size in enumerate(self.chain):
            start = None
            if self.start == 'public':
                start = Result(self.public[i], self.public[i])
                if self.sft_data:
                    start = yield self.tune(f'{size}-sft', configs[size], start, self.sft_data, run)
            teachers = {size: teacher}
            if self.direct and size == self.chain[-1] and i:
                teachers[f'{size}-direct'] = chain['ancestor']
            for name, t in teachers.items():  # from one start: else that is compared
                stage = self.student(name, configs[size], teacher, start)
                stage.labels = dict(checkpoint=name, teacher=t.name)
                self.teach(stage, self.distillation, t, run)
                result = yield stage
                chain.setdefault(size, result)
            teacher = chain[size]
        if not run.dry_run and processes()[0] == 0:
            write_chain(run.out_dir, chain)
        for size in self.descendants:
            descendant = Descendant(self, run, size, configs, chain)
            for start in self.starts():
                stage = start(descendant)
                result = yield stage
                for data in self.downstream:
                    name = f'{result.name}-on-{data}'
                    tuned = self.tune(name, stage.config, result, data, run, self.downstream_epochs)
                    tuned.knobs['learning_rate'] = self.downstream_learning_rate
                    tuned.knobs |= batch_of(self.downstream_batch_size)
                    tuned.parent, tuned.labels = result, dict(tuned_on=data)
                    yield tuned

    def starts(self):
        """Functions of a Descendant that give its Stages."""
        swept = [
            partial(Descendant.interpolated, start=f'alpha-{a:g}', alpha=a) for a in self.alphas
        ]
        return [Descendant.interpolated, *swept, *map(STARTS.get, self.baselines)]

    def ancestors(self, run, config):
        """Train, open or bridge the ancestor, and fine-tune it: its Result."""
        if self.ancestor and not run.toy:
            result = given_ancestor(self.ancestor, config, run.dry_run)
        else:
            X = config.num_params(head=True)
            result = yield Stage('ancestor', config, self.ancestor_tokens, X)
        name, data, epochs = 'ancestor-sft', self.sft_data, 0
        answering = None
        if self.bridge:
            name, epochs = 'bridge', 10.0
        if self.bridge and not run.toy:
            answering = yield from self.answering(run)
            if not run.dry_run:
                from extras.bridge import pseudo_answers

                out = Path(run.out_dir) / f'bridge-data-{run.seed}'
                data = pseudo_answers(answering.folder, data, run, out, self.bridge_answers)
        if data:
            stage = self.tune(name, config, result, data, run, epochs)
            stage.parent = result
            if answering:
                stage.also = (answering, self.cost_of_answers(answering, config, run))
            result = yield stage
        return result

    def answering(self, run):
        """
        The Result of the bridge's ancestor, whose answers `ancestor` learns from: fine-tuned first,
        in its own vocabulary, if bridge_data names a set.
        """
        if run.dry_run:
            config = planned_config(self.bridge)
        else:
            config = read_config(model_folder(self.bridge))
        if not config:  # a plan does not know what its answers cost
            return Result('bridge-ancestor', self.bridge)
        result = given_ancestor(self.bridge, config, run.dry_run)
        result.name = Path(self.bridge).name
        if self.bridge_data:
            stage = self.tune('bridge-ancestor', config, result, self.bridge_data, run)
            stage.parent = result
            result = yield stage
        return result

    def cost_of_answers(self, teacher, config, run):
        """A Result that holds the FLOPs of a teacher's answers to sft_data, each at full length."""
        asked = examples_in(self.sft_data, run)
        length = min(run.block_size, config.block_size)
        flops = 2 * teacher.params * min(self.bridge_answers or asked, asked) * length
        return Result(f'answers of {teacher.name} in {length} tokens', '', flops=flops)

    def tune(self, name, config, start, data, run, epochs=0.0):
        """Supervised fine-tuning of the Result `start`; data: a prepared set, or its folder."""
        knobs = batch_of(self.sft_batch_size)
        if self.sft_learning_rate:
            knobs['learning_rate'] = self.sft_learning_rate
        stage = Stage(name, config, 0.0, config.num_params(head=True), knobs=knobs)
        use_set(stage, data)
        data_dir = stage.knobs.get('data_dir', run.data_dir)
        n = examples_in(Path(data).name, run, data_dir)
        length = min(run.block_size, config.block_size)
        stage.tokens = (epochs or self.sft_epochs) * n * length
        stage.origin = Origin('weights', (start.name,), dict(tuned_on=Path(data).name))
        stage.model, stage.tokenizer = partial(load, start.folder), start.folder
        return stage

    def student(self, name, config, teacher, start):
        """A Stage of a student: `start` is the public checkpoint it begins with, or None."""
        stage = Stage(name, config, self.tokens, config.num_params(head=True))
        stage.tokenizer = teacher.folder
        if start:
            stage.origin, stage.also = Origin('weights', (start.name,)), (start,)
            stage.model = partial(load, start.folder)
        elif self.start == 'subset':
            stage.origin, stage.also = Origin('subset', (teacher.name,)), (teacher,)
            stage.model = lambda: subset(load(teacher.folder), config)
        return stage

    def answer_flops(self, X, X_teacher):
        """
        FLOPs of on-policy distillation on answers, for each token of text: about as many tokens of
        answers are learned from, and both models draw them once for all inner epochs.
        """
        return 6 * X + 2 * (X + X_teacher) / self.inner_epochs

    def teach(self, stage, distillation, teacher, run):
        """Give a stage the objective, and the data, of a distillation from the Result `teacher`."""
        from extras.bridge import answer_scores, pseudo_answers
        from extras.minillm import MiniLLM, minillm

        stage.teaching = dict(objective=distillation, teacher=teacher.name)
        stage.also = (*stage.also, teacher)
        out = Path(run.out_dir)
        passes = teacher_flops(teacher.params)
        if distillation == 'seqkd':
            if not run.dry_run:
                name, n = out / f'{stage.name}-data-{run.seed}', self.bridge_answers
                use_set(stage, pseudo_answers(teacher.folder, self.sft_data, run, name, n))
            stage.also = (*stage.also, self.cost_of_answers(teacher, stage.config, run))
        elif distillation == 'minillm':
            stage.teaching |= dict(samples=self.samples, inner_epochs=self.inner_epochs)
            stage.teaching |= dict(share=self.share, clip=self.clip, length=self.length)
            stage.teaching['teacher_params'] = teacher.params
            answers = self.answer_flops(stage.params, teacher.params)
            stage.more_flops = lambda p, tokens: passes(p, tokens) + answers * p.step * tokens
            if not run.dry_run:
                examples = Examples(self.sft_data, run.data_dir, 'train')
                samples = min(self.samples, 2 * run.batch_size) if run.toy else self.samples
                how = dict(share=self.share, clip=self.clip, length=self.length)
                settings = MiniLLM(run.batch_size, run.seed, samples, self.inner_epochs, **how)
                stage.objective = minillm(teacher.folder, examples, settings)
        else:
            stage.objective = distil(teacher.folder, 0.0, reverse=distillation == 'reverse')
            stage.teaching['teacher_params'], stage.more_flops = teacher.params, passes
            if self.sft_data:
                use_set(stage, self.sft_data)
        if self.score_examples and self.sft_data:
            stage.teaching['best_of'] = self.score_examples
            if not run.dry_run:
                examples = Examples(self.sft_data, run.data_dir, 'val')
                n = self.score_examples
                first = range(min(n, len(examples)))
                scores = lambda m: answer_scores(m, examples, first, self.answer_tokens)
                stage.observe = lambda m: dict(score=scores(m)[0])

    def configs(self, run):
        """{name: GPTConfig} of ancestor, chain and descendants. Raises UserError."""
        self.check(run)
        if run.toy:
            self.shrink()
        configs = {'ancestor': run.model_config(self.ancestor_size)}
        configs |= {size: run.model_config(size) for size in self.chain}
        given = {'ancestor': self.ancestor} if self.ancestor and not run.toy else {}
        if self.start == 'public':
            given |= dict(zip(self.chain, self.public))
        for name, model in given.items():
            if not run.dry_run or Path(model).is_dir():  # else a plan has the size that is named
                configs[name] = read_config(model_folder(model))
        if self.start == 'subset':
            for above, below in zip(('ancestor', *self.chain), self.chain):
                check_between(configs[below], configs[above], configs[below])
        shapes = dict(configs)
        for size in self.descendants:
            small, _, configs[size] = between(shapes, run.model_config(size))
            below = not fits(shapes[small], configs[size])
            if below and ('single' in self.baselines or self.alphas):
                raise UserError(f'{size} lies below the chain: there is no single, no alpha of it')
        if not run.dry_run:
            first = open_corpus(next(iter(run.corpora)), run.data_dir)
            ours = first.meta['tokenizer']
            for name in self.corpora:
                used = Examples(name, run.data_dir, 'train').tokenizer  # it must be a set
                if name != self.bridge_data and not same_tokenizer(used, ours):
                    raise UserError(
                        f'{name} was prepared with the tokenizer {used}, {first.name} with {ours}'
                    )
        return configs

    def check(self, run):
        """Raise UserError for knobs that do not fit together, before anything is trained."""
        methods = {self.distillation, *self.baselines}
        if 'minillm' in methods and not run.toy and self.samples % run.batch_size:
            step = f'the {run.batch_size} sequences of a step'
            raise UserError(f'samples={self.samples} must be a multiple of {step}')
        if (self.bridge or methods & {'minillm', 'seqkd'}) and not self.sft_data:
            raise UserError('answers need prompts: --sft_data=NAME, a supervised set')
        if self.start == 'public' and len(self.public) != len(self.chain):
            n = f'{len(self.public)} checkpoints for a chain of {len(self.chain)}'
            raise UserError(f'public has {n}')

    def shrink(self):
        """What a toy does without: downloads, most descendants, most answers."""
        if self.start == 'public':
            self.start = 'random'
        self.descendants = self.descendants[:1]
        self.score_examples = min(4, self.score_examples)
        self.answers = min(8, self.answers)

    toy_corpora = dict(sft_data='signatures', downstream=('signatures',), bridge_data='signatures')

    @property
    def corpora(self):
        """Supervised sets that the stages read besides the run's data."""
        return [name for name in (self.sft_data, self.bridge_data, *self.downstream) if name]

    def summary(self, results):
        """
        The checkpoints of the chain; each descendant's loss at step 0 and after recovery; each
        tuned one's scores.
        """
        from extras import chain_report

        scores = partial(chain_report.scores, method=self)
        return [
            chain_report.checkpoints(results, self.sft_data, scores),
            chain_report.recoveries(results, bool(self.sft_data)),
            chain_report.tuned(results, scores),
        ]


def batch_of(sequences):
    """The knobs of a stage with so many sequences in a step; 0: the run's."""
    return dict(batch_size=sequences) if sequences else {}


def examples_in(data, run, data_dir=''):
    """How many examples a supervised set has to train on; for a plan as many as Dolly."""
    return 15_000 if run.dry_run else len(Examples(data, data_dir or run.data_dir, 'train'))


def use_set(stage, data):
    """Let a stage read a supervised set: a prepared one's name, or its folder elsewhere."""
    path = Path(data)
    stage.source = partial(supervised_source, name=path.name)
    stage.knobs['val_data'] = ''
    if len(path.parts) > 1:
        stage.knobs['data_dir'] = str(path.parent)


def given_ancestor(name, config, planned):
    """
    The Result of an ancestor that exists; a public one's cost is not known. One that is planned
    with need not be here.
    """
    if (Path(name) / 'result.json').is_file():
        return Result.of(name)
    folder = str(name if planned else model_folder(name))
    # what it costs as a teacher is known
    return Result('ancestor', folder, config.num_params(), config.num_params(head=True))


def write_chain(out_dir, chain):
    """Record where the checkpoints are, in chain.json: their folders, or paths outside the run."""
    folders = {}
    for name, result in chain.items():
        folder = Path(result.folder)
        inside = folder.parent == Path(out_dir)
        folders[name] = folder.name if inside else str(folder.resolve())
    write_json(Path(out_dir) / 'chain.json', folders)


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
    depth: Literal[*DEPTH] = 'bert2bert'  # how the layers of the smaller one are replicated
    save_dtype: SaveDtype = 'auto'  # of the weights; auto: those of the smaller one
    data: str = ''  # corpus whose validation loss they have, untrained, beside their neighbours
    data_dir: str = 'data'  # where it is
    eval_tokens: Natural = 65536  # validation tokens; 0: the whole split
    device: str = 'auto'  # for losses: cuda, mps or cpu


def sizes_of(options):
    """{name: size or number of parameters} that the options ask for. Raises UserError."""
    sizes = [(to, to) for to in options.to] + [(format_count(n), n) for n in options.params]
    if len(dict(sizes)) < len(sizes):
        raise UserError('two of the sizes have the same name: give them one at a time')
    return dict(sizes)


def chain_folders(folder):
    """{name: folder} of the models of a chain. Raises UserError for fewer than two."""
    listed = Path(folder) / 'chain.json'
    if listed.is_file():
        names = [str(name) for name in read_json(listed).values()]
    else:
        names = sorted(path.parent.name for path in Path(folder).glob('*/config.json'))
    if len(names) < 2:
        raise UserError(f'{folder} holds no chain: {len(names)} models')
    return {Path(name).name: Path(folder) / name for name in names}


def place_between(folders, size):
    """(smaller neighbour, larger one, GPTConfig) of a size or a number of parameters. UserError."""
    shapes = {name: read_config(folder) for name, folder in folders.items()}
    small, large, config = between(shapes, shape_of_size(shapes, size))
    if not same_tokenizer(tokenizer_in(folders[small]), tokenizer_in(folders[large])):
        raise UserError(f'{small} and {large} have different tokenizers')
    return small, large, config


def interpolate(options, small, large, config, folder):
    """Write the model of a shape between the models in two folders."""
    alpha = None if options.alpha < 0 else options.alpha
    made = linit(load(small), load(large), config, alpha, options.depth)
    dtype = getattr(torch, options.save_dtype, None)
    made.save(folder, tokenizer_to_carry(small), dtype=dtype)


def losses_at_step_0(folders, options):
    """Records of the validation losses of models, {name: folder}, the smallest first."""
    device, corpus = choose_device(options.device), open_corpus(options.data, options.data_dir)
    records = []
    for name, folder in progress_bar(folders.items(), desc='validation losses'):
        model = load(folder, device).eval()
        check_vocabulary(corpus, model.config, folder)
        length = min(512, model.config.block_size)
        batches = validation_batches(corpus.val, length, 8, options.eval_tokens, Share(device))
        record = {'model': name, 'N': model.config.num_params()}
        records.append(record | {'validation loss': evaluate(model, batches)})
    return sorted(records, key=lambda record: record['N'])


def main(argv):
    """Command line: CHAIN_FOLDER TARGET, then knobs."""
    words = ('chain', 'target')
    options, _, _ = configure(
        argv, Interpolation, program='col.py CHAIN_FOLDER TARGET', words=words
    )
    if not (options.chain and options.target and (options.to or options.params)):
        raise UserError('usage: col.py CHAIN TARGET --to=SIZE,... or --params=NUMBER,...')
    if options.data:  # before anything is made
        verify_corpus(options.data, options.data_dir)
    folders, compared = chain_folders(options.chain), {}
    wanted = {name: place_between(folders, size) for name, size in sizes_of(options).items()}
    for name, (small, large, config) in wanted.items():
        folder = Path(options.target)
        if len(wanted) > 1:
            folder /= name
        with new_folder(folder) as unfinished:
            interpolate(options, folders[small], folders[large], config, unfinished)
        n = format_count(config.num_params())
        where = f'between {small} and {large}' if small != large else f'of {small}'
        print(f'{folder}: {n} parameters (N), {where}')
        compared |= {small: folders[small], large: folders[large], name: folder}
    if options.data:
        print(f'\n{table(losses_at_step_0(compared, options))}')


if __name__ == '__main__':
    run_as_program(main)
