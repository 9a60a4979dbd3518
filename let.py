"""
Late-to-Early Training (LET): the early layers of a model learn, in its early steps, from the last
layer of a trained model up to ten times smaller.

Paper: Zhao et al., Late-to-Early Training: LET LLMs Learn Earlier, So Faster and Better.

    python train.py config/let_tiny.py

With h_M the target's hidden state after layer k, h_T the teacher's after its last layer (before the
final norm, Eq. 3), and s the step, from 0:

    L = NLL + lambda L_proj,    lambda = lambda0 max(0, (S_stop - s) / S_stop)             (Eq. 5)
    L_proj = -cos(h_M, h_T), the mean over positions                                       (Eq. 4)

From step S_stop on the teacher is gone. It is compared with logit distillation,

    L = alpha NLL + (1 - alpha) T^2 KL(teacher / T || target / T)

throughout (RKD) or for the first S_stop steps (SALT, Rawat et al.). All of them are objectives that
any stage of any method can have. extras/alignment.py measures, before training, what a layer or a
teacher would do.
"""

import math
import re
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import Fraction, NonNegative, Positive, check
from data.vocabulary import check_tokenizer, encode_spans, same_tokenizer, tokenizer_in, translate
from engine.errors import UserError, unknown
from engine.log import read_metrics
from engine.loss import Distillation
from engine.report import by_label, compare_variants, interval, mean_curve, steps_to_loss
from engine.stage import Stage, next_token
from engine.teacher import lazy_teacher, open_teacher, planned_config
from model import GPTConfig

# ----------------------------------------------------------------------------------------------
# the idea


@dataclass
class Alignment:
    """What LET aligns, how strongly and for how long."""

    target_layer: int  # k, from 1
    teacher_layer: int = 0  # 0: its last
    lambda0: float = 0.1  # weight of L_proj at the first step
    s_stop: float = 1500.0  # the step at which it reaches zero; up to 1: a fraction of all steps
    kind: str = 'cosine'  # L_proj: cosine, logsum or cca
    untrained: bool = False  # a control: the teacher's shape with fresh random weights


def let_objective(teacher, alignment, tokenizers=None, padded=False):
    """
    The objective of LET: (model, x, y, progress) -> (loss, count, scalars). teacher: a model folder
    or hub name, which is opened at the first batch, or a GPT; alignment: an Alignment; tokenizers:
    the names of (the target's, the teacher's) if they differ; padded: positions after a sequence's
    last target are padding, and are left out of L_proj. From S_stop on, and with lambda0 = 0, this
    is next-token prediction to the bit, and the teacher is freed.
    """
    opened = lazy_teacher(teacher, alignment.untrained)

    def objective(model, x, y, progress):
        s, S_stop = progress.step, progress.step_of(alignment.s_stop)
        lam = alignment.lambda0 * max(0.0, S_stop - s) / (S_stop or 1.0)  # Eq. 5
        if not lam:
            opened.cache_clear()
            return next_token(model, x, y, progress)
        with torch.no_grad():
            h_T, covered = teacher_states(opened(x.device), x, alignment.teacher_layer, tokenizers)
            if padded:
                covered = (y != -100).flip(1).cumsum(1).flip(1) > 0
        output = model(x, y, hidden_at=alignment.target_layer)
        h_M = output.hidden
        if covered is not None:
            h_M, h_T = h_M[covered], h_T[covered]
        l_proj = alignment_loss(h_M, h_T, alignment.kind)  # Eq. 4
        with torch.no_grad():
            cos = l_proj if alignment.kind == 'cosine' else alignment_loss(h_M, h_T)
            scalars = dict(data_loss=output.loss, alignment_loss=l_proj, similarity=-cos)
            scalars['constant_similarity'] = constant_similarity(h_T)
        return output.loss + lam * l_proj, output.count, scalars

    return objective


# ----------------------------------------------------------------------------------------------
# L_proj: of vectors (n, D) of the target and (n, D') of the teacher


def match_width(hidden, width):
    """
    Hidden vectors (..., D) as (..., width) by linear interpolation along the vector, both ends
    kept, without parameters (Eq. 6): with u = j (D - 1) / (width - 1) and b = u - floor(u),
    coordinate j is (1 - b) h[floor(u)] + b h[floor(u) + 1].
    """
    D, n = hidden.shape[-1], max(1, width - 1)
    if D == width:
        return hidden
    j = torch.arange(width, device=hidden.device)
    low = j * (D - 1) // n  # floor(u); in whole numbers it is exact
    ends = hidden.index_select(-1, low), hidden.index_select(-1, (low + 1).clamp(max=D - 1))
    return torch.lerp(*ends, (j * (D - 1) % n).to(hidden.dtype) / n)


