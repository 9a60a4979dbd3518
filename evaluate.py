"""
How good models are, and how alike: validation loss, KL divergence and agreement inside a family,
downstream tasks.

    python evaluate.py out/progressive_tiny                                # every member of a run
    python evaluate.py out/a/64x4 out/b/64x4 --data=pycode --kl_examples=1000
    python evaluate.py out/a out/b --tasks=lambada_openai,arc_easy,mmlu:5
    python evaluate.py out/progressive_8b config/tasks_progressive.py
    python evaluate.py out/col_gpt2/138m-linit-on-dolly --answers=self-inst.jsonl,vicuna.jsonl
"""

import difflib
import itertools
import math
import os
import re
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from configurator import Count, Natural, NonNegative, Range, configure
from data.corpus import check_vocabulary, verify_corpus
from data.loader import Share, validation_batches
from data.vocabulary import load_tokenizer, tokenizer_of_model
from engine.errors import UserError, first_line, import_extra, run_as_program, unknown
from engine.files import write_atomically, write_json
from engine.hub import model_folder, reach_hub
from engine.log import has_metrics, read_metrics
from engine.loss import bits_per_byte, evaluate
from engine.parallel import choose_device, set_threads
from engine.progress import progress_bar
from engine.report import (
    Line,
    Panel,
    draw_panels,
    finished_stages,
    render,
    report_blocks,
    table,
)
from expand import compare
from extras.bridge import answers_of, mean_rouge, scored_prompts
from model import load, read_config
from sample import Sampling, Speculation, check_tokenizer_of_draft, generate, speculate


def kl_divergence(model_a, model_b, examples):
    """D(P_a || P_b) in nats per token over examples (n, T)."""
    return compare(model_a, model_b, examples)[0]


def compare_all(openers, examples):
    """
    KL divergence and top-1 agreement of every pair of models, two (M, M) float64 tensors: [i, j]
    is D(P_i || P_j), and compare()'s share. openers: functions that open a model each, of which
    two are in memory at a time.
    """
    kl, agreement = torch.zeros(2, len(openers), len(openers), dtype=torch.float64)
    agreement.fill_diagonal_(1)
    for i in range(1, len(openers)):
        model = openers[i]()
        for j in range(i):
            kl[i, j], kl[j, i], agreement[i, j] = compare(model, openers[j](), examples)
            agreement[j, i] = agreement[i, j]
    return kl, agreement


@torch.no_grad()
def sliding_window_loss(model, tokens, window, stride, device):
    """
    Mean loss in nats over a long text (1-d array) read through a window that moves by `stride`
    tokens: every token is predicted once, with at least window - stride tokens before it, as
    WikiText perplexity is reported.
    """
    total, scored, end_of_last = 0.0, 0, 1
    for start in progress_bar(range(0, len(tokens) - 1, stride), desc='sliding window'):
        end = min(start + window, len(tokens) - 1)
        chunk = torch.from_numpy(np.asarray(tokens[start : end + 1], np.int64)).to(device)
        targets = chunk[1:].clone()
        targets[: max(0, end_of_last - start - 1)] = -100  # scored by the window before
        count = int((targets != -100).sum())
        if count:
            total += model(chunk[None, :-1], targets[None]).loss.item() * count
            scored += count
        end_of_last = end + 1
        if end == len(tokens) - 1:
            break
    return total / scored


def drafting(generator, openers, examples, options):
    """
    Records of how well each of several models drafts for `generator` (progressive training,
    Table 5): openers {name: function that opens it}, examples (n, T) of validation text, whose
    beginnings are the prompts. Times are seconds per continuation.
    """
    half = examples.shape[1] // 2
    prompts = list(examples[: options.draft_prompts, :half])
    limits = examples.shape[1] - half, options.draft_tokens
    sampling = Sampling(options.draft_temperature)
    torch.manual_seed(0)
    started = time.time()
    for prompt in progress_bar(prompts, desc='without a draft'):
        generate(generator, [prompt], limits[0], sampling)
    records = [{'draft': 'none', 'seconds': (time.time() - started) / len(prompts)}]
    for name, opener in openers.items():
        draft = None  # the one before must not stay in memory
        draft = opener()
        torch.manual_seed(0)
        started, stats = time.time(), Speculation()
        for prompt in progress_bar(prompts, desc=name):
            stats.add(speculate(generator, draft, prompt[None], *limits, sampling)[1])
        record = {'draft': name, 'seconds': (time.time() - started) / len(prompts)}
        record['KL(draft || model) on text'] = kl_divergence(draft, generator, examples)
        record['KL where it drafts'] = stats.divergence
        records.append(record | {'acceptance rate': stats.acceptance_rate})
    return records


