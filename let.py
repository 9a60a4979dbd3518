"""
Learning from a teacher: objectives that add a trained model to the loss, for the stages of any method; and Late-to-Early
Training (Zhao et al., paper 002), in which the teacher may be ten times smaller than its student, the target model.

    loss = CE + lambda L_proj,    lambda = lambda0 max(0, (S_stop - s) / S_stop)                          LET (Eq. 5)
    L_proj = -cos(the target's hidden state after an early layer k, the teacher's after its last)         (Eq. 4)
    loss = alpha CE + (1 - alpha) T^2 KL(teacher / T || target / T)                                       distillation

The teacher's late layers guide the target's early layers in the early steps: from step S_stop on the teacher is gone. With
distillation throughout it is RKD, for the first S_stop steps SALT (Rawat et al.).
"""
import re
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import Stage, UserError, check_ranges, next_token, read_json, unknown
from data.loader import open_corpus
from data.prepare import tokenizer_of_model
from data.translate import check_alignable, same_tokenizer, translate
from evaluate import human, mean_and_spread, pyplot, read_metrics, table
from head import head_loss
from hugging_face import FAMILIES, model_folder
from model import GPT, load

# ---------------------------------------------------------------------------------------------------------------------
# losses


def match_width(hidden, width):
    """
    Hidden vectors (..., D) as (..., width): linear interpolation along the vector with both ends kept (Eq. 6); no parameters.
    Coordinate j is read at u = j (D - 1) / (width - 1), between the coordinates floor(u) and floor(u) + 1.
    """
    if hidden.shape[-1] == width:
        return hidden
    u = torch.arange(width, dtype=torch.float64, device=hidden.device) * ((hidden.shape[-1] - 1) / max(1, width - 1))
    low = u.floor().long().clamp(max=max(0, hidden.shape[-1] - 2))
    beta, shape = (u - low).to(hidden.dtype), (*hidden.shape[:-1], width)
    high = (low + 1).clamp(max=hidden.shape[-1] - 1)
    return torch.lerp(hidden.gather(-1, low.expand(shape)), hidden.gather(-1, high.expand(shape)), beta)


def _mean(values, covered):
    """Mean over positions, or over those that are covered."""
    return values.mean() if covered is None else (values * covered).sum() / covered.sum().clamp(min=1)


def cosine(target, teacher, covered=None):
    """Mean cosine similarity of hidden vectors (..., D) and (..., D')."""
    target, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (target, teacher))
    return _mean(F.cosine_similarity(match_width(target, teacher.shape[-1]), teacher, dim=-1), covered)


def _logsum(target, teacher, covered):
    """log of the mean over positions of sum |difference|^4 between unit vectors: what differs most counts most."""
    target = F.normalize(match_width(target, teacher.shape[-1]), dim=-1)
    difference = (target - F.normalize(teacher, dim=-1)).pow(4).sum(-1)
    return (_mean(difference, covered) + 1e-12).log()


def _cca(target, teacher, covered, ridge=1e-3):
    """- the mean squared canonical correlation of the two sets of vectors; needs more positions than dimensions."""
    weight = torch.ones(target.shape[:-1], dtype=target.dtype, device=target.device) if covered is None else covered.to(target.dtype)
    weight, sides = weight.flatten()[:, None], []
    for x in (target, teacher):
        x = x.flatten(0, -2)
        x = (x - (x * weight).sum(0) / weight.sum()) * weight
        covariance = x.T @ x
        damped = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
        factor, _ = torch.linalg.cholesky_ex(damped)   # unlike cholesky, this one does not wait for the GPU
        sides.append(torch.linalg.solve_triangular(factor, x.T, upper=False))   # whitened: (D, n)
    return -(sides[0] @ sides[1].T).square().sum() / min(len(side) for side in sides)


ALIGNMENTS = {'cosine': lambda target, teacher, covered: -cosine(target, teacher, covered), 'logsum': _logsum, 'cca': _cca}


