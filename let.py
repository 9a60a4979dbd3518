"""
Learning from a teacher: Late-to-Early Training, in which a trained model up to ten times smaller
guides the early layers of the target model in its early steps; and logit distillation.

Paper: Zhao et al., Late-to-Early Training: LET LLMs Learn Earlier, So Faster and Better.

    python train.py config/let_tiny.py

    loss = CE + lambda L_proj,   lambda = lambda0 max(0, (S_stop - s) / S_stop)          (Eq. 5)
    L_proj = -cos(target's hidden state after layer k, teacher's after its last)         (Eq. 4)
    loss = alpha CE + (1 - alpha) T^2 KL(teacher / T || target / T)                distillation

From step S_stop the teacher is gone. Distillation throughout is RKD, for the first S_stop steps
SALT (Rawat et al.). Both are objectives that any stage of any method can have.
"""

import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from configurator import Count, Fraction, NonNegative, Positive
from data.corpus import check_vocabulary, open_corpus
from data.translate import check_alignable, translate
from data.vocabulary import same_tokenizer, tokenizer_of_model
from engine.errors import UserError, unknown
from engine.loss import Distillation, kl_of_logits
from engine.metrics import read_metrics
from engine.report import (
    Line,
    Panel,
    by_label,
    compare_variants,
    format_si,
    mean_curve,
    steps_to_loss,
)
from engine.stage import Stage, next_token
from engine.teacher import LazyTeacher, hidden_states, in_windows, longest_context, open_teacher
from model import GPT

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


def logsum(target, teacher, covered):
    """
    log of the mean over positions of sum |difference|^4 between unit vectors (Appendix H, after
    Miles and Mikolajczyk): what differs most counts most.
    """
    target = F.normalize(match_width(target, teacher.shape[-1]), dim=-1)
    difference = (target - F.normalize(teacher, dim=-1)).pow(4).sum(-1)
    return (mean_over(difference, covered) + 1e-12).log()


def cca(target, teacher, covered, ridge=1e-3):
    """
    Minus the mean squared canonical correlation of the two sets of vectors, of any widths (Table
    5). Needs more positions than dimensions.
    """
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


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """T^2 KL(teacher / T || student / T) of logits (..., V), in nats, the mean over positions."""
    teacher = teacher_logits.detach() / temperature
    student = student_logits / temperature
    return temperature**2 * kl_of_logits(teacher, student).mean()


def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) of logits (..., V) in nats, the mean over positions."""
    return kl_of_logits(student_logits, teacher_logits.detach()).mean()


# ----------------------------------------------------------------------------------------------
# objectives: (model, x, y, progress) -> (loss, scalars)


@dataclass
class Alignment:
    """What LET aligns, how strongly and for how long."""

    target_layer: int  # k, from 1
    teacher_layer: int = 0  # 0: its last
    lambda0: float = 0.1  # weight of L_proj at the first step
    s_stop: float = 1500.0  # the step at which it reaches zero; below 1: a fraction of all steps
    kind: str = 'cosine'


def let(teacher, alignment, tokenizers=None):
    """
    The objective of Late-to-Early Training. teacher: a model folder or hub name, opened at the
    first batch, or a callable ids -> hidden states (B, T, D). From S_stop on, and with lambda0 = 0,
    it is exactly next-token prediction, and the teacher is freed. tokenizers: the names of (the
    student's, the teacher's) if they differ; then every batch's ids visit the host.
    """
    lazy = LazyTeacher(teacher)

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
        similarity = -l_proj
        if alignment.kind != 'cosine':
            similarity = cosine_similarity(output.hidden.detach(), theirs, covered)
        scalars = dict(data_loss=output.loss, alignment_loss=l_proj, similarity=similarity)
        scalars['alignment_weight'] = torch.full((), weight, device=x.device)
        return output.loss + weight * l_proj, scalars

    return objective


def teacher_states(x, teacher, layer, tokenizers):
    """The teacher's hidden state for each position of x (B, T), and which have one, None: all."""
    hidden = hidden_states(teacher, layer)
    longest = longest_context(teacher)
    if tokenizers is None:
        return in_windows(hidden, x, longest), None
    found = translate(x.cpu().numpy(), *tokenizers, longest)
    ids, place, covered = (torch.from_numpy(array).to(x.device) for array in found)
    states = hidden(ids)
    return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1])), covered