# ----------------------------------------------------------------------------------------------
# downstream tasks


def run_tasks(folder, options, device, limit=None):
    """
    {task: {metric: value}} of lm-evaluation-harness for options.tasks; transformers opens the
    model, whose folder holds its tokenizer. Raises UserError if the harness is not installed, has
    no such task, or cannot open the model or reach the tasks' data.
    """
    examples = {}  # {number of examples in the prompt: tasks}
    for text in options.tasks:
        task, _, number = text.partition(':')
        if number and not number.isdecimal():
            raise UserError(f'--tasks={text}: write TASK or TASK:EXAMPLES, as mmlu:5')
        if task in itertools.chain(*examples.values()):
            raise UserError(f'--tasks: {task} is asked for twice')
        examples.setdefault(int(number or options.num_fewshot), []).append(task)
    lm_eval = import_extra('lm_eval', '--tasks needs lm-evaluation-harness')
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = options.task_folder or None
    if own is None:
        reach_hub('the data of the tasks')
    manager = TaskManager(include_path=own, include_defaults=own is None)
    for task in itertools.chain(*examples.values()):
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks)
            raise unknown('task', task, close or manager.all_tasks[:20])
    try:
        tokenizer = options.tokenizer or None
        how = dict(device=str(device), batch_size=8, tokenizer=tokenizer)
        model = HFLM(str(model_folder(folder)), **how)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'the harness cannot open {folder}: {first_line(error)}') from error
    how, found = dict(bootstrap_iters=0, task_manager=manager, limit=limit), {}
    try:
        for number, tasks in examples.items():
            outcome = lm_eval.simple_evaluate(model, tasks=tasks, num_fewshot=number, **how)
            found |= outcome['results']
    except OSError as error:
        reason = type(error).__name__
        raise UserError(f'the data of the tasks cannot be reached ({reason})') from error
    scores = {}
    for task, metrics in found.items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        scores[task] = {name.removesuffix(',none'): value for name, value in numbers.items()}
    return scores


def average_accuracy(scores, tasks):
    """
    {'average_accuracy': mean over those of the tasks that have one}, or {} for fewer than two.
    tasks: as asked for; the harness also returns the parts of a group, which count within it.
    """
    asked = [scores.get(task.partition(':')[0], {}) for task in tasks]
    found = [metrics['acc'] for metrics in asked if 'acc' in metrics]
    return dict(average_accuracy=statistics.mean(found)) if len(found) > 1 else {}


# ----------------------------------------------------------------------------------------------
# the command line


@dataclass
class Evaluation:
    """Evaluate models, or all members of a run: evaluate.py FOLDER [FOLDER ...]."""

    data: str = 'pydocs'  # prepared corpus whose validation split is used
    data_dir: str = 'data'  # where prepared corpora are
    eval_tokens: Natural = 1048576  # validation tokens; 0: the whole split
    block_size: Natural = 0  # tokens of context; 0: what the models were trained with
    stride: Natural = 0  # also through a window moving by so many tokens (WikiText); 0: no
    kl_examples: Natural = 256  # sequences for KL and agreement (the paper: 10000); 0: none
    drafts: tuple[str, ...] = ()  # models that draft for the last one that is evaluated
    draft_prompts: Count = 1000  # beginnings of validation sequences that are continued for that
    draft_tokens: Annotated[int, Range(1, 64)] = 8  # drafted ahead
    draft_temperature: NonNegative = 1.0  # of both models; 0: greedy
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness: lambada_openai,arc_easy,mmlu:5,...
    num_fewshot: Natural = 0  # examples in a task's prompt, unless it says so itself: mmlu:5
    task_folder: str = ''  # folder of task files of your own, instead of the harness' tasks
    tokenizer: str = ''  # folder of another one for tasks and answers; empty: the models'
    answers: tuple[str, ...] = ()  # .jsonl files of instructions; Rouge-L of the greedy answers
    answer_tokens: Count = 256  # of an answer, at most
    prompt: Literal['paper', 'plain'] = 'paper'  # of instructions: as data/prepare.py --prompt
    out: str = ''  # for evaluation.json and .md; empty: the first folder, of a hub model out/NAME
    device: str = 'auto'  # cuda, mps or cpu
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of models; auto: bfloat16 on a GPU