def alignment_loss(target_hidden, teacher_hidden, kind='cosine', covered=None):
    """
    L_proj of the target's hidden states (..., D) and the teacher's (..., D'), the mean over positions, in float32 at least:
    cosine (Eq. 4 and 7; the sum over positions of Eq. 7 is taken as a mean, as the cross entropy beside it), logsum (Appendix
    H, after Miles and Mikolajczyk, whose exponent is 4) or cca (Table 5: the mean squared canonical correlation, any widths).
    covered: (...) True where a position has a partner; None: everywhere. No gradient goes to the teacher.
    """
    target, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (target_hidden, teacher_hidden.detach()))
    with torch.autocast(target.device.type, enabled=False):
        return ALIGNMENTS[kind](target, teacher, covered)


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """
    T^2 KL(teacher || student) of the distributions softened by the temperature T, in nats, the mean over positions. Logits
    (..., V) of both; float32 inside. The gradient goes to the student alone. (head_loss does the same without logits.)
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).log_softmax(-1)
    return temperature ** 2 * (teacher.exp() * (teacher - student)).sum(-1).mean()


def reverse_kl(student_logits, teacher_logits):
    """KL(student || teacher) in nats, the mean over positions (paper 004, Eq. 1): keep to what the teacher finds likely."""
    student, teacher = student_logits.float().log_softmax(-1), teacher_logits.detach().float().log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# teachers

def is_ours(name):
    """Whether load() knows the architecture of a folder or hub name; it also has the words for a folder without a model."""
    path = model_folder(name) / 'config.json'
    config = read_json(path) if path.is_file() else {}
    return not config or 'nanofamily' in config or config.get('model_type') in FAMILIES


def open_teacher(name, device='cpu'):
    """
    The frozen model in a folder or of that name on the hub, in bfloat16 where that is what is computed in: ours, if load()
    knows its architecture, else transformers' (without a head). Raises UserError.
    """
    device = torch.device(device)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    if is_ours(name):
        return load(name, device).to(dtype).eval().requires_grad_(False)
    return transformers_model(name, 'AutoModel', dtype).to(device).eval().requires_grad_(False)


def transformers_model(name, kind, dtype=torch.float32):
    """A model of an architecture that only transformers knows, by its class `kind` (AutoModel: no head). Raises UserError."""
    try:
        import transformers
    except ImportError:
        raise UserError(f'{name} is of an architecture that needs transformers: pip install -r requirements-extras.txt') from None
    try:
        return getattr(transformers, kind).from_pretrained(model_folder(name), use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{name} cannot be opened by transformers: {str(error).splitlines()[0]}') from error


def hidden_states(teacher, layer=0):
    """
    ids (B, T) -> hidden states (B, T, D) of a teacher, after `layer` (0: its last) and before the final norm; transformers
    normalises its last. A teacher that is neither our model nor transformers' is called as it is.
    """
    if isinstance(teacher, GPT):
        return lambda idx: teacher.residual_stream(idx, layers=layer or None)[0]
    if hasattr(teacher, 'config') and hasattr(teacher, 'get_input_embeddings'):
        return lambda idx: teacher(idx, use_cache=False, output_hidden_states=bool(layer))[
            'hidden_states' if layer else 'last_hidden_state'][layer if layer else slice(None)]
    return teacher


def in_windows(hidden, idx, longest):
    """hidden(idx) of a teacher that reads `longest` positions at once, in equal windows if idx (B, T) has more."""
    if idx.shape[1] <= longest:
        return hidden(idx)
    windows = -(-idx.shape[1] // longest)
    return torch.cat([hidden(part) for part in idx.split(-(-idx.shape[1] // windows), dim=1)], 1)


def longest_context(teacher):
    """Positions a teacher reads at once."""
    config = getattr(teacher, 'config', None)
    return getattr(config, 'block_size', None) or getattr(config, 'max_position_embeddings', None) or 2 ** 30


# ---------------------------------------------------------------------------------------------------------------------
# objectives: (model, x, y, progress) -> (loss, scalars)

def let(teacher, target_layer, teacher_layer=0, strength=0.1, stop=1500.0, kind='cosine', tokenizers=None):
    """
    The objective of Late-to-Early Training. teacher: a model folder or hub name, opened when the first batch comes, or any
    callable ids -> hidden states (B, T, D). Target layer k from 1; teacher_layer 0: its last. strength: lambda0, decaying
    linearly to zero at step `stop` (below 1: of all steps). From there on, and at strength 0, this is next-token prediction to
    the bit, and the teacher is forgotten. tokenizers: (the student's, the teacher's) names where they differ; then the ids of
    every batch go to the host and back.
    """
    opened = []

    def objective(model, x, y, progress):
        weight = strength * (1 - progress.after(stop))
        if weight <= 0:
            opened.clear()
            return next_token(model, x, y, progress)
        if not opened:
            opened.append(open_teacher(teacher, x.device) if isinstance(teacher, (str, Path)) else teacher)
        with torch.no_grad():
            theirs, covered = _partner_states(opened[0], teacher_layer, x, tokenizers)
        output = model(x, y, hidden_at=target_layer)
        alignment = alignment_loss(output.hidden, theirs, kind, covered)
        similarity = -alignment if kind == 'cosine' else cosine(output.hidden.detach(), theirs, covered)
        scalars = dict(data_loss=output.loss, alignment_loss=alignment, similarity=similarity,
                       alignment_weight=torch.full((), weight, device=x.device))
        return output.loss + weight * alignment, scalars
    return objective


def _partner_states(teacher, layer, x, tokenizers):
    """The teacher's hidden state for each position of x (B, T), (B, T, D); and which positions have one, None: all."""
    hidden, longest = hidden_states(teacher, layer), longest_context(teacher)
    if tokenizers is None:
        return in_windows(hidden, x, longest), None
    ids, place, covered = (torch.from_numpy(a).to(x.device) for a in translate(x.cpu().numpy(), *tokenizers, longest))
    states = hidden(ids)
    return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1])), covered