def distil(teacher, alpha=0.6, temperature=1.0, s_stop=None, reverse=False):
    """
    The objective of logit distillation from a model folder, hub name or GPT. alpha: weight of the
    data (Inheritune, Appendix C: 0.6 at T = 1). s_stop: from this step (below 1: fraction of all)
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
        return output.loss, scalars

    return objective


def teach(stage, teacher, alignment, tokenizers=None):
    """Give a stage the objective of LET; teacher: a model folder or hub name."""
    stage.objective = let(teacher, alignment, tokenizers)
    stage.teaching = dict(objective='let', teacher=Path(teacher).name, **asdict(alignment))


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


@dataclass
class LET:
    """Late-to-Early Training (Zhao et al.) and what it is compared with, at equal steps."""

    size: str = '64x4'  # target model
    tokens: Positive = 1e6  # training tokens of each target model
    teacher: str = ''  # model folder or hub name; empty: train one of teacher_size first
    teacher_size: str = '48x2'  # of the teacher that is trained first
    teacher_tokens: Positive = 3e6  # training tokens of that teacher
    variants: tuple[str, ...] = ('let',)  # baseline, rkd, salt, let, let+0.3, let+L2M, let+logsum
    lambda0: NonNegative = 0.1  # weight of L_proj at the first step
    s_stop: NonNegative = 1500.0  # step at which LET and SALT end; below 1: fraction of all steps
    pairing: str = 'L2E'  # L2E, L2M, L2L, M2E, M2M, M2L, or such as L1F3
    alignment: Literal[*ALIGNMENTS] = 'cosine'  # L_proj
    alpha: Fraction = 0.5  # RKD and SALT: weight of the data; the rest is the teacher's
    temperature: Positive = 1.0  # RKD and SALT
    seeds: Count = 1  # runs of every variant, each with its own initialisation and data order

    def stages(self, run):
        """The teacher, if it is not given; then for every seed every variant."""
        config = run.model_config(self.size)
        teacher_config = run.model_config(self.teacher_size)
        layers, tokenizers = teacher_config.n_layer, None
        given = self.teacher and not run.toy
        if given and run.dry_run:
            layers = UNKNOWN_LAYERS  # a plan opens no teacher
        elif given:
            layers, tokenizers = self.examine(run)
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise UserError(f'variants={",".join(self.variants)} must be different ones')
        alignments = {v: self.parse(v, layers, config.n_layer) for v in self.variants}
        teacher = self.teacher
        if not given:
            X = teacher_config.num_params(head=True)
            taught = yield Stage('teacher', teacher_config, self.teacher_tokens, X)
            teacher = taught.folder
        for seed in range(self.seeds):
            for variant, alignment in alignments.items():
                stage = Stage(
                    f'{variant}-{seed}', config, self.tokens, config.num_params(head=True)
                )
                stage.knobs = dict(seed=run.seed + seed)
                stage.labels = dict(variant=variant, seed=seed)
                if alignment:
                    teach(stage, teacher, alignment, tokenizers)
                elif variant != 'baseline':
                    self.distil(stage, variant, teacher)
                if given and stage.teaching:  # its path: a name alone could be another teacher's
                    stage.teaching['teacher'] = self.teacher
                yield stage

    def parse(self, variant, teacher_layers, target_layers):
        """The Alignment of a variant, None for the baselines. Raises UserError for others."""
        name, *parts = variant.split('+')
        if name in ('baseline', 'rkd', 'salt') and not parts:
            return None
        if name != 'let':
            known = ('baseline', 'rkd', 'salt', 'let', 'let+0.3', 'let+L2M', 'let+logsum')
            raise unknown('variant', variant, known)
        lambda0, kind, pairing = self.lambda0, self.alignment, self.pairing
        for part in parts:
            if re.fullmatch(r'\d+(\.\d+)?', part):
                lambda0 = float(part)
            elif part in ALIGNMENTS:
                kind = part
            else:
                pairing = part
        ours, theirs = pair_layers(pairing, teacher_layers, target_layers)
        return Alignment(ours, theirs, lambda0, self.s_stop, kind)

    def distil(self, stage, variant, teacher):
        """Give a stage the objective of RKD or SALT."""
        s_stop = self.s_stop if variant == 'salt' else None
        settings = dict(alpha=self.alpha, temperature=self.temperature, s_stop=s_stop)
        stage.objective = distil(teacher, **settings)
        stage.teaching = dict(objective=variant, teacher=Path(teacher).name, **settings)

    def examine(self, run):
        """(layers of a given teacher, the two tokenizers if they differ). Raises UserError."""
        model = open_teacher(self.teacher)
        corpus = open_corpus(next(iter(run.corpora)), run.data_dir)
        ours = theirs = corpus.meta['tokenizer']
        try:
            theirs = tokenizer_of_model(self.teacher)
        except UserError:
            check_vocabulary(corpus, model.config, self.teacher)
            print(f'{self.teacher} does not name its tokenizer; assuming {ours}, as the corpus')
        layers = getattr(model.config, 'n_layer', None) or model.config.num_hidden_layers
        distilling = {'rkd', 'salt'} & set(self.variants)
        if distilling and not isinstance(model, GPT):
            raise UserError(f'RKD and SALT need a model that load() opens, not {self.teacher}')
        if same_tokenizer(ours, theirs):
            if distilling:
                check_vocabulary(corpus, model.config, self.teacher)
            return layers, None
        if distilling:
            names = f'the corpus has {ours}, {self.teacher} {theirs}'
            raise UserError(f'RKD and SALT need one tokenizer: {names}')
        check_alignable(ours, theirs)
        return layers, (ours, theirs)

    def summary(self, results):
        """Losses against the baseline, steps to its last loss, and similarity to the teacher."""
        records, blocks = compare_variants(results, 'baseline'), []
        groups = by_label(results, 'variant')
        baseline = [r.val_loss for r in groups.get('baseline', [])]
        panel = Panel('step', 'cosine similarity to the teacher')
        for record in records:
            runs = groups[record['variant']]
            if baseline:
                share = steps_to_loss(mean_curve(runs), statistics.mean(baseline))
                reached = 'not reached' if share is None else f'{share:.2f}x'
                record['steps to its loss'] = reached
            for result in runs:
                lines = [m for m in read_metrics(result.folder) if 'similarity' in m]
                if lines:
                    record.setdefault('similarity', lines[-1]['similarity'])
                    steps = [m['step'] for m in lines]
                    values = [m['similarity'] for m in lines]
                    panel.lines.append(Line(steps, values, result.name))
        for result in results:
            if result.name == 'teacher':
                flops = format_si(result.flops)
                blocks.append(f'teacher: {result.val_loss:.4f} after {flops}FLOPs')
        blocks.append(records)
        if panel.lines:
            blocks.append(('similarity.png', [panel]))
        return blocks
