"""
Learning from a teacher: Late-to-Early Training, in which a trained model up to ten times smaller
guides the early layers of the target model in its early steps; and logit distillation.

Paper: Zhao et al., Late-to-Early Training: LET LLMs Learn Earlier, So Faster and Better.

    python train.py config/let_tiny.py

    loss = CE + lambda L_proj,   lambda = lambda0 max(0, (S_stop - s) / S_stop)          (Eq. 5)
    L_proj = -cos(target's hidden state after layer k, teacher's after its last)         (Eq. 4)
    loss = alpha CE + (1 - alpha) T^2 KL(teacher / T || target / T)                distillation

"After its last layer" is before the final norm (Eq. 3), whatever library opens the teacher. From
step S_stop the teacher is gone. Distillation throughout is RKD, for the first S_stop steps SALT
(Rawat et al.). Both are objectives that any stage of any method can have. What a layer, a weight or
a teacher would do is measured before training by extras/alignment.py.
"""

import math
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import Fraction, NonNegative, Positive
from data.corpus import check_vocabulary, open_corpus
from data.vocabulary import encode_spans, same_tokenizer, tokenizer_of_model, translate
from engine.errors import UserError, unknown
from engine.log import read_metrics
from engine.loss import Distillation
from engine.report import (
    Line,
    Panel,
    by_label,
    compare_variants,
    format_si,
    interval,
    mean_curve,
    steps_to_loss,
)
from engine.stage import Stage, next_token
from engine.teacher import LazyTeacher, open_teacher, planned_config
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------
# losses


def match_width(hidden, width):
    """
    Hidden vectors (..., D) as (..., width) by linear interpolation along the vector, both ends
    kept (Eq. 6), without parameters: coordinate j is read at u = j (D - 1) / (width - 1).
    """
    D = hidden.shape[-1]
    if D == width:
        return hidden
    j = torch.arange(width, dtype=torch.float64, device=hidden.device)
    u = j * ((D - 1) / max(1, width - 1))
    low = u.floor().long().clamp(max=max(0, D - 2))
    high = (low + 1).clamp(max=D - 1)
    beta = (u - low).to(hidden.dtype)
    shape = (*hidden.shape[:-1], width)
    return torch.lerp(
        hidden.gather(-1, low.expand(shape)), hidden.gather(-1, high.expand(shape)), beta
    )


def mean_over(values, covered):
    """Mean over positions, or over those that are covered."""
    if covered is None:
        return values.mean()
    return (values * covered).sum() / covered.sum().clamp(min=1)