def distil(teacher, alpha=0.6, temperature=1.0, stop=None, reverse=False):
    """
    The objective of logit distillation from a model folder or hub name, opened when the first batch comes. alpha is the weight
    of the data, 1 - alpha that of the teacher (paper 003, Appendix D: 0.6 at temperature 1). stop: the step (below 1: of all
    steps) from which on it is next-token prediction, and the teacher forgotten (SALT's n_KD); None: never (RKD). reverse:
    KL(student || teacher) in place of KL(teacher || student) (paper 004, Eq. 1). Both heads are applied chunk by chunk: full
    logits are never there. Positions whose target is -100, prompts, do not count.
    """
    opened = []

    def objective(model, x, y, progress):
        if stop is not None and progress.after(stop) >= 1:
            opened.clear()
            return next_token(model, x, y, progress)
        if not opened:
            opened.append(open_teacher(teacher, x.device) if isinstance(teacher, (str, Path)) else teacher)
        theirs = opened[0]
        with torch.no_grad():
            hidden = in_windows(lambda idx: theirs.norm(theirs.residual_stream(idx)[0]), x, longest_context(theirs))
        output = model(x, y, loss=partial(head_loss, teacher=(hidden, theirs.head_weight), alpha=alpha,
                                          temperature=temperature, reverse=reverse))
        return output.loss, dict(zip(('data_loss', 'distillation_loss'), output.parts))
    return objective


# ---------------------------------------------------------------------------------------------------------------------
# the method

PAIRINGS = ('L2E', 'L2M', 'L2L', 'M2E', 'M2M', 'M2L')   # the teacher's last or middle to the target's early, middle or last


