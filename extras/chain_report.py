"""
What a run of Chain-of-Learngene found: its checkpoints, and what descendants start from and end at.
"""

from data.instruct import Examples
from engine.log import read_metrics
from engine.report import by_label, format_si, steps_to_loss, validation_curve
from extras.bridge import answer_scores
from extras.diagnostics import loss_variance
from model import load


def scores(result, data, method):
    """
    Rouge-L and the share of exact answers of a model on the last validation examples of a set: by
    the first, the best of a chain are chosen. method: the ChainOfLearngene that has run.
    """
    examples = Examples(data, method.data_dir, 'val')
    n = len(examples)
    last = range(max(0, n - method.answers), n)
    model = load(result.folder, method.device).eval()
    rouge, exact = answer_scores(model, examples, last, method.answer_tokens)
    return {'Rouge-L': 100 * rouge, 'exact answers': exact}


def checkpoints(results, data, scores_of):
    """
    Records of the chain, and of its smallest distilled directly: the variance of the training loss
    (Figure 5b), and with a supervised set `data` the scores on it (Table 3).
    """
    records = []
    for r in results:
        if 'checkpoint' in r.labels:
            record = {'checkpoint': r.name, 'taught by': r.labels['teacher']}
            losses = [m['loss'] for m in read_metrics(r.folder) if 'loss' in m]
            record['variance of the loss'] = f'{loss_variance(losses):.2e}'
            records.append(record | (scores_of(r, data) if data else {}))
    return records


def recoveries(results, on_answers):
    """
    Records of the descendants. on_answers: whether kd was taught on answers, as seqkd always is;
    their losses are not those of the others.
    """
    records = []
    for size, runs in by_label(results, 'descendant').items():
        curves = {r.labels['start']: validation_curve(r) for r in runs}
        for r in runs:
            start, curve = r.labels['start'], curves[r.labels['start']]
            record = {'descendant': size, 'start': start, 'N': r.n_params}
            if start != 'seqkd' and not (start == 'kd' and on_answers):
                record['loss at step 0'] = curve[0][1] if curve[0][0] == 0 else None
                record['after recovery'] = r.val_loss
                if 'random' in curves and start != 'random' and curve[0][0] == 0 < len(curve) - 1:
                    record['speed-up'] = speed_up(curve, curves['random'])
            record['FLOPs before'] = format_si(r.inherited_flops)
            records.append(record)
    return records


def tuned(results, scores_of):
    """Records of the descendants that were fine-tuned on a task."""
    records = []
    for data, runs in by_label(results, 'tuned_on').items():
        for r in runs:
            record = {'fine-tuned': r.name, 'loss on answers': r.val_loss}
            records.append(record | scores_of(r, data))
    return records


def speed_up(curve, random):
    """
    How many times fewer steps a start needs to the last loss of random initialisation (Figures 4
    and 7 to 9), read between evaluations. curve, random: [(step, validation loss)] of both.
    """
    loss = random[-1][1]
    if curve[0][1] <= loss:
        return 'there at step 0'
    own, steps = steps_to_loss(curve, loss), steps_to_loss(random, loss)
    return f'{steps / own:.1f}x' if own else 'never there'