def at_least_float32(x):
    """x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_similarity(target, teacher, covered=None):
    """Mean cosine similarity of hidden vectors (..., D) and (..., D')."""
    target = at_least_float32(target)
    teacher = at_least_float32(teacher)
    matched = match_width(target, teacher.shape[-1])
    return mean_over(F.cosine_similarity(matched, teacher, dim=-1), covered)


def cosine(target, teacher, covered):
    """-cos, the mean over positions (Eq. 4; Eq. 7's sum taken as a mean, like the CE beside it)."""
    return -cosine_similarity(target, teacher, covered)


def per_vector(hidden, covered):
    """Hidden vectors (..., D) at length 1, as the cosine compares them."""
    return F.normalize(hidden, dim=-1)


def per_feature(hidden, covered, eps=1e-4):
    """Hidden vectors (B, T, D), every feature at mean 0 and variance 1 over a sequence."""
    mask = torch.ones_like(hidden[..., :1]) if covered is None else covered[..., None]
    count = mask.sum(-2, keepdim=True).clamp(min=1)
    hidden = hidden - (hidden * mask).sum(-2, keepdim=True) / count
    variance = (hidden.square() * mask).sum(-2, keepdim=True) / count
    return hidden / (variance + eps).sqrt()


def logsum(target, teacher, covered, normalise=per_feature):
    """
    log of sum |difference|^4 over the positions and features of a sequence (B, T, D), the mean
    over sequences (Appendix H, after Miles and Mikolajczyk): what differs most counts most. They
    sum over a batch of vectors, whose features they standardise; here a sequence is that batch, so
    that neither micro-batches nor processes change the loss. normalise: per_feature, or per_vector
    for vectors of length 1, as the cosine has them. The sum is taken as a mean over positions,
    which moves the loss by a constant.
    """
    target = normalise(match_width(target, teacher.shape[-1]), covered)
    difference = (target - normalise(teacher, covered)).pow(4).sum(-1)
    if covered is None:
        return (difference.mean(-1) + 1e-12).log().mean()
    count = covered.sum(-1)
    in_sequence = (difference * covered).sum(-1) / count.clamp(min=1)
    return mean_over((in_sequence + 1e-12).log(), count > 0)


CCA_POSITIONS = 10  # for each dimension: independent noise has a correlation of about 1 / this
CCA_SEQUENCES = 16  # in a micro-batch, as the paper's


def check_cca(positions, dimensions):
    """Raise UserError for too few positions: sets of vectors then correlate by chance."""
    needed = CCA_POSITIONS * dimensions
    if positions < needed:
        raise UserError(
            f'cca of {dimensions} dimensions needs {needed:,} positions in a batch, not '
            f'{positions:,}: fewer correlate by chance'
        )


def cca(target, teacher, covered, ridge=1e-3):
    """
    Minus the mean squared canonical correlation of the two sets of vectors, of any widths (Table
    5). It is of a whole batch: pieces of it correlate by chance, so too few positions are refused
    (UserError); a stage with this loss has micro-batches of its own, of CCA_SEQUENCES.
    """
    positions = target[..., 0].numel() if covered is None else int(covered.sum())
    check_cca(positions, max(target.shape[-1], teacher.shape[-1]))
    if covered is None:
        covered = torch.ones(target.shape[:-1], device=target.device)
    weight, whitened = covered.to(target.dtype).flatten()[:, None], []
    for x in (target, teacher):
        x = x.flatten(0, -2)
        x = (x - (x * weight).sum(0) / weight.sum()) * weight
        covariance = x.T @ x
        eye = torch.eye(len(covariance), dtype=x.dtype, device=x.device)
        damped = covariance + ridge * covariance.diagonal().mean() * eye
        factor, _ = torch.linalg.cholesky_ex(damped)  # unlike cholesky, does not wait for the GPU
        whitened.append(torch.linalg.solve_triangular(factor, x.T, upper=False))  # (D, n)
    smaller = min(len(x) for x in whitened)
    return -(whitened[0] @ whitened[1].T).square().sum() / smaller


ALIGNMENTS = {'cosine': cosine, 'logsum': logsum, 'cca': cca}


def alignment_loss(target_hidden, teacher_hidden, kind='cosine', covered=None):
    """
    L_proj of the target's hidden states (..., D) and the teacher's (..., D'), at least float32.
    kind: cosine, logsum or cca; covered: (...) True where a position has a partner, None:
    everywhere. No gradient goes to the teacher.
    """
    target = at_least_float32(target_hidden)
    teacher = at_least_float32(teacher_hidden.detach())
    with torch.autocast(target.device.type, enabled=False):
        return ALIGNMENTS[kind](target, teacher, covered)


# ----------------------------------------------------------------------------------------------
# what a teacher sees


def teacher_flops(params, until=None):
    """Stage.more_flops of a teacher: 2 FLOPs a parameter and token, to the step `until` or end."""

    def flops(progress, step_tokens):
        taught = progress.step
        if until is not None:
            taught = min(taught, math.ceil(progress.step_of(until)))
        return 2.0 * params * taught * step_tokens

    return flops


def hidden_states(teacher, layer=0):
    """
    A function ids (B, T) -> hidden states (B, T, D) of a teacher after `layer` (0: its last) and
    before the final norm. Other callables than models are used as they are.
    """
    if not isinstance(teacher, GPT):
        return teacher
    return lambda ids: teacher.residual_stream(ids, layers=layer or None)[0]


def teacher_states(x, teacher, layer, tokenizers=None):
    """
    (the teacher's hidden state for each position of x (B, T), which positions have one or None:
    all). tokenizers: the names of (x's, the teacher's) if they differ.
    """
    hidden = hidden_states(teacher, layer)
    longest = longest_context(teacher)
    if tokenizers is None:
        return in_windows(hidden, x, longest), None
    rows = [translate(row, *tokenizers) for row in x.cpu().numpy()]
    theirs = [torch.tensor(ids[:longest], device=x.device) for ids, _ in rows]
    states = hidden(pad_sequence(theirs, batch_first=True))
    place = torch.tensor(np.stack([place for _, place in rows]), device=x.device)
    covered = (place >= 0) & (place < longest)
    place = (place * covered)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, place), covered


