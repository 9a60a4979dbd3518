"""
How good models are, and how alike: validation loss, KL divergence and agreement inside a family, downstream tasks; and the
report (table and picture) of a run of any method.

    python evaluate.py out/progressive_tiny                                   # every member of a run
    python evaluate.py out/a/64x4 out/b/64x4 --data=pycode --kl_examples=1000
    python evaluate.py out/progressive_8b --data=wikitext --stride=512 --tasks=lambada_openai,arc_easy,hellaswag
"""
import difflib
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import Result, UserError, check_ranges, configure, run_as_program, unknown, write_atomically
from hugging_face import reach_hub
from machine import choose_device, gather, share_work
from model import load


@torch.no_grad()
def evaluate(model, batches):
    """
    Mean next-token loss in nats over `batches` of (x, y, number of real targets), as data.loader.validation_batches yields
    them; summed over all processes under torch.distributed.
    """
    was_training = model.training
    model.eval()
    losses, counts = [], []   # the losses stay on the device: nothing waits for them before the end
    for x, y, count in batches:
        losses.append(model(x, y).loss)
        counts.append(count)
    model.train(was_training)
    counts = torch.tensor(counts, dtype=torch.float64)
    sums = [(torch.stack(losses).cpu().double() @ counts).item(), counts.sum().item()]   # loss x targets, targets
    loss, targets = torch.tensor(gather(sums), dtype=torch.float64).sum(0).tolist()
    return loss / targets


def bits_per_byte(loss, bytes_per_token):
    """Nats per token -> bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


# ---------------------------------------------------------------------------------------------------------------------
# the report of a run

def human(number, letters=('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')):
    """1234567 -> '1.23M', with SI letters; the empty string for zero."""
    if not number:
        return ''
    power = max(0, min(len(letters) - 1, int(math.log10(abs(number)) // 3)))
    return f'{number / 1000 ** power:.3g}{letters[power]}'


def count(number):
    """Parameters or tokens as the field writes them: 8.44B."""
    return human(number, ('', 'k', 'M', 'B', 'T'))


def table(rows):
    """Rows of strings (the first is the head) as a Markdown table with aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return f'| {" | ".join(cells)} |'
    rule = '|' + '|'.join('-' * (w + 2) if i == 0 else '-' * (w + 1) + ':' for i, w in enumerate(widths)) + '|'
    return '\n'.join([line(rows[0]), rule, *map(line, rows[1:])])


def mean_and_spread(values, sign=''):
    """The mean and the standard deviation of some runs, as two cells of a table; empty where there are none."""
    return [f'{statistics.mean(values):{sign}.4f}' if values else '', f'{statistics.stdev(values):.4f}' if len(values) > 1 else '']


def finished_stages(folder):
    """The results of a run's finished stages, in the order of their training. Raises UserError when there are none."""
    paths = sorted(Path(folder).glob('*/result.json'), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(f'{folder} holds no finished stage')
    return [Result.of(path.parent) for path in paths]


def family_cost(result):
    """FLOPs spent to have this model and the smaller ones of its family: its ancestors', or each one's from scratch."""
    return result.total_flops if result.inherited_flops else result.baseline_flops or result.flops


def result_table(results):
    """Sizes, budgets, losses, and what the family has cost so far against training each of its models from scratch."""
    rows = [['stage', 'N', 'tokens', 'FLOPs', 'val loss', 'bits/byte', 'cumulative FLOPs', 'independent', 'saved']]
    for r in results:
        saved = f'{1 - family_cost(r) / r.baseline_flops:.1%}' if r.baseline_flops and r.inherited_flops else ''
        rows.append([r.name, count(r.n_params), count(r.tokens), human(r.flops), f'{r.val_loss:.4f}',
                     f'{r.bits_per_byte:.4f}', human(family_cost(r)), human(r.baseline_flops), saved])
    return table(rows)


def read_metrics(folder):
    """The lines of a stage's metrics.jsonl, dicts in the order of the steps. Raises UserError for a damaged one."""
    path = Path(folder) / 'metrics.jsonl'
    try:
        lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        assert all(isinstance(line['step'], int) for line in lines)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__})') from None
    return lines


