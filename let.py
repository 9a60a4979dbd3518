"""
Late-to-Early Training (LET): during early training steps, the early layers of a model learn from
the last layer of a trained model up to ten times smaller.

Paper: Zhao et al., Late-to-Early Training: LET LLMs Learn Earlier, So Faster and Better.

    python train.py config/let_tiny.py

With h_M the target's hidden state after layer k, h_T the teacher's after its last layer (before the
final norm, Eq. 3), and s the step, from 0:

    L = NLL + lambda L_proj,    lambda = lambda0 max(0, (S_stop - s) / S_stop)             (Eq. 5)
    L_proj = -cos(h_M, h_T), the mean over positions                                       (Eq. 4)

From step S_stop on, the teacher is not used. LET is compared with logit distillation,

    L = alpha NLL + (1 - alpha) T^2 KL(teacher / T || target / T)

throughout (RKD) or for the first S_stop steps (SALT, Rawat et al.). Each of these is an objective
that any stage of any method can use. extras/alignment.py measures, before training, what a pairing
of layers, or a teacher, would contribute.
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
from engine.report import (
    by_label,
    compare_variants,
    curve_panels,
    interval,
    mean_curve,
    steps_to_loss,
)
from engine.stage import Stage, next_token
from engine.teacher import lazy_teacher, open_teacher, planned_config
from model import GPTConfig

# ----------------------------------------------------------------------------------------------
# the idea


@dataclass
class Alignment:
    """What LET aligns, how strongly and for how long."""

    target_layer: int  # k, a layer of the target, from 1
    teacher_layer: int = 0  # a layer of the teacher, from 1; 0: its last
    lambda0: float = 0.1  # weight of L_proj at the first step
    s_stop: float = 1500.0  # step at which the weight reaches 0; up to 1: a fraction of all steps
    kind: str = 'cosine'  # L_proj: cosine, logsum or cca
    untrained: bool = False  # a control: the teacher's shape with fresh random weights


def let_objective(teacher, alignment, tokenizers=None, padded=False):
    """
    The objective of LET: (model, x, y, progress) -> (loss, count, scalars), for ids x and targets y
    (B, T) int64. teacher: a model folder or hub name, opened at the first batch, or a GPT;
    alignment: an Alignment; tokenizers: names, (the target's, the teacher's), if they differ;
    padded: leave positions after a sequence's last target, which are padding, out of L_proj. From
    S_stop on, and with lambda0 = 0, this is bit for bit next-token prediction, and the teacher is
    freed.
    """
    opened = lazy_teacher(teacher, alignment.untrained)

    def objective(model, x, y, progress):
        s, S_stop = progress.step, progress.step_of(alignment.s_stop)
        lam = alignment.lambda0 * max(0.0, S_stop - s) / (S_stop or 1.0)  # Eq. 5
        if not lam:
            opened.cache_clear()  # frees the teacher's memory
            return next_token(model, x, y, progress)
        with torch.no_grad():
            h_T, covered = teacher_states(opened(x.device), x, alignment.teacher_layer, tokenizers)
            if padded:  # True up to each row's last target: a cumulative sum from the right
                covered = (y != -100).flip(1).cumsum(1).flip(1) > 0
        output = model(x, y, hidden_at=alignment.target_layer)
        h_M = output.hidden
        if covered is not None:
            h_M, h_T = h_M[covered], h_T[covered]
        l_proj = alignment_loss(h_M, h_T, alignment.kind)  # Eq. 4
        with torch.no_grad():
            minus_cos = l_proj if alignment.kind == 'cosine' else alignment_loss(h_M, h_T)
            scalars = dict(data_loss=output.loss, alignment_loss=l_proj, similarity=-minus_cos)
            scalars['constant_similarity'] = constant_similarity(h_T)
        return output.loss + lam * l_proj, output.count, scalars

    return objective


# ----------------------------------------------------------------------------------------------
# L_proj of vectors (n, D) from the target and (n, D') from the teacher


def match_width(hidden, width):
    """
    Resample hidden vectors (..., D) to (..., width) by linear interpolation along the vector, which
    has no parameters and keeps both ends (Eq. 6): with u = j (D - 1) / (width - 1) and
    b = u - floor(u), coordinate j is (1 - b) h[floor(u)] + b h[floor(u) + 1].
    """
    D, n = hidden.shape[-1], max(1, width - 1)
    if D == width:
        return hidden
    j = torch.arange(width, device=hidden.device)
    low = j * (D - 1) // n  # floor(u), exact in integer arithmetic
    ends = hidden.index_select(-1, low), hidden.index_select(-1, (low + 1).clamp(max=D - 1))
    return torch.lerp(*ends, (j * (D - 1) % n).to(hidden.dtype) / n)


def cosine(target, teacher):
    """-cos, averaged over positions (Eq. 4). Eq. 7 sums; we take the mean, as the NLL does."""
    found = F.cosine_similarity(match_width(target, teacher.shape[-1]), teacher, dim=-1)
    return -found.sum() / max(1, len(found))  # not mean(): NaN without positions


def logsum(target, teacher):
    """
    log of sum |z_M - z_T|^4 over positions and features, z being the features standardised to mean
    0 and variance 1 over the micro-batch (Appendix H, after Miles and Mikolajczyk).
    """
    both = match_width(target, teacher.shape[-1]), teacher
    # batch norm without running statistics, gain or bias: it only standardises
    z_M, z_T = (F.batch_norm(x, None, None, training=True, eps=1e-4) for x in both)
    return (z_M - z_T).pow(4).sum().clamp(min=1e-12).log()  # no log 0 for equal vectors


def cca(target, teacher, ridge=1e-3):
    """
    -mean rho_i^2 of the canonical correlations rho_i (LET-CCA, Table 5), the singular values of
    Q_M^T Q_T, with Q R = X the QR decomposition of each model's centred vectors X. As in ridge
    regression, sqrt(r) times the identity is appended below X, r being `ridge` times the mean of
    X^T X's diagonal, so that R is invertible even if features are linearly dependent.
    """
    Q = []
    for x in (target - target.mean(0), teacher - teacher.mean(0)):
        below = (ridge * x.square().sum(0).mean()).sqrt().expand(x.shape[-1]).diag()
        Q.append(torch.linalg.qr(torch.cat((x, below))).Q[: len(x)])
    # |Q_M^T Q_T|_F^2 is the sum of the squared singular values: no SVD is needed
    return -(Q[0].mT @ Q[1]).square().sum() / min(target.shape[-1], teacher.shape[-1])


ALIGNMENTS = {'cosine': cosine, 'logsum': logsum, 'cca': cca}


def alignment_loss(target_hidden, teacher_hidden, kind='cosine'):
    """
    L_proj, a scalar, of hidden states (..., D) of the target and (..., D') of the teacher, computed
    in float32 or wider. kind: cosine, logsum or cca. The teacher receives no gradient.
    """
    both = vectors(target_hidden), vectors(teacher_hidden.detach())
    # autocast would run the matrix products in bfloat16
    with torch.autocast(target_hidden.device.type, enabled=False):
        return ALIGNMENTS[kind](*both)


def vectors(hidden):
    """Flatten hidden states (..., D) to vectors (n, D), in float32 or wider."""
    return hidden.flatten(0, -2).to(torch.promote_types(hidden.dtype, torch.float32))


def constant_similarity(teacher_hidden):
    """
    The mean cosine between teacher states (..., D') and the best constant vector: the similarity
    that a target reaches without using its input. That vector is the mean of the normalised states.
    """
    return F.normalize(vectors(teacher_hidden), dim=-1).mean(0).norm()


# ----------------------------------------------------------------------------------------------
# the teacher's hidden states


def teacher_states(teacher, x, layer=0, tokenizers=None):
    """
    Run a GPT on ids x (B, T) int64. Returns its states (B, T, D') after `layer` (from 1; 0: the
    last), before the final norm, and where a position has one: (B, T) bool, or None for all.
    tokenizers: names, (x's, the teacher's), if they differ; the text is then re-tokenised for the
    teacher, on the CPU. A teacher with a shorter context reads x in windows or, if re-tokenised,
    only the beginning of each text.
    """
    longest = teacher.config.block_size
    if tokenizers is None:
        windows = x.chunk(-(-x.shape[1] // longest), dim=1)  # as few as possible, of similar length
        return torch.cat([teacher.residual_stream(w, layer or None)[0] for w in windows], 1), None
    rows = [translate(row, *tokenizers) for row in x.cpu().numpy()]
    ids = [torch.tensor(found[:longest], device=x.device) for found, _ in rows]
    states, _ = teacher.residual_stream(pad_sequence(ids, batch_first=True), layer or None)
    place = torch.tensor(np.stack([place for _, place in rows]), device=x.device)
    covered = (place >= 0) & (place < longest)
    # gather needs valid indices: 0 for positions without a partner, which `covered` leaves out
    place = (place * covered)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, place), covered


# ----------------------------------------------------------------------------------------------
# logit distillation, to compare: RKD has a teacher throughout, SALT in the first steps only


def distil(teacher, alpha=0.6, temperature=1.0, s_stop=1.0, reverse=False):
    """
    The objective of logit distillation: (model, x, y, progress) -> (loss, count, scalars). teacher:
    a model folder, hub name or GPT; alpha: weight of the cross entropy on the data (Inheritune,
    Appendix C: 0.6 at T = 1); temperature: T; s_stop: step (up to 1: fraction of all steps) from
    which on it is next-token prediction (SALT's n_KD), 1: never (RKD); reverse: KL(student ||
    teacher) (Chain-of-Learngene, Eq. 1). Targets of -100, such as prompts, are excluded.
    """
    opened = lazy_teacher(teacher)

    def objective(model, x, y, progress):
        if progress.step >= progress.step_of(s_stop):
            opened.cache_clear()
            return next_token(model, x, y, progress)
        teacher_model = opened(x.device)
        with torch.no_grad():
            # not logits: the fused loss applies the teacher's head itself, a chunk at a time
            hidden = teacher_model.norm(teacher_states(teacher_model, x)[0])
        settings = (alpha, temperature, reverse)
        output = model(x, y, teacher=Distillation(hidden, teacher_model.head_weight, *settings))
        scalars = dict(data_loss=output.data_loss, distillation_loss=output.divergence)
        return output.loss, output.count, scalars

    return objective


def teacher_flops(params, s_stop=1.0):
    """
    Stage.more_flops of a teacher's forward passes: 2 FLOPs per parameter and token up to step
    `s_stop` (up to 1: a fraction of all steps). params: the teacher's weights that are used.
    """

    def flops(progress, step_tokens):
        taught = min(progress.step, math.ceil(progress.step_of(s_stop)))
        return 2.0 * params * taught * step_tokens

    return flops


def teach(stage, kind, teacher, objective, params, settings):
    """
    Set the objective of a stage and the compute of its teacher. kind, teacher, settings: names of
    the objective and the teacher, and knobs, which identify the stage; params: the teacher's
    weights that are used, at 2 FLOPs each per token of the target; 0: unknown, not counted.
    """
    stage.objective = objective
    stage.teaching = dict(objective=kind, teacher=teacher, **settings, teacher_params=params)
    stage.more_flops = teacher_flops(params, settings.get('s_stop', 1.0))


# ----------------------------------------------------------------------------------------------
# the method

KINDS = {  # kind of a variant: the knobs that it can set for itself (let,lambda0=10)
    'baseline': (),
    'let': ('lambda0', 's_stop', 'pairing', 'alignment', 'untrained'),
    'rkd': ('alpha', 'temperature'),
    'salt': ('alpha', 'temperature', 's_stop'),
}
PROBE = (
    'A naïve café — 数学 and 🙂:\n\tdef f(x): return x  # 1234'.encode()
)  # must survive encoding byte for byte, or positions of two tokenizers cannot be matched


def pair_layers(pairing, teacher_layers, target_layers):
    """
    (the target's layer, the teacher's), from 1. L2E pairs the teacher's last layer with the
    target's early one; M stands for the middle layer (Figures 3 and 4). LiFj counts the teacher's
    layers from its last and the target's from its first: L1F3 is the last with the third
    (Figure 12). Early is the third layer, as in the paper, or the middle one of a target with fewer
    than five. teacher_layers 0: not known. Raises UserError for layers that do not exist.
    """
    match = re.fullmatch(r'([LM])2([EML])|L([1-9]\d*)F([1-9]\d*)', pairing)
    if not match:
        raise unknown('pairing', pairing, ['L2E', 'M2L', 'L1F3'])
    teacher_layer, target_layer, from_last, counted = match.groups()
    middle = (target_layers + 1) // 2
    if counted:
        target_layer, teacher_layer = int(counted), teacher_layers + 1 - int(from_last)
    else:
        target_layer = dict(E=min(3, middle), M=middle, L=target_layers)[target_layer]
        teacher_layer = teacher_layers if teacher_layer == 'L' else (teacher_layers + 1) // 2
    if target_layer > target_layers or teacher_layer < 1 <= teacher_layers:
        depths = f'the target has {target_layers} layers, the teacher {teacher_layers}'
        raise UserError(f'{pairing}: {depths}')
    return target_layer, teacher_layer


class Teacher(NamedTuple):
    """The teacher of all variants."""

    folder: str  # model folder or hub name
    name: str  # for the report: that of the stage which trained it, else as given
    config: GPTConfig | None  # None if a dry run does not know it
    tokenizers: tuple | None = None  # names of the target's and the teacher's, if they differ


@dataclass
class LET:
    """Late-to-Early Training (Zhao et al.) and its baselines, at equal steps."""

    size: str = '64x4'  # target model
    tokens: Positive = 1e6  # training tokens of each target model
    teacher: str = ''  # model folder or hub name; empty: train one of teacher_size first
    teacher_size: str = '48x2'  # size of the teacher that is trained first
    teacher_tokens: Positive = 3e6  # training tokens of that teacher
    variants: tuple[str, ...] = ('let',)  # baseline, let, rkd, salt; let,lambda0=10,pairing=L2M
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 1500.0  # step at which LET and SALT end; up to 1: fraction of all steps
    pairing: str = 'L2E'  # L2E, L2M, L2L, M2E, M2M, M2L, or such as L1F3
    alignment: Literal[*ALIGNMENTS] = 'cosine'  # the form of L_proj
    untrained: bool = False  # a control: the teacher's shape with fresh random weights
    alpha: Fraction = 0.5  # RKD and SALT: weight of the data; 1 - alpha: of the teacher; our choice
    temperature: Positive = 1.0  # RKD and SALT: T; also our choice (docs/let.md)

    def stages(self, run):
        """
        Yield the teacher, unless given, trained once for all seeds; then every variant. `yield`
        hands a stage to train.py and is sent back its Result.
        """
        config, variants = run.model_config(self.size), self.parse()
        taught = {kind for kind, _ in variants.values()} - {'baseline'}
        if taught and (run.toy or not self.teacher):
            teacher_config = run.model_config(self.teacher_size)
            X = teacher_config.num_params(head=True)
            found = yield Stage('teacher', teacher_config, self.teacher_tokens, X, once=True)
            teacher = Teacher(found.folder, found.name, teacher_config)
        elif taught:
            teacher = self.given_teacher(run, taught)
        for name, (kind, variant) in variants.items():
            stage = Stage(name, config, self.tokens, config.num_params(head=True))
            stage.labels = dict(variant=name)
            if kind != 'baseline':
                what = variant.objective(kind, teacher, config.n_layer)
                teach(stage, kind, teacher.name, *what)
            # the value of logsum and cca depends on the size of the micro-batch
            if kind == 'let' and variant.alignment != 'cosine':
                size = variant.micro_batch_size(run, config, teacher.config)
                stage.knobs = dict(micro_batch_size=size)
            yield stage

    def parse(self):
        """
        {name of a variant: (its kind, a copy of this method with its knobs)}. Raises UserError for
        unknown kinds and knobs.
        """
        found = {}
        # configure() split at all commas: join again, and split at those not followed by KEY=
        for name in re.split(r',(?!\w+=)', ','.join(self.variants)):
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
        """
        The Teacher that `teacher` names; opened once, so that a damaged one fails before training.
        Raises UserError for that, and for tokenizers that do not fit.
        """
        name = self.teacher
        if run.dry_run:
            return Teacher(name, name, planned_config(name))
        corpus, *_ = run.open_corpora()
        tokenizers = corpus.meta['tokenizer'], tokenizer_in(name)
        if differ := not same_tokenizer(*tokenizers):
            if taught - {'let'}:
                raise UserError(f'RKD and SALT need one tokenizer, not {" and ".join(tokenizers)}')
            for tokenizer in tokenizers:
                if encode_spans(PROBE, tokenizer)[1].sum() != len(PROBE):
                    raise UserError(f'{tokenizer} cannot be aligned: it changes bytes of a text')
        # without a corpus, its tokenizer is not compared with the teacher's
        config = open_teacher(name, None if differ else corpus).config
        check_tokenizer(tokenizers[1], config)
        return Teacher(name, name, config, tokenizers if differ else None)

    def objective(self, kind, teacher, n_layer):
        """
        (objective, how many of the teacher's weights it uses, settings for the report) of a
        variant. kind: let, rkd or salt; n_layer: of the target.
        """
        shape = teacher.config
        if kind != 'let':
            s_stop = self.s_stop if kind == 'salt' else 1.0
            settings = dict(alpha=self.alpha, temperature=self.temperature, s_stop=s_stop)
            params = shape.num_params(head=True) if shape else 0.0
            return distil(teacher.folder, **settings), params, settings
        layers = shape.n_layer if shape else 0
        k, layer = pair_layers(self.pairing, layers, n_layer)
        how = Alignment(k, layer, self.lambda0, self.s_stop, self.alignment, self.untrained)
        # layers above the aligned one do not run, nor does the head
        params = shape.num_params() * layer / layers if shape and self.lambda0 else 0.0
        return let_objective(teacher.folder, how, teacher.tokenizers), params, asdict(how)

    def micro_batch_size(self, run, config, teacher_config):
        """
        Sequences in a micro-batch, over which logsum and cca take their statistics: the run's, else
        gcd(16, batch_size), as 16 is the paper's for its 1.4B target (Appendix B). Raises UserError
        if cca has too few positions: they correlate by chance.
        """
        size = run.micro_batch_size or math.gcd(16, run.batch_size)
        positions = size * min(run.block_size, config.block_size)
        width = max(shape.n_embd for shape in (config, teacher_config) if shape)
        needed = 10 * width  # positions per feature
        if self.alignment == 'cca' and positions < needed:
            raise UserError(f'cca needs {needed:,} positions in a micro-batch, not {positions:,}')
        return size

    def summary(self, results):
        """Records of validation losses, each variant compared with the baseline, paired by seed."""
        records, groups = compare_variants(results, 'baseline'), by_label(results, 'variant')
        for record in records:
            record |= against(groups[record['variant']], groups.get('baseline', []))
        return [records, ('losses.png', curve_panels(groups))]


def against(runs, baseline):
    """
    Columns of a variant's record: the fraction of its steps after which it reaches the baseline's
    final loss, a mean over seeds with its 95% interval; its final similarity to the teacher, and
    that of the best constant vector.
    """
    others, record = {r.labels['seed']: r for r in baseline}, {}
    pairs = [(r, others[r.labels['seed']]) for r in runs if r.labels['seed'] in others]
    shares = [steps_to_loss(mean_curve([r]), b.val_loss) for r, b in pairs]
    if missed := shares.count(None):
        record["steps to the baseline's loss"] = f'not reached by {missed} of {len(shares)}'
    elif pairs:
        limits = interval(shares)
        low_high = '({:.2f} to {:.2f})'.format(*limits) if limits else ''
        record["steps to the baseline's loss"] = f'{statistics.mean(shares):.2f}x {low_high}'
    logged = [[m for m in read_metrics(r.folder) if 'similarity' in m][-1:] for r in runs]
    for name in ('similarity', 'constant_similarity') if all(logged) else ():
        record[name.replace('_', ' ')] = statistics.mean(line[name] for (line,) in logged)
    return record