PROBE = 'A naïve café — 数学 and 🙂:\n\tdef f(x): return x  # 1234'


def check_alignable(student, teacher):
    """Raise UserError unless both tokenizers reproduce every byte of a text."""
    for name in (student, teacher):
        if encode_spans(PROBE.encode(), name)[1].sum() != len(PROBE.encode()):
            raise UserError(
                f'the tokenizers {student} and {teacher} cannot be aligned: {name} does not keep '
                'every byte of a text'
            )


def longest_context(teacher):
    """Positions a teacher reads at once."""
    return teacher.config.block_size if isinstance(teacher, GPT) else 2**30


def in_windows(hidden, ids, longest):
    """hidden(ids) of a teacher that reads `longest` positions, in equal windows of ids (B, T)."""
    T = ids.shape[1]
    if T <= longest:
        return hidden(ids)
    windows = -(-T // longest)
    return torch.cat([hidden(part) for part in ids.split(-(-T // windows), dim=1)], 1)


# ----------------------------------------------------------------------------------------------
# objectives: (model, x, y, progress) -> (loss, count, scalars)


@dataclass
class Alignment:
    """What LET aligns, how strongly and for how long."""

    target_layer: int  # k, from 1
    teacher_layer: int = 0  # 0: its last
    lambda0: float = 0.1  # weight of L_proj at the first step
    s_stop: float = 1500.0  # the step at which it reaches zero; up to 1: a fraction of all steps
    kind: str = 'cosine'
    untrained: bool = False  # a control: the teacher's shape, initialised at random
    pairing: str = ''  # which the two layers follow from


def let(teacher, alignment, tokenizers=None):
    """
    The objective of Late-to-Early Training. teacher: a model folder or hub name, opened at the
    first batch, or a callable ids -> hidden states (B, T, D). From S_stop on, and with lambda0 = 0,
    it is exactly next-token prediction, and the teacher is freed. tokenizers: the names of (the
    student's, the teacher's) if they differ; then every batch's ids visit the host.
    """
    assert not (alignment.untrained and callable(teacher)), 'it says no shape to initialise'
    lazy = LazyTeacher(teacher, alignment.untrained)

    def objective(model, x, y, progress):
        weight = alignment.lambda0 * (1 - progress.fraction_of(alignment.s_stop))
        if weight <= 0:
            lazy.forget()
            return next_token(model, x, y, progress)
        with torch.no_grad():
            layer = alignment.teacher_layer
            theirs, covered = teacher_states(x, lazy.on(x.device), layer, tokenizers)
        output = model(x, y, hidden_at=alignment.target_layer)
        l_proj = alignment_loss(output.hidden, theirs, alignment.kind, covered)
        scalars = dict(data_loss=output.loss, alignment_loss=l_proj)
        scalars['similarity'] = cosine_similarity(output.hidden.detach(), theirs, covered)
        scalars['constant_similarity'] = constant_similarity(theirs, covered)
        scalars['alignment_weight'] = torch.full((), weight, device=x.device)
        return output.loss + weight * l_proj, output.count, scalars

    return objective


def constant_similarity(teacher_hidden, covered=None):
    """
    Mean cosine similarity of the teacher's hidden states (..., D) to the best constant vector: what
    the target reaches without reading anything.
    """
    unit = F.normalize(at_least_float32(teacher_hidden), dim=-1)
    if covered is not None:
        return (unit * covered[..., None]).flatten(0, -2).sum(0).norm() / covered.sum().clamp(min=1)
    return unit.flatten(0, -2).mean(0).norm()


def distil(teacher, alpha=0.6, temperature=1.0, s_stop=None, reverse=False):
    """
    The objective of logit distillation from a model folder, hub name or GPT. alpha: weight of the
    data (Inheritune, Appendix C: 0.6 at T = 1). s_stop: from this step (up to 1: fraction of all)
    it is next-token prediction (SALT's n_KD); None: never (RKD). reverse: KL(student || teacher)
    (Chain-of-Learngene, Eq. 1). Targets of -100, prompts, do not count.
    """
    lazy = LazyTeacher(teacher)

    def objective(model, x, y, progress):
        if s_stop is not None and progress.fraction_of(s_stop) >= 1:
            lazy.forget()
            return next_token(model, x, y, progress)
        theirs = lazy.on(x.device)
        with torch.no_grad():
            last = hidden_states(theirs)
            hidden = in_windows(lambda ids: theirs.norm(last(ids)), x, longest_context(theirs))
        settings = (alpha, temperature, reverse)
        output = model(x, y, teacher=Distillation(hidden, theirs.head_weight, *settings))
        scalars = dict(data_loss=output.data_loss, distillation_loss=output.divergence)
        return output.loss, output.count, scalars

    return objective


def distil_stage(stage, objective, teacher, params, settings):
    """
    Give a stage the objective of logit distillation, under a name for the report. teacher: a model
    folder or hub name; params: of its layers and head; settings: as of `distil`.
    """
    stage.objective = distil(teacher, **settings)
    stage.teaching = dict(objective=objective, teacher=Path(teacher).name, **settings)
    stage.teaching['teacher_params'] = params
    stage.more_flops = teacher_flops(params, settings.get('s_stop'))


def teach(stage, teacher, alignment, params=0.0, tokenizers=None):
    """
    Give a stage the objective of LET. teacher: a model folder or hub name; params: of its layers,
    whose forward pass costs 2 FLOPs each a token (a teacher with a coarser tokenizer reads fewer
    tokens than are counted); 0 if they are not known.
    """
    stage.objective = let(teacher, alignment, tokenizers)
    settings = asdict(alignment)
    del settings['pairing']  # the layers say it
    if not alignment.untrained:
        del settings['untrained']
    stage.teaching = dict(objective='let', teacher=Path(teacher).name, **settings)
    if params and alignment.lambda0:
        stage.teaching['teacher_params'] = params
        stage.more_flops = teacher_flops(params, alignment.s_stop)


# ----------------------------------------------------------------------------------------------
# the method

PAIRINGS = ('L2E', 'L2M', 'L2L', 'M2E', 'M2M', 'M2L')
UNKNOWN_LAYERS = 10**6  # more than any pairing asks for


def pair_layers(pairing, teacher_layers, target_layers):
    """
    (the target's layer, the teacher's), from 1. L2E: the teacher's last to the target's early
    layer, and likewise with M(iddle) and L(ast) (Figures 3 and 4); L1F3: the first from the
    teacher's last to the target's third (Figure 12). Early is the third layer, as in the paper, or
    the middle of a target of fewer than six. Raises UserError for what does not exist.
    """
    if pairing in PAIRINGS:
        middle = max(1, target_layers // 2)
        ours = {'E': min(3, middle), 'M': middle, 'L': target_layers}[pairing[2]]
        theirs = {'L': teacher_layers, 'M': max(1, teacher_layers // 2)}[pairing[0]]
        return ours, theirs
    match = re.fullmatch(r'L([1-9]\d*)F([1-9]\d*)', pairing)
    if not match:
        raise unknown('pairing', pairing, [*PAIRINGS, 'L1F3'])
    ours, theirs = int(match[2]), teacher_layers + 1 - int(match[1])
    pairs = (('teacher', theirs, teacher_layers), ('target', ours, target_layers))
    for which, layer, layers in pairs:
        if not 1 <= layer <= layers:
            no_layer = f'the {which} has {layers} layers, there is no layer {layer}'
            raise UserError(f'{pairing}: {no_layer}')
    return ours, theirs


class Teacher(NamedTuple):
    """Who teaches the runs of LET."""

    name: str  # model folder or hub name; '': yet to be trained
    layers: int  # 0: not known
    width: int = 0
    params: float = 0.0  # of its layers: a forward pass costs 2 FLOPs each a token; 0: not known
    head: float = 0.0  # of its head, which distillation needs too
    config: GPTConfig | None = None  # of one that is yet to be trained
    tokenizers: tuple[str, str] | None = None  # names of the target's and its own, if they differ

    @classmethod
    def of(cls, name, config):
        """One of our architectures."""
        params = config.num_params()
        head = config.num_params(head=True) - params
        return cls(name, config.n_layer, config.n_embd, params, head)

    def used_by(self, alignment):
        """Parameters of the layers that an alignment asks for: a teacher stops there."""
        return self.params * (alignment.teacher_layer / self.layers if self.layers else 1.0)


@dataclass
class LET:
    """Late-to-Early Training (Zhao et al.) and what it is compared with, at equal steps."""

    size: str = '64x4'  # target model
    tokens: Positive = 1e6  # training tokens of each target model
    teacher: str = ''  # model folder or hub name; empty: train one of teacher_size first
    teacher_size: str = '48x2'  # of the teacher that is trained first
    teacher_tokens: Positive = 3e6  # training tokens of that teacher
    variants: tuple[str, ...] = ('let',)  # baseline, rkd, salt, let+10+L2M+stop0.5, let+untrained
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 1500.0  # step at which LET and SALT end; up to 1: fraction of all steps
    pairing: str = 'L2E'  # L2E, L2M, L2L, M2E, M2M, M2L, or such as L1F3
    alignment: Literal[*ALIGNMENTS] = 'cosine'  # L_proj
    alpha: Fraction = 0.5  # RKD and SALT: weight of the data, the rest is the teacher's; our choice
    temperature: Positive = 1.0  # RKD and SALT; our choice, as the paper names none

    def stages(self, run):
        """The teacher, if it is not given, once for all seeds; then every variant."""
        config, teacher = run.model_config(self.size), self.teacher_of(run)
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise UserError(f'variants={",".join(self.variants)} must be different ones')
        layers = teacher.layers or UNKNOWN_LAYERS
        alignments = {v: self.parse(v, layers, config.n_layer) for v in self.variants}
        check_positions(alignments, max(config.n_embd, teacher.width), config, run)
        if not teacher.name:
            X = teacher.params + teacher.head
            taught = yield Stage('teacher', teacher.config, self.teacher_tokens, X, once=True)
            teacher = teacher._replace(name=taught.folder)
        for variant, alignment in alignments.items():
            yield self.target(run, teacher, variant, alignment)

    def target(self, run, teacher, variant, alignment):
        """A Stage of the target model with what a variant teaches it."""
        config = run.model_config(self.size)
        stage = Stage(variant, config, self.tokens, config.num_params(head=True))
        stage.labels = dict(variant=variant)
        if alignment:
            params = teacher.used_by(alignment)
            teach(stage, teacher.name, alignment, params, teacher.tokenizers)
            if alignment.kind == 'cca':  # of a batch as such: pieces of it correlate by chance
                stage.knobs = dict(micro_batch_size=min(CCA_SEQUENCES, run.batch_size))
        elif variant != 'baseline':
            self.distil(stage, variant, teacher)
        if self.teacher and not run.toy and stage.teaching:
            stage.teaching['teacher'] = self.teacher  # its path: names may be alike
        if alignment and not teacher.layers:  # of a plan
            stage.teaching['teacher_layer'] = f'by {alignment.pairing}'
        return stage

    def teacher_of(self, run):
        """The Teacher: a given one, examined before training, or one that is yet to be trained."""
        config = run.model_config(self.teacher_size)
        if not self.teacher or run.toy:
            return Teacher.of('', config)._replace(config=config)
        if not run.dry_run:
            return self.examine(run)
        known = planned_config(self.teacher)
        return Teacher.of(self.teacher, known) if known else Teacher(self.teacher, 0)

    def parse(self, variant, teacher_layers, target_layers):
        """The Alignment of a variant, None for the baselines. Raises UserError for others."""
        name, *parts = variant.split('+')
        if name in ('baseline', 'rkd', 'salt') and not parts:
            return None
        if name != 'let':
            known = ('baseline', 'rkd', 'salt', 'let', 'let+0.3', 'let+L2M', 'let+logsum')
            known += ('let+stop0.5', 'let+untrained')
            raise unknown('variant', variant, known)
        given = {}
        for part in parts:
            number = re.fullmatch(r'(stop)?(\d+(?:\.\d+)?)', part)
            if number:
                field, value = 's_stop' if number[1] else 'lambda0', float(number[2])
            elif part == 'untrained':
                field, value = 'untrained', True
            else:
                field, value = 'kind' if part in ALIGNMENTS else 'pairing', part
            if field in given:
                raise UserError(f'{variant!r} in variants says {field} twice')
            given[field] = value
        usual = dict(lambda0=self.lambda0, s_stop=self.s_stop, kind=self.alignment)
        found = Alignment(0, **usual | dict(pairing=self.pairing) | given)
        pair = pair_layers(found.pairing, teacher_layers, target_layers)
        found.target_layer, found.teacher_layer = pair
        return found

    def distil(self, stage, variant, teacher):
        """Give a stage the objective of RKD or SALT."""
        s_stop = self.s_stop if variant == 'salt' else None
        settings = dict(alpha=self.alpha, temperature=self.temperature, s_stop=s_stop)
        distil_stage(stage, variant, teacher.name, teacher.params + teacher.head, settings)

    def examine(self, run):
        """The Teacher that is given, opened and compared with the corpus. Raises UserError."""
        model = open_teacher(self.teacher)
        corpus = open_corpus(next(iter(run.corpora)), run.data_dir)
        ours = theirs = corpus.meta['tokenizer']
        try:
            theirs = tokenizer_of_model(self.teacher)
        except UserError:
            check_vocabulary(corpus, model.config, self.teacher)
            print(f'{self.teacher} does not name its tokenizer; assuming {ours}, as the corpus')
        distilling = {'rkd', 'salt'} & set(self.variants)
        found = Teacher.of(self.teacher, model.config)
        if same_tokenizer(ours, theirs):
            if distilling:
                check_vocabulary(corpus, model.config, self.teacher)
            return found
        if distilling:
            names = f'the corpus has {ours}, {self.teacher} {theirs}'
            raise UserError(f'RKD and SALT need one tokenizer: {names}')
        check_alignable(ours, theirs)
        return found._replace(tokenizers=(ours, theirs))

    def summary(self, results):
        """
        Losses, steps to the baseline's last loss, FLOPs and time beside the baseline's, and how
        similar target and teacher were, beside the best constant vector.
        """
        records = compare_variants(results, 'baseline')
        groups = by_label(results, 'variant')
        baseline = {r.labels['seed']: r for r in groups.get('baseline', [])}
        panel = Panel('step', "similarity to the teacher's last layer")
        for record in records:
            runs = groups[record['variant']]
            if baseline:
                record |= against(runs, baseline)
            steps, values = mean_scalar(runs, 'similarity')
            if steps:
                constant = mean_scalar(runs, 'constant_similarity')[1]
                record |= {'similarity': values[-1], 'of a constant': constant[-1]}
                panel.lines.append(Line(steps, values, record['variant']))
        blocks = [records]
        for result in results:
            if result.name == 'teacher':
                flops = format_si(result.flops)
                blocks.insert(0, f'teacher: {result.val_loss:.4f} after {flops}FLOPs')
        return [*blocks, ('similarity.png', [panel] if panel.lines else [])]


def check_positions(alignments, widest, config, run):
    """Raise UserError, before training, where CCA has too few positions for vectors this wide."""
    positions = min(CCA_SEQUENCES, run.batch_size) * min(run.block_size, config.block_size)
    if any(alignment and alignment.kind == 'cca' for alignment in alignments.values()):
        check_cca(positions, widest)


def mean_scalar(runs, name):
    """(steps, means over the runs) of a scalar of metrics.jsonl, where all of them have it."""
    lines = [{m['step']: m[name] for m in read_metrics(r.folder) if name in m} for r in runs]
    steps = sorted(set.intersection(*map(set, lines)))
    return steps, [statistics.mean(found[step] for found in lines) for step in steps]


def against(runs, baseline):
    """
    A variant beside the baseline, {seed: Result}, paired by seed: the share of the steps after
    which it has the baseline's last loss, with its 95% interval, and FLOPs and seconds as ratios.
    """
    runs = [r for r in runs if r.labels['seed'] in baseline]
    pairs = [(r, baseline[r.labels['seed']]) for r in runs]
    curves = [(mean_curve([r]), b.val_loss) for r, b in pairs]
    shares = [steps_to_loss(curve, loss) for curve, loss in curves if len(curve) > 1]
    record = dict.fromkeys(('steps to its loss', 'FLOPs', 'time'))
    missed = shares.count(None)
    if missed:
        record['steps to its loss'] = f'not reached by {missed} of {len(shares)}'
    elif shares:
        record['steps to its loss'] = f'{statistics.mean(shares):.2f}x'
        if low_high := interval(shares):
            record['steps to its loss'] += f' ({low_high[0]:.2f} to {low_high[1]:.2f})'
    if pairs:
        record['FLOPs'] = sum(r.flops for r in runs) / sum(b.flops for _, b in pairs)
        record['time'] = sum(r.seconds for r in runs) / sum(b.seconds for _, b in pairs)
    return record