def pyplot():
    """matplotlib's pyplot, for files: no window is opened."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def training_curve(result, points=80):
    """(cumulative family FLOPs, smoothed training loss on the data) of a stage, from its metrics.jsonl: two lists."""
    metrics = [m for m in read_metrics(result.folder) if 'loss' in m]
    width = max(1, len(metrics) // points)
    groups = [metrics[i:i + width] for i in range(0, len(metrics), width)]
    start = family_cost(result) - result.flops
    return [start + g[-1]['flops'] for g in groups], [sum(m.get('data_loss', m['loss']) for m in g) / len(g) for g in groups]


def draw(results, path):
    """The picture of a run: training loss against cumulative FLOPs, one line a stage, a dot at its validation loss."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    sizes = list(dict.fromkeys(r.name.removeprefix('independent-') for r in results))
    for r in results:   # a size has one colour, dashed where it was trained from scratch to compare
        size = r.name.removeprefix('independent-')
        color, style = f'C{sizes.index(size)}', '-' if size == r.name else '--'
        axes.plot(*training_curve(r), linewidth=1.4, linestyle=style, color=color, label=r.name)
        axes.plot(family_cost(r), r.val_loss, 'o', color=color)
    axes.set_ylim(min(r.val_loss for r in results) * 0.93, max(r.val_loss for r in results) * 1.4)
    axes.set(xlabel='cumulative training FLOPs of the family', ylabel='loss (nats per token)')
    axes.set_title('training loss (dots: validation loss)')
    if len(results) <= 24:
        axes.legend(frameon=False, fontsize=8 if len(results) <= 12 else 5)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(f'{path}.tmp', format='png', dpi=150)
    plt.close(figure)
    Path(f'{path}.tmp').replace(path)


def report(folder, summary=''):
    """
    Write report.md and report.png into a run's folder; returns the table, with the method's own `summary` below it. Raises
    UserError when nothing is finished.
    """
    results, folder = finished_stages(folder), Path(folder)
    text = result_table(results) + (f'\n\n{summary}' if summary else '')
    write_atomically(folder / 'report.md', text + '\n\n![loss against cumulative FLOPs](report.png)\n')
    draw(results, folder / 'report.png')
    return text


# ---------------------------------------------------------------------------------------------------------------------
# how alike two models are

def kl_of_logits(logits_p, logits_q):
    """D(P || Q) in nats at each position: logits (..., V) of both -> (...)."""
    log_p, log_q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def compare(models, examples, batch_size=4):
    """
    KL divergence and top-1 agreement of every pair of models, two (M, M) float64 tensors: [i, j] is D(P_i || P_j), and the
    share of positions at which both find the same token most likely. examples: (n, T) int64. As in paper 000, Appendix F:
    the mean over positions within an example, then over examples. Raises UserError for different vocabularies.
    """
    if len(vocabularies := {model.config.vocab_size for model in models}) > 1:
        raise UserError(f'models with different vocabularies cannot be compared: {sorted(vocabularies)} tokens')
    kl, agreement = torch.zeros(2, len(models), len(models), dtype=torch.float64)
    for x in tqdm(examples.split(batch_size), desc='comparing', leave=False, disable=len(examples) <= batch_size):
        logits = [model(x).logits for model in models]
        best = [of_model.argmax(-1) for of_model in logits]
        for i in range(len(models)):
            for j in range(len(models)):
                if i != j:
                    kl[i, j] += kl_of_logits(logits[i], logits[j]).mean(1).sum().item()
                agreement[i, j] += (best[i] == best[j]).double().mean(1).sum().item()
    return kl / len(examples), agreement / len(examples)


def kl_divergence(model_a, model_b, examples):
    """D(P_a || P_b) in nats a token over examples (n, T), paper 000's Appendix F."""
    return compare([model_a, model_b], examples)[0][0, 1].item()


@torch.no_grad()
def sliding_window_loss(model, tokens, window, stride, device):
    """
    Mean loss in nats over a long text read through a window that moves by `stride` tokens: every token is predicted once,
    with at least window - stride tokens before it (as WikiText perplexity is reported). tokens: 1-d array.
    """
    total, scored, end_of_last = 0.0, 0, 1
    for start in tqdm(range(0, len(tokens) - 1, stride), desc='sliding window', leave=False):
        end = min(start + window, len(tokens) - 1)
        chunk = torch.from_numpy(np.asarray(tokens[start:end + 1], np.int64)).to(device)
        targets = chunk[1:].clone()
        targets[:max(0, end_of_last - start - 1)] = -100   # the window before has scored these
        count = int((targets != -100).sum())
        if count:
            total += model(chunk[None, :-1], targets[None]).loss.item() * count
            scored += count
        end_of_last = end + 1
        if end == len(tokens) - 1:
            break
    return total / scored


# ---------------------------------------------------------------------------------------------------------------------
# downstream tasks