def members(folders):
    """
    {name: folder} of models, and of the finished stages of runs in the order of their training.
    A name is the path from the deepest folder that holds all of them. Raises UserError for none.
    """
    found = []
    for folder in folders:
        is_run = any(Path(folder).glob('*/result.json'))
        found += [r.folder for r in finished_stages(folder)] if is_run else [str(folder)]
    found = list(dict.fromkeys(map(os.path.normpath, found)))
    if not found:
        raise UserError(
            'nothing to evaluate; usage: evaluate.py FOLDER [FOLDER ...], models or runs'
        )
    if len(found) == 1:
        return {Path(found[0]).name: found[0]}
    if len({os.path.isabs(folder) for folder in found}) > 1:
        return {folder: folder for folder in found}
    start = os.path.commonpath(map(os.path.dirname, found))
    return {os.path.relpath(folder, start or '.'): folder for folder in found}


def open_for_evaluation(folder, device, dtype):
    """A model for evaluation: its weights on a GPU in bfloat16, or as a knob says."""
    model = load(folder, device).eval()
    if dtype == 'bfloat16' or dtype == 'auto' and device.type == 'cuda':
        model = model.to(torch.bfloat16)
    elif dtype == 'float32':
        model = model.float()
    return model


def evaluate_folders(folders, options):
    """Everything the options ask for: {'models': {name: {...}}, 'kl': ..., 'agreement': ...}."""
    device, found = choose_device(options.device), members(folders)
    corpus = verify_corpus(options.data, options.data_dir)
    configs = {name: read_config(model_folder(folder)) for name, folder in found.items()}
    longest = min(config.block_size for config in configs.values())
    *_, last = found
    for draft in options.drafts:
        longest = min(longest, read_draft(draft, found[last], corpus).block_size)
    prompts = {path: scored_prompts(path, options.prompt) for path in options.answers}
    tokenizers = {}
    if prompts:  # before anything is evaluated
        tokenizers = {n: options.tokenizer or tokenizer_of_model(found[n]) for n in found}
    block_size = options.block_size or longest
    if block_size > longest or options.stride > block_size:
        limits = f'block_size at most {longest}, which the models read, and stride at most that'
        raise UserError(f'block_size {block_size}, stride {options.stride}: need {limits}')
    if options.drafts and block_size < 2:
        raise UserError('half a sequence is the prompt of --drafts: block_size must be at least 2')
    widest = max(configs.values(), key=lambda config: config.n_embd)
    set_threads(device, widest, 8 * block_size)
    outcome = dict(data=options.data, block_size=block_size, models={})
    for name, config in configs.items():
        check_vocabulary(corpus, config, found[name])
    openers = {n: partial(open_for_evaluation, found[n], device, options.dtype) for n in found}
    for name, opener in openers.items():
        model = opener()
        row = outcome['models'][name] = losses(model, corpus, block_size, options)
        print(f'{name}: validation loss {row["val_loss"]:.4f}', flush=True)  # what follows may fail
        if prompts:
            row |= rouge_of_answers(model, tokenizers[name], prompts, options.answer_tokens)
        del model  # before the next is opened
        if options.tasks:
            row['tasks'] = run_tasks(found[name], options, device)
            row |= average_accuracy(row['tasks'], options.tasks)
    if len(found) > 1 and options.kl_examples:
        examples = some_sequences(corpus, options.kl_examples, block_size, device)
        kl, agreement = compare_all(list(openers.values()), examples)
        outcome |= dict(kl=kl.tolist(), agreement=agreement.tolist())
    if options.drafts:
        examples = some_sequences(corpus, options.draft_prompts, block_size, device)
        drafts = {
            name: partial(open_for_evaluation, name, device, options.dtype)
            for name in options.drafts
        }
        outcome['drafting'] = drafting(openers[last](), drafts, examples, options)
    return outcome


def read_draft(draft, drafts_for, corpus):
    """The GPTConfig of a model that drafts for another one. Raises UserError if it cannot."""
    check_tokenizer_of_draft(drafts_for, draft)
    config = read_config(model_folder(draft))
    check_vocabulary(corpus, config, draft)
    return config


def rouge_of_answers(model, tokenizer, prompts, max_new_tokens):
    """
    100 times the Rouge-L of a model's greedy answers to {path: scored prompts}, and the average
    over the files (Chain-of-Learngene, Tables 14 and 15).
    """
    answers = answers_of(model, load_tokenizer(tokenizer), max_new_tokens)
    found = {path: 100 * mean_rouge(answers, asked) for path, asked in prompts.items()}
    row = dict(answers={path: {'Rouge-L': score} for path, score in found.items()})
    return row | {'average_Rouge-L': statistics.mean(found.values())}


def some_sequences(corpus, n, block_size, device):
    """Up to n sequences, (n, block_size), spread over a validation split."""
    batches = validation_batches(corpus.val, block_size, 1, n * block_size, Share(device))
    return torch.cat([x for x, _, _ in batches])


