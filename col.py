"""
Chain-of-Learngene: distil a short chain of sizes once, then initialise any size in between in seconds (paper 004).

    python train.py config/col_tiny.py
    python col.py out/col_tiny out/mine --to=64x3               # a model of any size between two of a finished chain

An ancestor is distilled into the largest checkpoint of a chain, that into the next smaller one, and so on (stepwise, reverse KL,
Eq. 1). A descendant of a size between two checkpoints starts at

    theta  =  alpha expand(smaller)  +  (1 - alpha) subset(larger)                                 (LInit: linit.py)

where alpha is the relative distance, 1 at the smaller one. An ancestor of another architecture or vocabulary first writes
answers, on which a bridge model of the chain's architecture is fine-tuned (Eq. 2).
"""
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bridge import answer_scores, pseudo_answers
from configurator import (Result, Stage, UserError, check_ranges, configure, read_json, run_as_program, unknown,
                          write_atomically)
from data.instruct import Examples, supervised_source
from data.loader import open_corpus, text_source
from data.prepare import tokenizer_of_model
from evaluate import count, read_metrics, table
from expand import grow
from hugging_face import model_folder
from inheritune import inherit
from let import distil
from linit import SHAPE, check_shapes, default_alpha, linit, neighbours, subset   # noqa: F401   (col.linit, for others)
from minillm import minillm
from model import GPTConfig, load, shape_of

# ---------------------------------------------------------------------------------------------------------------------
# baselines: earlier learngenes