def cosine(target, teacher):
    """-cos, the mean over positions (Eq. 4; Eq. 7's sum is a mean here, as the NLL's is)."""
    found = F.cosine_similarity(match_width(target, teacher.shape[-1]), teacher, dim=-1)
    return -found.sum() / max(1, len(found))


def logsum(target, teacher):
    """
    log sum |z_M - z_T|^4 over positions and features, with z the features at mean 0 and variance 1
    over the micro-batch (Appendix H, after Miles and Mikolajczyk).
    """
    both = match_width(target, teacher.shape[-1]), teacher
    z_M, z_T = (F.batch_norm(x, None, None, training=True, eps=1e-4) for x in both)
    return (z_M - z_T).pow(4).sum().clamp(min=1e-12).log()


def cca(target, teacher, ridge=1e-3):
    """
    -mean rho_i^2, rho the canonical correlations (Table 5): the singular values of Q_M^T Q_T, where
    Q R are the centred vectors, by QR. The square root of ridge x variance, times the identity, is
    appended below the vectors, so that R is invertible where features depend on each other.
    """
    Q = []
    for x in (target - target.mean(0), teacher - teacher.mean(0)):
        below = (ridge * x.square().sum(0).mean()).sqrt().expand(x.shape[-1]).diag()
        Q.append(torch.linalg.qr(torch.cat((x, below))).Q[: len(x)])
    return -(Q[0].mT @ Q[1]).square().sum() / min(target.shape[-1], teacher.shape[-1])


ALIGNMENTS = {'cosine': cosine, 'logsum': logsum, 'cca': cca}


def alignment_loss(target_hidden, teacher_hidden, kind='cosine'):
    """
    L_proj of hidden states (..., D) of the target and (..., D') of the teacher, at least float32.
    kind: cosine, logsum or cca. No gradient goes to the teacher.
    """
    both = vectors(target_hidden), vectors(teacher_hidden.detach())
    with torch.autocast(target_hidden.device.type, enabled=False):
        return ALIGNMENTS[kind](*both)


def vectors(hidden):
    """Hidden states (..., D) as vectors (n, D), at least float32."""
    return hidden.flatten(0, -2).to(torch.promote_types(hidden.dtype, torch.float32))


def constant_similarity(teacher_hidden):
    """The cosine to the best constant vector: what the target reaches without reading anything."""
    return F.normalize(vectors(teacher_hidden), dim=-1).mean(0).norm()


# ----------------------------------------------------------------------------------------------
# what a teacher sees