def harness_model(model, encode, decode, end, batch_size=8):
    """Our model as an LM of lm-evaluation-harness, which has the tasks, the prompts and the metrics."""
    from lm_eval.api.model import TemplateLM

    class Ours(TemplateLM):
        """What the harness asks of a model: log-likelihoods of continuations, and generation."""
        eot_token_id = end
        tokenizer_name = 'nanofamily'

        def tok_encode(self, string, **kwargs):
            return [int(token) for token in encode(string)]

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            answers, device = [], model.wte.weight.device
            for _, context, continuation in tqdm(requests, desc='log-likelihoods', disable=disable_tqdm):
                ids = torch.tensor((context + continuation)[-model.config.block_size - 1:], device=device)
                logits = model(ids[None, :-1]).logits[0, -len(continuation):].float()
                scores = logits.log_softmax(-1).gather(-1, ids[-len(continuation):, None])
                greedy = bool((logits.argmax(-1) == ids[-len(continuation):]).all())
                answers.append((scores.sum().item(), greedy))
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Log-likelihood of whole texts, in windows side by side, each token once."""
            answers = []
            for (text,) in [request.args for request in requests]:
                ids, block = [end, *self.tok_encode(text)], model.config.block_size
                parts = [('', ids[i:i + 1], ids[i + 1:i + 1 + block]) for i in range(0, len(ids) - 1, block)]
                answers.append(sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            return answers

        def generate_until(self, requests, disable_tqdm=False):
            """Greedy continuations up to a stop string."""
            answers = []
            for context, how in tqdm([request.args for request in requests], desc='generating', disable=disable_tqdm):
                new = min(how.get('max_gen_toks', 128), model.config.block_size // 2)
                ids = (self.tok_encode(context) or [end])[-(model.config.block_size - new):]
                ids = torch.tensor(ids, device=model.wte.weight.device)
                text = decode([t for t in model.generate(ids[None], new, 0.0, stop=end)[0, len(ids):].tolist() if t != end])
                for stop in [how.get('until') or []] if isinstance(how.get('until'), str) else how.get('until') or []:
                    text = text.split(stop)[0]
                answers.append(text)
            return answers
    return Ours()


def run_tasks(model, tokenizer, tasks, num_fewshot, include_path=None, limit=None):
    """
    {task: {metric: value}} of lm-evaluation-harness. tasks: its names; include_path: a folder of further task files.
    Raises UserError when the harness is not installed, or has no such task, or its data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('--tasks needs lm-evaluation-harness: pip install -r requirements-extras.txt') from None
    from data.prepare import load_tokenizer
    encode, decode, vocab_size, end = load_tokenizer(tokenizer)
    if vocab_size > model.config.vocab_size:
        raise UserError(f'the tokenizer has {vocab_size} tokens, the model only {model.config.vocab_size}: choose with '
                        '--tokenizer=')
    if include_path is None:
        reach_hub('the data of the tasks')
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        raise unknown('task', missing[0], difflib.get_close_matches(missing[0], manager.all_tasks) or manager.all_tasks[:20])
    try:
        results = lm_eval.simple_evaluate(
            harness_model(model, encode, decode, end), tasks=list(tasks), num_fewshot=num_fewshot, task_manager=manager,
            limit=limit, bootstrap_iters=0, verbosity='ERROR')['results']
    except OSError as error:
        raise UserError(f'the data of {", ".join(tasks)} cannot be reached ({type(error).__name__})') from error
    return {task: {name.removesuffix(',none'): value for name, value in metrics.items() if isinstance(value, float)}
            for task, metrics in results.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the command line

@dataclass
class Evaluation:
    """Evaluate models, or all members of a run: evaluate.py FOLDER [FOLDER ...]."""
    data: str = 'pydocs'            # prepared corpus whose validation split is used
    data_dir: str = 'data'          # where prepared corpora are
    eval_tokens: int = 1048576      # validation tokens; 0: the whole split
    block_size: int = 0             # tokens of context; 0: what the models were trained with
    stride: int = 0                 # also the loss through a window that moves by so many tokens (WikiText perplexity); 0: no
    kl_examples: int = 256          # validation sequences for KL divergence and agreement (paper 000: 10000); 0: none
    tasks: tuple[str, ...] = ()     # tasks of lm-evaluation-harness: lambada_openai,arc_easy,...
    num_fewshot: int = 0            # examples in a task's prompt
    task_folder: str = ''           # folder of task files of your own, in place of the harness' tasks
    tokenizer: str = ''             # for the tasks; empty: the models'
    out: str = ''                   # where evaluation.json and evaluation.md go; empty: the first folder
    device: str = 'auto'            # cuda, mps or cpu


def members(folders):
    """Model folders among the arguments, those of a run being its finished stages: {name: folder}. Raises UserError."""
    found = {}
    for folder in folders:
        if any(Path(folder).glob('*/result.json')):
            found |= {result.name: result.folder for result in finished_stages(folder)}
        else:
            found[Path(folder).name if Path(folder).name not in found else str(folder)] = str(folder)
    if not found:
        raise UserError('say what to evaluate: evaluate.py FOLDER [FOLDER ...], a model or a run')
    return found


def evaluate_folders(folders, options):
    """Everything the options ask for, of every member: {'models': {name: {...}}, 'kl': ..., 'agreement': ...}."""
    from data.loader import open_corpus, validation_batches
    from data.prepare import tokenizer_of_model
    check_ranges(options, **{knob: (0, None) for knob in ('eval_tokens', 'block_size', 'stride', 'kl_examples', 'num_fewshot')})
    device = choose_device(options.device)
    found, corpus = members(folders), open_corpus(options.data, options.data_dir)
    models = {name: load(folder, device).eval() for name, folder in found.items()}
    block_size = options.block_size or min(model.config.block_size for model in models.values())
    longest = min(model.config.block_size for model in models.values())
    if block_size > longest or options.stride > block_size:
        raise UserError(f'block_size {block_size} must be at most {longest}, which the models read, and stride at most block_size')
    share_work(device, max((model.config for model in models.values()), key=lambda config: config.n_embd), 8 * block_size)
    outcome = dict(data=options.data, block_size=block_size, models={})
    for name, model in models.items():
        if model.config.vocab_size < corpus.meta['vocab_size']:
            raise UserError(f'{name} has a vocabulary of {model.config.vocab_size} tokens, {options.data} one of '
                            f'{corpus.meta["vocab_size"]}: choose another --data')
        loss = evaluate(model, validation_batches(corpus.val, block_size, 8, options.eval_tokens, device))
        row = dict(n_params=model.num_params(), val_loss=loss, perplexity=math.exp(min(loss, 700)),
                   bits_per_byte=bits_per_byte(loss, corpus.bytes_per_token))
        if options.stride:
            tokens = corpus.val[:options.eval_tokens or None]
            sliding = sliding_window_loss(model, tokens, block_size, options.stride, device)
            row['sliding_window_perplexity'] = math.exp(sliding)
        if options.tasks:
            row['tasks'] = run_tasks(model, options.tokenizer or tokenizer_of_model(found[name]), options.tasks,
                                     options.num_fewshot, options.task_folder or None)
        outcome['models'][name] = row
    if len(models) > 1 and options.kl_examples:
        batches = validation_batches(corpus.val, block_size, 1, options.kl_examples * block_size, device)
        kl, agreement = compare(list(models.values()), torch.cat([x for x, _, _ in batches]))
        outcome |= dict(kl=kl.tolist(), agreement=agreement.tolist())
    return outcome


def evaluation_tables(outcome):
    """The outcome of evaluate_folders as Markdown."""
    names = list(outcome['models'])
    tasks = {(task, metric): None for row in outcome['models'].values()
             for task, metrics in row.get('tasks', {}).items() for metric in metrics}
    columns = [c for c in ('val_loss', 'perplexity', 'bits_per_byte', 'sliding_window_perplexity')
               if c in outcome['models'][names[0]]]
    rows = [['model', 'N', *(c.replace('_', ' ') for c in columns), *(f'{task} {metric}' for task, metric in tasks)]]
    for name, row in outcome['models'].items():
        rows.append([name, count(row['n_params']), *(f'{row[c]:.4f}' for c in columns),
                     *(f'{row["tasks"][task].get(metric, math.nan):.4f}' for task, metric in tasks)])
    text = table(rows)
    for key, title in (('kl', 'KL divergence D(row || column), nats a token'), ('agreement', 'top-1 agreement')):
        if key in outcome:
            matrix = [[name, *(f'{value:.4f}' for value in row)] for name, row in zip(names, outcome[key])]
            text += f'\n\n{title}\n\n' + table([['', *names], *matrix])
    return text


def main(argv):
    """Command line: folders, then knobs. A run's own report is printed first."""
    folders = [arg for arg in argv if not arg.startswith('-')]
    options, _, _ = configure([arg for arg in argv if arg.startswith('-')], Evaluation, program='evaluate.py FOLDER ...')
    for folder in folders:
        if any(Path(folder).glob('*/result.json')):
            written = Path(folder) / 'report.md'
            print((written.read_text(encoding='utf-8').split('![')[0] if written.is_file() else report(folder)) + '\n')
    outcome = evaluate_folders(folders, options)
    out, text = Path(options.out or folders[0]), evaluation_tables(outcome)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / 'evaluation.json', json.dumps(outcome, indent=1) + '\n')
    write_atomically(out / 'evaluation.md', text + '\n')
    print(text + f'\n\nevaluation.json and evaluation.md are in {out}/')


if __name__ == '__main__':
    run_as_program(main)