def learngene_layers(model, batches, k, how):
    """
    The k layers, in order, that an earlier learngene method keeps, read off gradients on `batches` of (x, y). van (Wang et al.
    2022a: high-level layers by gradient signals): of the upper half those with the smallest gradient norms, the settled ones. auto
    (2022b, a meta-network that weighs layers): those whose weight, a gate on what a layer adds, would be missed most: largest
    |d loss / d gate| at an open gate. Both are readings for language models of methods for image classifiers.
    """
    n, scores = model.config.n_layer, torch.zeros(model.config.n_layer, dtype=torch.float64)
    for x, y in batches:
        gradient = dict(zip((name for name, _ in model.named_parameters()),
                            torch.autograd.grad(model(x, y).loss, list(model.parameters()))))
        for name, g in gradient.items():
            if not name.startswith('blocks.'):
                continue
            layer = int(name.split('.')[1])
            if how == 'van':
                scores[layer] += g.double().square().sum().item()
            elif name.endswith(('attn.o.weight', 'mlp.down.weight')):   # a gate on these scales what the layer adds
                scores[layer] += abs((g * model.get_parameter(name)).double().sum().item())
    candidates = list(range(n // 2, n)) if how == 'van' and k <= n - n // 2 else list(range(n))
    ordered = sorted(candidates, key=lambda layer: scores[layer].item(), reverse=how == 'auto')
    return sorted(ordered[:k])


# ---------------------------------------------------------------------------------------------------------------------
# the method

BASELINES = ('random', 'single', 'auto-learngene', 'van-learngene', 'kd', 'seqkd', 'minillm', 'hypercloning')


@dataclass
class ChainOfLearngene:
    """Chain-of-Learngene (paper 004): an ancestor, a chain distilled from it step by step, descendants of sizes in between."""
    ancestor: str = ''                 # model folder or hub name; empty: train one of ancestor_size first
    ancestor_size: str = '64x6'        # its size, where it is trained here
    ancestor_tokens: float = 1.5e6     # training tokens of that
    bridge: str = ''                   # heterogeneous ancestor, any architecture and vocabulary: it answers, the ancestor learns
    bridge_answers: int = 0            # how many of sft_data's prompts it answers; 0: all
    chain: tuple[str, ...] = ('64x4', '48x4', '48x2')   # sizes of the checkpoints, the largest first
    public: tuple[str, ...] = ()       # their public checkpoints to start from, if start is public
    start: str = 'subset'              # what students start from: public, subset (of their teacher) or random
    sft_data: str = ''                 # supervised set on which everyone is fine-tuned first; empty: no fine-tuning
    sft_epochs: float = 3.0            # passes over it
    sft_learning_rate: float = 0.0     # of fine-tuning and bridge; 0: learning_rate, that of the distillations
    distillation: str = 'reverse'      # reverse (Eq. 1, on the data), minillm (on-policy), forward, seqkd
    tokens: float = 5e5                # of each distillation; on instructions with padding
    samples: int = 256                 # minillm: answers in a batch ...
    inner_epochs: int = 4              # ... and how often each serves
    direct: bool = False               # also distil the smallest checkpoint from the ancestor directly (Table 3)
    score_examples: int = 0            # answers by whose Rouge-L the best checkpoint of a distillation is chosen; 0: the last
    descendants: tuple[str, ...] = ('48x3', '64x2', '64x3')   # sizes in between
    alpha: float = -1.0                # weight of the smaller neighbour; below 0: by relative distance
    recovery_tokens: float = 3e5       # training tokens of each descendant, on the run's data
    recovery_learning_rate: float = 0.0    # of that; 0: learning_rate
    baselines: tuple[str, ...] = ('random', 'single')   # random, single, auto-learngene, van-learngene, kd, seqkd, minillm, ...
    downstream: tuple[str, ...] = ()   # supervised sets on which descendants and baselines are fine-tuned and scored
    downstream_epochs: float = 10.0    # passes over each
    downstream_learning_rate: float = 1e-5

    def stages(self, run):
        """The ancestor and its bridge, the chain, the descendants and what they are compared with, the downstream tasks."""
        configs, self.data_dir = self.check(run), run.data_dir
        self.origins = {}   # descendant stage -> (size, kind), for the summary
        teacher = yield from self.ancestors(run, configs)
        first, chain = teacher, {'ancestor': (configs['ancestor'], teacher)}
        for i, size in enumerate(self.chain):
            student = None
            if self.start == 'public' and self.sft_data:
                student = yield self.tune(f'{size}-sft', configs[size], self.public[i], run, self.sft_data)
            before, teacher = teacher, (yield from self.distilled(size, configs[size], teacher, run, i, student))
            chain[size] = configs[size], teacher
            if self.direct and i == len(self.chain) - 1 and before is not first:
                yield from self.distilled(f'{size}-direct', configs[size], first, run, i, student)
        if not run.dry_run and int(os.environ.get('RANK', 0)) == 0:
            inside = {name: Path(r.folder).name if Path(r.folder).parent == Path(run.out_dir) else str(Path(r.folder).resolve())
                      for name, (_, r) in chain.items()}
            write_atomically(Path(run.out_dir) / 'chain.json', json.dumps(inside, indent=1) + '\n')
        for size in self.descendants:
            for kind in ('linit', *self.baselines):
                stage = self.descendant(size, kind, configs, chain, run)
                result = yield stage
                self.origins[result.name] = size, kind
                for name in self.downstream:
                    yield self.tune(f'{result.name}-on-{name}', stage.config, result.folder, run, name, self.downstream_epochs,
                                    dict(learning_rate=self.downstream_learning_rate), parent=result)

    def ancestors(self, run, configs):
        """Train, open or bridge the ancestor; fine-tune it: its Result."""
        config, given = configs['ancestor'], bool(self.ancestor) and not (run.toy or run.dry_run)
        if given:
            result = given_result(self.ancestor)
        else:
            result = yield Stage('ancestor', config, self.ancestor_tokens, config.num_params(head=True))
        if self.bridge:
            data = self.bridge_data(run) if not (run.toy or run.dry_run) else self.sft_data
            result = yield self.tune('bridge', config, result.folder, run, data, 10.0, parent=result)
        elif self.sft_data:
            result = yield self.tune('ancestor-sft', config, result.folder, run, self.sft_data, parent=result)
        return result

    def bridge_data(self, run):
        """The bridge's supervised set: the heterogeneous ancestor's answers; a folder's path."""
        return pseudo_answers(self.bridge, self.sft_data, run, Path(run.out_dir) / 'bridge-data', self.bridge_answers)

    def tune(self, name, config, folder, run, data, epochs=0.0, knobs=None, parent=None):
        """A stage of supervised fine-tuning from a folder: `data` is a prepared set's name, or its folder's path."""
        knobs = dict(knobs or (dict(learning_rate=self.sft_learning_rate) if self.sft_learning_rate else {}), **set_knobs(data))
        n = 15_000 if run.dry_run else len(Examples(Path(data).name, knobs.get('data_dir', run.data_dir), 'train'))
        return Stage(name, config, (epochs or self.sft_epochs) * n * min(run.block_size, config.block_size),
                     config.num_params(head=True), parent=parent, start=f'weights of {Path(folder).name}, tuned on {Path(data).name}',
                     model=partial(load, folder), source=partial(supervised_source, name=Path(data).name), knobs=knobs)

    def distilled(self, name, config, teacher, run, i, student):
        """One step of the chain: a student of shape `config` learns from the Result `teacher`; yields the stage, returns its Result."""
        if student or self.start == 'public':
            start, model = 'its public checkpoint', partial(load, student.folder if student else self.public[i])
        elif self.start == 'subset':
            start, model = f'a subset of {teacher.name}', lambda: subset(load(teacher.folder), config)
        else:
            start, model = 'random initialisation', None
        return (yield self.lesson(Stage(name, config, self.tokens, config.num_params(head=True), start=start, model=model),
                                  self.distillation, teacher, run))

    def lesson(self, stage, how, teacher, run):
        """Give a stage the objective, and the data, of a distillation from the Result `teacher`."""
        stage.start += f', {how} from {teacher.name}' + (
            f' ({self.samples} samples x {self.inner_epochs})' if how == 'minillm' else '') + (
            f', best of {self.score_examples} answers' if self.score_examples else '')
        folder = Path(run.out_dir) / stage.name
        if how == 'seqkd':
            if run.dry_run:
                return stage
            data = pseudo_answers(teacher.folder, self.sft_data, run, Path(run.out_dir) / f'{stage.name}-data', self.bridge_answers)
            stage.knobs |= set_knobs(data)
            stage.source = partial(supervised_source, name=Path(data).name)
        elif how == 'minillm':
            if not run.dry_run:
                batch = run.sequences
                stage.objective = minillm(teacher.folder, Examples(self.sft_data, run.data_dir, 'train'), folder, batch, run.seed,
                                          min(self.samples, 2 * batch) if run.toy else self.samples, self.inner_epochs)
        else:
            stage.objective = distil(teacher.folder, 0.0, 1.0, reverse=how == 'reverse')
            if self.sft_data:
                stage.source, stage.knobs = partial(supervised_source, name=self.sft_data), stage.knobs | set_knobs(self.sft_data)
        if self.score_examples and self.sft_data and not run.dry_run:
            examples = Examples(self.sft_data, run.data_dir, 'val')
            stage.score = lambda model: answer_scores(model, examples, self.score_examples)[0]
        return stage

    def descendant(self, size, kind, configs, chain, run):
        """The recovery training of one descendant, initialised by LInit or as a baseline."""
        config, name = configs[size], f'{size}-{kind}'
        small, large = neighbours({n: c for n, (c, _) in chain.items()}, config)
        of = {n: r for n, (_, r) in chain.items()}
        alpha = None if self.alpha < 0 else self.alpha
        knobs = dict(learning_rate=self.recovery_learning_rate) if self.recovery_learning_rate else {}
        stage = Stage(name, config, self.recovery_tokens, config.num_params(head=True), knobs=knobs)
        if kind == 'linit':
            stage.start = f'between {small} and {large}, alpha {"by distance" if alpha is None else alpha}'
            stage.parent, stage.model = of[small], lambda: linit(load(of[small].folder), load(of[large].folder), config, alpha)
        elif kind == 'single':
            stage.start, stage.parent = f'{small} expanded', of[small]
            stage.model = lambda: linit(load(of[small].folder), load(of[large].folder), config, 1.0)
        elif kind in ('kd', 'seqkd', 'minillm'):
            stage = self.lesson(stage, 'forward' if kind == 'kd' else kind, of['ancestor'], run)
        elif kind in ('auto-learngene', 'van-learngene'):
            top, wanted = configs['ancestor'], config.num_params(embedding=True, head=True)
            k = min(range(1, top.n_layer), key=lambda n: abs(
                replace(top, n_layer=n).num_params(embedding=True, head=True) - wanted))
            stage.config = replace(top, n_layer=k)
            stage.params, stage.parent = stage.config.num_params(head=True), of['ancestor']
            stage.start = f'{k} layers of the ancestor by {kind}'
            stage.model = lambda: pick_layers(load(of['ancestor'].folder), k, kind.split('-')[0], run)
        elif kind == 'hypercloning':
            c = configs[self.chain[-1]]
            stage.config = replace(c, **{f: 2 * getattr(c, f) for f in ('n_head', 'n_kv_head', 'n_embd', 'n_mlp')})
            stage.params, stage.parent = stage.config.num_params(head=True), of[self.chain[-1]]
            stage.start = f'{self.chain[-1]} cloned to twice its width'
            stage.model = lambda: grow(load(stage.parent.folder), stage.config, 'clone', 'stack')
        return stage

    def check(self, run):
        """The shape of everything by name. Raises UserError for knobs that do not fit together, before anything is trained."""
        check_ranges(self, **{k: (1e-9, None) for k in ('ancestor_tokens', 'tokens', 'recovery_tokens', 'sft_epochs',
                                                         'downstream_epochs')},
                     alpha=(-1, 1), sft_learning_rate=(0, None), recovery_learning_rate=(0, None), samples=(1, None),
                     inner_epochs=(1, None), score_examples=(0, None), bridge_answers=(0, None))
        for knob, legal in dict(start=('public', 'subset', 'random'),
                                distillation=('reverse', 'minillm', 'forward', 'seqkd')).items():
            if getattr(self, knob) not in legal:
                raise unknown(knob, getattr(self, knob), legal)
        if strange := [name for name in self.baselines if name not in BASELINES]:
            raise unknown('baseline', strange[0], BASELINES)
        if run.toy or run.dry_run:
            self.start = 'random' if self.start == 'public' else self.start   # nothing is downloaded
        if run.toy:
            self.descendants, self.score_examples = self.descendants[:1], min(4, self.score_examples)
        needs = self.bridge or self.distillation in ('minillm', 'seqkd') or {'seqkd', 'minillm'} & set(self.baselines)
        on_policy = self.distillation == 'minillm' or 'minillm' in self.baselines
        if on_policy and not run.toy and self.samples % run.sequences:
            raise UserError(f'samples={self.samples} must be a multiple of the {run.sequences} sequences of a step')
        if needs and not self.sft_data:
            raise UserError('answers need prompts: --sft_data=NAME, a supervised set')
        if self.start == 'public' and len(self.public) != len(self.chain):
            raise UserError(f'public has {len(self.public)} checkpoints for a chain of {len(self.chain)}')
        configs = {'ancestor': run.model_config(self.ancestor_size)} | {size: run.model_config(size) for size in self.chain}
        if not (run.toy or run.dry_run):
            if self.ancestor:
                configs['ancestor'] = load(self.ancestor).config
            for size, folder in zip(self.chain, self.public if self.start == 'public' else ()):
                configs[size] = load(folder).config
        shapes = dict(configs)
        for above, below in zip(('ancestor', *self.chain), self.chain) if self.start == 'subset' else ():
            check_shapes(configs[below], configs[above], configs[below])
        for size in self.descendants:
            wanted = run.model_config(size)
            small, large = neighbours(shapes, wanted)
            configs[size] = replace(shapes[small], **{f: getattr(wanted, f) for f in SHAPE})
            check_shapes(shapes[small], shapes[large], configs[size])
        for name in self.corpora if not run.dry_run else ():
            Examples(name, run.data_dir, 'train')   # it says so if these are none
            meta = open_corpus(name, run.data_dir).meta
            if meta['vocab_size'] != run.vocab_size:
                raise UserError(f'{name} has a vocabulary of {meta["vocab_size"]}, {run.data} one of {run.vocab_size}')
        return configs

    stand_ins = dict(sft_data='signatures', downstream=('signatures',))   # in a toy

    @property
    def corpora(self):
        """Supervised sets that the stages read besides the run's data."""
        return [name for name in (self.sft_data, *self.downstream) if name]

    def summary(self, results):
        """For each size: the loss at step 0 and after recovery, and the steps at which random initialisation catches up."""
        found = {r.name: r for r in results}
        rows = [['descendant', 'start', 'N', 'loss at step 0', 'after recovery', 'random needs']]
        for name, (size, kind) in self.origins.items():
            curve = _curve(found[name])
            rival = _curve(found[f'{size}-random']) if f'{size}-random' in found else []
            first = curve[0][1] if curve and curve[0][0] == 0 else None
            elsewhere = kind == 'seqkd' or kind == 'kd' and self.sft_data   # its losses are on answers, not on the run's text
            caught = next((step for step, loss in rival if first is not None and loss <= first), None)
            needs = '' if kind != 'linit' or not rival else f'{caught:,} steps' if caught else f'more than {rival[-1][0]:,} steps'
            rows.append([size, kind, count(found[name].n_params), f'{first:.4f}' if first is not None and not elsewhere else '',
                         '' if elsewhere else f'{found[name].val_loss:.4f}', needs])
        text, tuned = table(rows), {r.name: r for r in results if '-on-' in r.name}
        if tuned:
            rows = [['fine-tuned', 'loss on answers', 'Rouge-L', 'exact answers']]
            for name, result in tuned.items():
                examples = Examples(name.rpartition('-on-')[2], self.data_dir, 'val')
                rouge, exact = answer_scores(load(result.folder).eval(), examples)
                rows.append([name, f'{result.val_loss:.4f}', f'{100 * rouge:.2f}', f'{exact:.1%}'])
            text += '\n\n' + table(rows)
        return text


def _curve(result):
    """[(step, validation loss)] of a stage, its end included."""
    lines = read_metrics(result.folder)
    return [(m['step'], m['val_loss']) for m in lines if 'val_loss' in m] + [(lines[-1]['step'], result.val_loss)]


def set_knobs(data):
    """The general knobs with which a stage reads a supervised set: one prepared elsewhere is given as its folder's path."""
    elsewhere = dict(data_dir=str(Path(data).parent)) if len(Path(data).parts) > 1 else {}
    return dict(val_data='', **elsewhere)


def given_result(name):
    """The Result of an ancestor that is there already; of a public one the cost is not known."""
    if (Path(name) / 'result.json').is_file():
        return Result.of(name)
    nan = float('nan')
    return Result('ancestor', str(model_folder(name)), load(name).num_params(), 0.0, 0, 0.0, 0.0, 0.0, nan, nan, 0, 0.0)


def pick_layers(ancestor, k, how, run, sequences=32):
    """The ancestor with the k layers that an earlier learngene method keeps, read off some validation sequences of the run."""
    source = text_source(replace(run, block_size=min(run.block_size, ancestor.config.block_size)))
    batches = []
    for x, y, _ in source.validation(8, 'cpu', 0, 1):
        batches.append((x, y))
        if len(batches) * 8 >= sequences:
            break
    return inherit(ancestor, k, layers=learngene_layers(ancestor, batches, k, how))


# ---------------------------------------------------------------------------------------------------------------------
# the command line

@dataclass
class Descendant:
    """A model of any size between two of a chain: col.py CHAIN_FOLDER DST --to=SIZE"""
    chain: str = ''        # folder of a run of this method, or of model folders
    target: str = ''       # folder to be made
    to: str = ''           # named size, or WIDTHxLAYERS
    alpha: float = -1.0    # weight of the smaller neighbour; below 0: by relative distance
    depth: str = 'bert2bert'   # how the smaller one's layers are replicated: bert2bert (the last ones again), interleave, stack


def shapes_in(folder):
    """{name: (folder, GPTConfig)} of a chain. Raises UserError for a folder without models."""
    listed = Path(folder) / 'chain.json'
    names = map(str, read_json(listed).values()) if listed.is_file() else sorted(
        p.parent.name for p in Path(folder).glob('*/config.json'))
    found = {}
    for name in names:
        found[Path(name).name] = Path(folder) / name, shape_of(Path(folder) / name)
    if len(found) < 2:
        raise UserError(f'{folder} holds no chain: {len(found)} models')
    return found


def main(argv):
    """Command line: CHAIN_FOLDER DST, then knobs."""
    named = [f'--{knob}={arg}' for knob, arg in zip(('chain', 'target'), argv) if not arg.startswith('-')]
    options, _, _ = configure(named + argv[len(named):], Descendant, program='col.py CHAIN_FOLDER DST')
    check_ranges(options, alpha=(-1e9, 1))
    if not (options.chain and options.target and options.to):
        raise UserError('say which chain, where to, and which size: col.py CHAIN_FOLDER DST --to=SIZE')
    found, named_shape = shapes_in(options.chain), GPTConfig.named(options.to)
    shapes = {name: shape for name, (_, shape) in found.items()}
    small, large = neighbours(shapes, named_shape)
    config = replace(shapes[small], **{f: getattr(named_shape, f) for f in SHAPE})
    alpha = None if options.alpha < 0 else options.alpha
    made = linit(*(load(found[name][0], contiguous=False) for name in (small, large)), config, alpha, options.depth)
    try:
        tokenizer = tokenizer_of_model(found[small][0])
    except UserError:
        tokenizer = ''
    made.save(options.target, tokenizer)
    print(f'{options.target}: {count(made.num_params())} parameters (N), between {small} and {large}')


if __name__ == '__main__':
    run_as_program(main)