def teacher_states(teacher, x, layer=0, tokenizers=None):
    """
    What a GPT makes of ids x (B, T): (hidden states (B, T, D') after `layer`, 0: its last, and
    before the final norm; covered (B, T), True where a position has one, or None: everywhere).
    tokenizers: the names of (x's, the teacher's) if they differ; then the text is written in the
    teacher's tokens, on the CPU. A teacher of a shorter context reads x in windows.
    """
    longest = teacher.config.block_size
    if tokenizers is None:
        windows = x.chunk(-(-x.shape[1] // longest), dim=1)  # as few and as equal as possible
        return torch.cat([teacher.residual_stream(w, layer or None)[0] for w in windows], 1), None
    rows = [translate(row, *tokenizers) for row in x.cpu().numpy()]
    ids = [torch.tensor(found[:longest], device=x.device) for found, _ in rows]
    states, _ = teacher.residual_stream(pad_sequence(ids, batch_first=True), layer or None)
    place = torch.tensor(np.stack([place for _, place in rows]), device=x.device)
    covered = (place >= 0) & (place < longest)
    place = (place * covered)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, place), covered


# ----------------------------------------------------------------------------------------------
# what LET is compared with: RKD, with a teacher throughout, and SALT, with one at first


def distil(teacher, alpha=0.6, temperature=1.0, s_stop=1.0, reverse=False):
    """
    The objective of logit distillation from a model folder, hub name or GPT. alpha: weight of the
    data (Inheritune, Appendix C: 0.6 at T = 1). s_stop: from this step on (up to 1: fraction of
    all) it is next-token prediction (SALT's n_KD); 1: never (RKD). reverse: KL(student || teacher)
    (Chain-of-Learngene, Eq. 1). Targets of -100, prompts, do not count.
    """
    opened = lazy_teacher(teacher)

    def objective(model, x, y, progress):
        if progress.step >= progress.step_of(s_stop):
            opened.cache_clear()
            return next_token(model, x, y, progress)
        theirs = opened(x.device)
        with torch.no_grad():
            hidden = theirs.norm(teacher_states(theirs, x)[0])
        settings = (alpha, temperature, reverse)
        output = model(x, y, teacher=Distillation(hidden, theirs.head_weight, *settings))
        scalars = dict(data_loss=output.data_loss, distillation_loss=output.divergence)
        return output.loss, output.count, scalars

    return objective


def teacher_flops(params, s_stop=1.0):
    """Stage.more_flops of a teacher: 2 FLOPs a parameter and token, up to step `s_stop`."""

    def flops(progress, step_tokens):
        taught = min(progress.step, math.ceil(progress.step_of(s_stop)))
        return 2.0 * params * taught * step_tokens

    return flops


def teach(stage, kind, teacher, objective, params, settings):
    """
    Give a stage the objective of a teacher. kind, teacher, settings: what the objective is and who
    teaches, for the report; params: the teacher's weights that are used, at 2 FLOPs a token of the
    target; 0: unknown, not counted.
    """
    stage.objective = objective
    stage.teaching = dict(objective=kind, teacher=teacher, **settings, teacher_params=params)
    stage.more_flops = teacher_flops(params, settings.get('s_stop', 1.0))


# ----------------------------------------------------------------------------------------------
# the method

KINDS = {  # of variants: the knobs that each can have of its own
    'baseline': (),
    'let': ('lambda0', 's_stop', 'pairing', 'alignment', 'untrained'),
    'rkd': ('alpha', 'temperature'),
    'salt': ('alpha', 'temperature', 's_stop'),
}
PROBE = (
    'A naïve café — 数学 and 🙂:\n\tdef f(x): return x  # 1234'.encode()
)  # what tokenizers must keep


def pair_layers(pairing, teacher_layers, target_layers):
    """
    (the target's layer, the teacher's), from 1. L2E: the teacher's last to the target's early
    layer, and likewise with M(iddle) and L(ast) (Figures 3 and 4); L1F3: the first from the
    teacher's last to the target's third (Figure 12). Early is the third layer, as in the paper, or
    the middle of a target of fewer than five. Raises UserError for what does not exist.
    """
    match = re.fullmatch(r'([LM])2([EML])|L([1-9]\d*)F([1-9]\d*)', pairing)
    if not match:
        raise unknown('pairing', pairing, ['L2E', 'M2L', 'L1F3'])
    theirs, ours, from_last, counted = match.groups()
    middle = (target_layers + 1) // 2
    if counted:
        ours, theirs = int(counted), teacher_layers + 1 - int(from_last)
    else:
        ours = dict(E=min(3, middle), M=middle, L=target_layers)[ours]
        theirs = teacher_layers if theirs == 'L' else (teacher_layers + 1) // 2
    if ours > target_layers or theirs < 1 <= teacher_layers:
        depths = f'the target has {target_layers} layers, the teacher {teacher_layers}'
        raise UserError(f'{pairing}: {depths}')
    return ours, theirs


class Teacher(NamedTuple):
    """Who teaches the variants."""

    folder: str  # or hub name
    name: str  # in the report; that of a given one is its path
    config: GPTConfig | None  # None where a plan does not know it
    tokenizers: tuple | None = None  # names of the target's and its own, if they differ


@dataclass
class LET:
    """Late-to-Early Training (Zhao et al.) and what it is compared with, at equal steps."""

    size: str = '64x4'  # target model
    tokens: Positive = 1e6  # training tokens of each target model
    teacher: str = ''  # model folder or hub name; empty: train one of teacher_size first
    teacher_size: str = '48x2'  # of the teacher that is trained first
    teacher_tokens: Positive = 3e6  # training tokens of that teacher
    variants: tuple[str, ...] = ('let',)  # baseline, let, rkd, salt; let,lambda0=10,pairing=L2M
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 1500.0  # step at which LET and SALT end; up to 1: fraction of all steps
    pairing: str = 'L2E'  # L2E, L2M, L2L, M2E, M2M, M2L, or such as L1F3
    alignment: Literal[*ALIGNMENTS] = 'cosine'  # L_proj
    untrained: bool = False  # a control: the teacher's shape with fresh random weights
    alpha: Fraction = 0.5  # RKD and SALT: weight of the data, the rest is the teacher's; our choice
    temperature: Positive = 1.0  # RKD and SALT: T; our choice, too (docs/let.md)

    def stages(self, run):
        """The teacher, if it is not given, once for all seeds; then every variant."""
        config, variants = run.model_config(self.size), self.parse()
        taught = {kind for kind, _ in variants.values()} - {'baseline'}
        if taught and (run.toy or not self.teacher):
            theirs = run.model_config(self.teacher_size)
            X = theirs.num_params(head=True)
            found = yield Stage('teacher', theirs, self.teacher_tokens, X, once=True)
            teacher = Teacher(found.folder, found.name, theirs)
        elif taught:
            teacher = self.given_teacher(run, taught)
        for name, (kind, variant) in variants.items():
            stage = Stage(name, config, self.tokens, config.num_params(head=True))
            stage.labels = dict(variant=name)
            if kind != 'baseline':
                what = variant.objective(kind, teacher, config.n_layer)
                teach(stage, kind, teacher.name, *what)
            if kind == 'let' and variant.alignment != 'cosine':
                size = variant.micro_batch_size(run, config, teacher.config)
                stage.knobs = dict(micro_batch_size=size)
            yield stage

    def parse(self):
        """{variant: (its kind, the method with its knobs)}. Raises UserError."""
        found = {}
        for name in re.split(r',(?!\w+=)', ','.join(self.variants)):  # which configure() has split
            kind, *pairs = name.split(',')
            if kind not in KINDS:
                raise unknown('variant', kind, KINDS)
            settings = []
            for key, _, value in (pair.partition('=') for pair in pairs):
                settings.append((f'variant {name}', key, value))
            own = {key: LET.__annotations__[key] for key in KINDS[kind]}
            found[name] = kind, replace(self, **check(settings, own, {}))
        return found

    def given_teacher(self, run, taught):
        """The Teacher that is given, opened: damage is found before training. Raises UserError."""
        name, tokenizers = self.teacher, None
        if run.dry_run:
            return Teacher(name, name, planned_config(name))
        (corpus, *_), theirs = run.open_corpora(), tokenizer_in(name)
        ours = corpus.meta['tokenizer']
        if not same_tokenizer(ours, theirs):
            if taught - {'let'}:
                raise UserError(f'RKD and SALT need one tokenizer, not {ours} and that of {name}')
            for tokenizer in (ours, theirs):
                if encode_spans(PROBE, tokenizer)[1].sum() != len(PROBE):
                    raise UserError(f'{tokenizer} cannot be aligned: it changes bytes of a text')
            corpus, tokenizers = None, (ours, theirs)
        config = open_teacher(name, corpus).config
        check_tokenizer(theirs, config)
        return Teacher(name, name, config, tokenizers)

    def objective(self, kind, teacher, n_layer):
        """(a variant's objective, the teacher's parameters that it uses, what it is)."""
        theirs = teacher.config
        if kind != 'let':
            s_stop = self.s_stop if kind == 'salt' else 1.0
            settings = dict(alpha=self.alpha, temperature=self.temperature, s_stop=s_stop)
            params = theirs.num_params(head=True) if theirs else 0.0
            return distil(teacher.folder, **settings), params, settings
        layers = theirs.n_layer if theirs else 0
        ours, layer = pair_layers(self.pairing, layers, n_layer)
        how = Alignment(ours, layer, self.lambda0, self.s_stop, self.alignment, self.untrained)
        params = theirs.num_params() * layer / layers if theirs and self.lambda0 else 0.0
        return let_objective(teacher.folder, how, teacher.tokenizers), params, asdict(how)

    def micro_batch_size(self, run, config, theirs):
        """
        Sequences of which logsum and cca are, a micro-batch: the paper's of its 1.4B target. Raises
        UserError for too few positions, which correlate by chance.
        """
        size = run.micro_batch_size or math.gcd(16, run.batch_size)
        positions = size * min(run.block_size, config.block_size)
        needed = 10 * max(shape.n_embd for shape in (config, theirs) if shape)
        if self.alignment == 'cca' and positions < needed:
            raise UserError(f'cca needs {needed:,} positions in a micro-batch, not {positions:,}')
        return size

    def summary(self, results):
        """Validation losses, and each variant beside the baseline, paired by seed."""
        records, groups = compare_variants(results, 'baseline'), by_label(results, 'variant')
        for record in records:
            record |= against(groups[record['variant']], groups.get('baseline', []))
        return [records]


def against(runs, baseline):
    """
    The record of a variant's runs: the share of the steps after which they have the baseline's last
    loss, with its 95% interval; the similarity to the teacher at last, and that of the best
    constant vector.
    """
    others, record = {r.labels['seed']: r for r in baseline}, {}
    pairs = [(r, others[r.labels['seed']]) for r in runs if r.labels['seed'] in others]
    shares = [steps_to_loss(mean_curve([r]), b.val_loss) for r, b in pairs]
    if missed := shares.count(None):
        record['steps to its loss'] = f'not reached by {missed} of {len(shares)}'
    elif pairs:
        limits = interval(shares)
        low_high = '({:.2f} to {:.2f})'.format(*limits) if limits else ''
        record['steps to its loss'] = f'{statistics.mean(shares):.2f}x {low_high}'
    logged = [[m for m in read_metrics(r.folder) if 'similarity' in m][-1:] for r in runs]
    for name in ('similarity', 'constant_similarity') if all(logged) else ():
        record[name.replace('_', ' ')] = statistics.mean(line[name] for (line,) in logged)
    return record