def losses(model, corpus, block_size, options):
    """The validation loss of one model in its several units, as a dict."""
    device = model.wte.weight.device
    batches = validation_batches(corpus.val, block_size, 8, options.eval_tokens, Share(device))
    loss = evaluate(model, batches)
    row = dict(n_params=model.num_params(), val_loss=loss, perplexity=math.exp(min(loss, 700)))
    row['bits_per_byte'] = bits_per_byte(loss, corpus.bytes_per_token)
    if options.stride:
        tokens = corpus.val[: options.eval_tokens or None]
        sliding = sliding_window_loss(model, tokens, block_size, options.stride, device)
        row['sliding_window_perplexity'] = math.exp(sliding)
    return row


def evaluation_tables(outcome):
    """The outcome of evaluate_folders as Markdown."""
    names, records = list(outcome['models']), []
    for name, row in outcome['models'].items():
        record = {'model': name, 'N': row['n_params']}
        for key, value in row.items():
            if isinstance(value, float):
                record[key.replace('_', ' ')] = value
        for task, metrics in (row.get('tasks', {}) | row.get('answers', {})).items():
            record |= {f'{task} {metric}': value for metric, value in metrics.items()}
        for average in ('average Rouge-L', 'average accuracy'):  # the last columns
            if average in record:
                record[average] = record.pop(average)
        records.append(record)
    text = table(records)
    titles = dict(kl='KL divergence D(row || column), nats per token', agreement='top-1 agreement')
    for key, title in titles.items():
        if key in outcome:
            matrix = [{'': a, **dict(zip(names, row))} for a, row in zip(names, outcome[key])]
            text += f'\n\n{title}\n\n{table(matrix)}'
    if 'drafting' in outcome:
        text += f'\n\nDrafting for {names[-1]}\n\n{table(outcome["drafting"])}'
    return text


def curves_over_training(outcome, folders):
    """
    Panels over the steps of training: the training loss of each model (progressive training, Figure
    4), and perplexity and average accuracy, a line for each stage of which models were kept along
    the way (train.py --keep_every). folders: {name: folder}.
    """
    panels = [Panel('step', 'training loss (nats per token)')]
    for name in filter(lambda name: has_metrics(folders[name]), outcome['models']):
        logged = [m for m in read_metrics(folders[name]) if 'loss' in m]
        steps, losses = [m['step'] for m in logged], [m.get('data_loss', m['loss']) for m in logged]
        panels[0].lines.append(Line(steps, losses, name))
    for score in ('perplexity', 'average_accuracy'):
        panel, points = Panel('step', score.replace('_', ' ')), {}
        for name, row in outcome['models'].items():
            kept = re.fullmatch(r'(?:(.*)/)?step-(\d+)', name)
            stage = (kept[1] or '') if kept else name
            if score in row and kept:
                points.setdefault(stage, {})[int(kept[2])] = row[score]
            elif score in row and has_metrics(folders[name]):  # what the stage ended with
                points.setdefault(stage, {})[read_metrics(folders[name])[-1]['step']] = row[score]
        for stage, curve in points.items():
            if len(curve) > 1:
                steps = sorted(curve)
                panel.lines.append(Line(steps, [curve[step] for step in steps], stage, 'o-'))
        panels.append(panel)
    return [panel for panel in panels if panel.lines]


def main(argv):
    """Command line: folders, config files and knobs. A run's own report is printed first."""
    words = list(takewhile(lambda arg: arg[:1] != '-', argv))
    folders = [word for word in words if not word.endswith('.py')]
    knobs = [word for word in words if word.endswith('.py')] + argv[len(words) :]
    options, _, _ = configure(knobs, Evaluation, program='evaluate.py FOLDER ...')
    for folder in folders:
        if any(Path(folder).glob('*/result.json')):
            written, text = Path(folder) / 'report.md', ''
            if written.is_file():
                text = written.read_text(encoding='utf-8', errors='replace')
            text = text or render(report_blocks(folder))
            lines = [line for line in text.splitlines() if not line.startswith('![')]
            print('\n'.join(lines).rstrip() + '\n')
    outcome = evaluate_folders(folders, options)
    text = evaluation_tables(outcome)
    print(text)
    first = Path(folders[0])
    out = Path(options.out or (first if first.is_dir() else Path('out', first.name)))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / 'evaluation.json', outcome)
    write_atomically(out / 'evaluation.md', text + '\n')
    written = 'evaluation.json and evaluation.md are'
    if panels := curves_over_training(outcome, members(folders)):
        draw_panels(panels, out / 'evaluation.png')
        written = 'evaluation.json, evaluation.md and evaluation.png are'
    print(f'\n{written} in {out}/')


if __name__ == '__main__':
    run_as_program(main)