def pair_layers(pairing, teacher_layers, target_layers):
    """
    (the teacher's layer, the target's), from 1, of one of PAIRINGS (Figures 3 and 4), or of a pair such as L1F3, the first
    from the teacher's last and the third of the target's first (Figure 12). Early is the third layer, as in the paper, or
    the middle of a target of fewer than six. Raises UserError for what is not there.
    """
    if pairing in PAIRINGS:
        theirs = {'L': teacher_layers, 'M': max(1, teacher_layers // 2)}[pairing[0]]
        return theirs, {'E': min(3, max(1, target_layers // 2)), 'M': max(1, target_layers // 2), 'L': target_layers}[pairing[2]]
    match = re.fullmatch(r'L([1-9]\d*)F([1-9]\d*)', pairing)
    if not match:
        raise unknown('pairing', pairing, [*PAIRINGS, 'L1F3 (first from the last of the teacher, third of the target)'])
    theirs, ours = teacher_layers + 1 - int(match[1]), int(match[2])
    for which, layer, layers in (('teacher', theirs, teacher_layers), ('target model', ours, target_layers)):
        if not 1 <= layer <= layers:
            raise UserError(f'{pairing}: the {which} has {layers} layers, there is no layer {layer}')
    return theirs, ours


@dataclass
class LET:
    """Late-to-Early Training (Zhao et al., paper 002), and what it is compared with, at equal steps."""
    size: str = '64x4'                 # target model
    tokens: float = 1e6                # training tokens of each target model
    teacher: str = ''                  # model folder or hub name; empty: train one of teacher_size first
    teacher_size: str = '48x2'         # of the teacher that is trained first
    teacher_tokens: float = 3e6        # training tokens of that teacher
    arms: tuple[str, ...] = ('let',)   # baseline, rkd, salt, let; or let with other settings: let+0.3, let+L2M, let+logsum
    strength: float = 0.1              # lambda0, weight of the alignment at the first step
    stop: float = 1500.0               # S_stop, where it reaches zero, and where SALT ends; steps, below 1: of all steps
    pairing: str = 'L2E'               # L2E, L2M, L2L, M2E, M2M, M2L (teacher's last or middle, target's), or such as L1F3
    alignment: str = 'cosine'          # cosine, logsum or cca
    alpha: float = 0.5                 # RKD and SALT: weight of the data; the rest is the teacher's
    temperature: float = 1.0           # RKD and SALT
    seeds: int = 1                     # runs of every arm, each with its own initialisation and data order

    def stages(self, run):
        """The teacher, if it is not given; then for every seed every arm."""
        check_ranges(self, tokens=(1, None), teacher_tokens=(1, None), strength=(0, None), stop=(0, None), alpha=(0, 1),
                     temperature=(1e-6, None), seeds=(1, None))
        config, given = run.model_config(self.size), self.teacher and not run.toy
        settings = {arm: self.settings(arm) for arm in self.arms}
        if len(settings) < len(self.arms) or not settings:
            raise UserError(f'arms={",".join(self.arms)} must be some, and different ones')
        if given:
            folder, (layers, tokenizers) = self.teacher, self.examine(run) if not run.dry_run else (None, None)
        else:
            small = run.model_config(self.teacher_size)
            layers, tokenizers = small.n_layer, None
        pairs = {arm: pair_layers(how['pairing'], layers, config.n_layer) if layers else (0, 1)
                 for arm, how in settings.items() if how}   # complain before anything is trained
        if not given:
            taught = yield Stage('teacher', small, self.teacher_tokens, small.num_params(head=True))
            folder = taught.folder
        for seed in range(self.seeds):
            for arm, how in settings.items():
                yield Stage(f'{arm}-{seed}', config, self.tokens, config.num_params(head=True),
                            knobs=dict(seed=run.seed + seed), **self.lesson(arm, how, folder, pairs.get(arm), tokenizers))

    def settings(self, arm):
        """What an arm changes: {} for the baselines. Raises UserError for one that does not exist."""
        name, *parts = arm.split('+')
        if name in ('baseline', 'rkd', 'salt') and not parts:
            return {}
        if name != 'let':
            raise unknown('arm', arm, ('baseline', 'rkd', 'salt', 'let', 'let+0.3', 'let+L2M', 'let+logsum'))
        how = dict(strength=self.strength, pairing=self.pairing, kind=self.alignment)
        for part in parts:
            if re.fullmatch(r'\d+(\.\d+)?', part):
                how['strength'] = float(part)
            else:
                how['kind' if part in ALIGNMENTS else 'pairing'] = part
        if how['kind'] not in ALIGNMENTS:
            raise unknown('alignment', how['kind'], ALIGNMENTS)
        pair_layers(how['pairing'], 2 ** 20, 2 ** 20)   # its spelling
        return how

    def lesson(self, arm, how, folder, pair, tokenizers):
        """The objective of an arm, and its description, which is part of the stage's identity."""
        start, by = 'random initialisation', f'taught by {folder if folder == self.teacher else Path(folder).name}'
        if how:
            words = f'{by}: layer {pair[0]} to {pair[1]}, {how["kind"]}, {how["strength"]:g} until {self.stop:g}'
            return dict(start=f'{start}, {words}', objective=let(
                folder, pair[1], pair[0], how['strength'], self.stop, how['kind'], tokenizers))
        if arm == 'baseline':
            return dict(start=start)
        stop = self.stop if arm == 'salt' else None
        words = f'{by}: alpha {self.alpha:g}, T {self.temperature:g}' + f', until {self.stop:g}' * (arm == 'salt')
        return dict(start=f'{start}, {words}', objective=distil(folder, self.alpha, self.temperature, stop))

    def examine(self, run):
        """Open a given teacher, to complain before training: (its layers, the two tokenizers if they differ)."""
        model, corpus = open_teacher(self.teacher), open_corpus(next(iter(run.corpora)), run.data_dir)
        ours, layers = corpus.meta['tokenizer'], getattr(model.config, 'n_layer', None) or model.config.num_hidden_layers
        try:
            theirs = tokenizer_of_model(self.teacher)
        except UserError:
            if model.config.vocab_size < corpus.meta['vocab_size']:
                raise
            print(f'{self.teacher} does not say which tokenizer it has; taking it for that of the corpus, {ours}')
            theirs = ours
        distilling = {'rkd', 'salt'} & set(self.arms)
        if distilling and not isinstance(model, GPT):
            raise UserError(f'RKD and SALT need the head of a model that load() opens, which {self.teacher} is not; LET does not')
        if same_tokenizer(ours, theirs):
            if distilling and model.config.vocab_size < corpus.meta['vocab_size']:
                raise UserError(f'{self.teacher} has a vocabulary of {model.config.vocab_size}, the corpus one of '
                                f'{corpus.meta["vocab_size"]}')
            return layers, None
        if distilling:
            raise UserError(f'RKD and SALT need one vocabulary: the corpus has the tokenizer {ours}, {self.teacher} {theirs}')
        check_alignable(ours, theirs)
        return layers, (ours, theirs)

    def summary(self, results):
        """Losses and their differences from the baseline over the seeds, and how much sooner each arm reaches its last loss."""
        runs = {arm: [r for r in results if r.name.rpartition('-')[0] == arm] for arm in self.arms}
        rows = [['objective', 'val loss', 'standard deviation', 'against baseline', 'standard deviation', 'steps to its loss',
                 'similarity']]
        baseline = runs.get('baseline', [])
        for arm, found in runs.items():
            gains = [r.val_loss - b.val_loss for r, b in zip(found, baseline)]
            curve = _mean_curve(found)
            share = _steps_to(curve, statistics.mean(b.val_loss for b in baseline)) if baseline else None
            similar = [m['similarity'] for m in read_metrics(found[0].folder) if 'similarity' in m]
            rows.append([arm, *mean_and_spread([r.val_loss for r in found]), *mean_and_spread(gains, '+'),
                         f'{share:.2f}x' if share else 'not reached' * (bool(baseline) and len(curve) > 1), f'{similar[-1]:.2f}' if similar else ''])
        teacher = [f'teacher: {r.val_loss:.4f} after {human(r.flops)}FLOPs\n\n' for r in results if r.name == 'teacher']
        picture = draw_similarity(results, Path(results[0].folder).parent / 'similarity.png')
        return ''.join(teacher) + table(rows) + ('\n\n![similarity](similarity.png)' if picture else '')


def _mean_curve(results):
    """[(share of the steps done, validation loss)] of some runs of equal steps, the mean over them."""
    curves = [{m['step']: m['val_loss'] for m in read_metrics(r.folder) if 'val_loss' in m} for r in results]
    last = read_metrics(results[0].folder)[-1]['step']
    curves = [curve | {last: r.val_loss} for curve, r in zip(curves, results)]
    return [(step / last, statistics.mean(curve[step] for curve in curves)) for step in sorted(set.intersection(*map(set, curves)))]


def _steps_to(curve, loss):
    """Share of the steps after which a curve is at most `loss`, linear between its points; None: never."""
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if low <= loss:
            return before if high <= loss else before + (after - before) * (high - loss) / (high - low)
    return None


def draw_similarity(results, path):
    """Figure 6: cosine similarity to the teacher over training, a line an arm; returns whether there was something to draw."""
    curves = {r.name: [(m['step'], m['similarity']) for m in read_metrics(r.folder) if 'similarity' in m] for r in results}
    curves = {name: curve for name, curve in curves.items() if curve}
    if curves:
        plt = pyplot()
        figure, axes = plt.subplots(figsize=(7, 3.5))
        for name, curve in curves.items():
            axes.plot(*zip(*curve), label=name, linewidth=1.4)
        axes.set(xlabel='step', ylabel='cosine similarity')
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return bool(curves)
