"""
Evaluate models and compare them: validation loss, KL divergence and agreement within a family,
speculative decoding, downstream tasks.

    python evaluate.py out/progressive_tiny                                # every member of a run
    python evaluate.py out/a out/b --data=pycode --kl_examples=10000       # as many as in the paper
    python evaluate.py out/a/64x4 --drafts=out/a/48x2,out/a/64x2           # Table 5
    python evaluate.py out/progressive_8b config/tasks_progressive.py      # Table 1
"""

import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, combinations, pairwise, takewhile
from pathlib import Path

import torch

from configurator import Count, Natural, configure
from data.corpus import verify_corpus
from data.loader import Share, validation_batches
from data.vocabulary import tokenizer_in
from engine.errors import UserError, first_line, import_extra, run_as_program
from engine.files import write_json
from engine.hub import model_folder
from engine.log import progress_bar
from engine.loss import bits_per_byte, evaluate
from engine.parallel import choose_device, set_threads
from engine.report import finished_stages, render
from engine.stage import Result
from expand import compare
from model import load, read_config
from sample import Sampling, check_same_tokenizer, draft_for

# ----------------------------------------------------------------------------------------------
# how similar models are


def kl_divergence(model_a, model_b, examples):
    """D(P_a || P_b) in nats per token (Appendix F), the mean over examples (n, T) int64."""
    return compare(model_a, model_b, examples)[0]


def pairs_to_compare(folders):
    """
    The pairs of model folders to compare: neighbours in size within each family (Table 4), and
    equal sizes across families. If there are none, each folder and the next.
    """
    families, sizes = {}, {}
    for folder in map(Path, folders):
        labels = dict(size=folder.name)
        if (folder / 'result.json').is_file():
            labels |= Result.of(folder).labels
        if 'trunk' in labels:  # its branch is the member of the family
            continue
        key = [labels.get(name) for name in ('family', 'independent', 'seed', 'phase')]
        families.setdefault((folder.parent, *key), []).append(str(folder))
        sizes.setdefault((labels['size'], *key[2:]), []).append(str(folder))  # same seed and phase
    groups = *map(pairwise, families.values()), *(combinations(s, 2) for s in sizes.values())
    return list(chain(*groups)) or list(pairwise(folders))


def drafting(name, opened, examples, options):
    """
    One record for each of options.drafts: how well it drafts for the model `name` (Table 5).
    examples: (n, T) int64 of validation text, whose first halves are the prompts; opened: a
    function from a name to its GPT.
    """
    model, half = opened(name), examples.shape[1] // 2
    prompts = progress_bar(examples[:, None, :half], desc='drafting')
    limits = half, options.draft_tokens
    records = []
    for draft in options.drafts:
        torch.manual_seed(0)  # the same random numbers for every draft model
        smaller = opened(draft)
        _, record = draft_for(model, smaller, prompts, limits, Sampling())
        record['KL on text'] = kl_divergence(smaller, model, examples)
        records.append({'draft': draft} | record)
    return records


# ----------------------------------------------------------------------------------------------
# downstream tasks


def run_tasks(folder, options, device):
    """
    Run options.tasks in lm-evaluation-harness on a model folder, which transformers opens:
    {'TASK METRIC': value}, with the mean of the metrics in options.average (default: every acc) as
    average_accuracy, if there are several. Raises UserError if the tasks cannot be run or averaged.
    """
    lm_eval = import_extra('lm_eval', '--tasks needs lm-evaluation-harness')
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager, scores = TaskManager(include_path=options.task_folder or None), {}
    try:
        model = HFLM(str(model_folder(folder)), device=str(device), batch_size=8)
        for text in options.tasks:
            task, _, shots = text.partition(':')
            # bootstrap_iters=0: no standard errors, which are slow and not reported
            how = dict(num_fewshot=int(shots or 0), task_manager=manager, bootstrap_iters=0)
            found = lm_eval.simple_evaluate(model, tasks=[task], **how)['results']
            # for a group, report its own mean where there is one, else each of its tasks
            for name in [task] if task in found else found:
                for metric, value in found[name].items():  # metrics are named METRIC,FILTER
                    if isinstance(value, float):
                        scores[f'{name} {metric.removesuffix(",none")}'] = value
        chosen = options.average or [name for name in scores if name.endswith(' acc')]
        right = [scores[name] for name in chosen]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'--tasks of {folder}: {first_line(error)}') from error
    return scores | (dict(average_accuracy=statistics.mean(right)) if len(right) > 1 else {})


# ----------------------------------------------------------------------------------------------
# the command line


@dataclass
class Evaluation:
    """Evaluate models, or all members of a run: evaluate.py FOLDER [FOLDER ...]."""

    data: str = 'pydocs'  # prepared corpus: its validation split, every token of it (prompts, too)
    data_dir: str = 'data'  # where prepared corpora are
    eval_tokens: Natural = 1048576  # validation tokens; 0: the whole split
    block_size: Natural = 0  # tokens of context; 0: the shortest context of the models
    kl_examples: Natural = 256  # sequences for KL and agreement (the paper: 10000); 0: none
    drafts: tuple[str, ...] = ()  # draft models for the last one that is evaluated
    draft_prompts: Count = 1000  # prompts from the validation split that they help to continue
    draft_tokens: Count = 8  # tokens drafted at a time
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness: arc_easy, mmlu:5 (5-shot)
    average: tuple[str, ...] = ()  # metrics to average (hellaswag acc_norm); empty: every acc
    task_folder: str = ''  # folder with task files of your own, in addition to the harness's
    out: str = ''  # folder for evaluation.json; empty: the first model's, out/NAME for a hub model
    device: str = 'auto'  # cuda, mps or cpu


def members(folders):
    """
    The model folders to evaluate: for a run, those of its finished stages; else the folder itself.
    Raises UserError if there are none.
    """
    found = []
    for folder in folders:
        is_run = any(Path(folder).glob('*/result.json'))
        found += [r.folder for r in finished_stages(folder)] if is_run else [str(Path(folder))]
    if not found:
        raise UserError('nothing to evaluate; usage: evaluate.py FOLDER [FOLDER ...]')
    return found


def open_model(folder, device):
    """Load a model for evaluation, in bfloat16 on a CUDA GPU."""
    model = load(folder, device).eval()
    return model.to(torch.bfloat16) if device.type == 'cuda' else model


def evaluate_folders(folders, options):
    """
    Evaluate what the options ask for: {'models': records} and, where asked for, 'pairs' and
    'drafts'. Raises UserError if models, corpus and options do not fit together.
    """
    device, corpus = choose_device(options.device), verify_corpus(options.data, options.data_dir)
    configs = {name: read_config(model_folder(name)) for name in (*folders, *options.drafts)}
    for name, config in configs.items():
        corpus.check_vocabulary(config, name)
    for draft in options.drafts:
        check_same_tokenizer(draft, tokenizer_in(folders[-1]))
    longest = min(config.block_size for config in configs.values())
    block_size = options.block_size or longest
    if block_size > longest:
        raise UserError(f'block_size={block_size}, but the models read {longest} tokens')
    # batches below have 8 sequences
    set_threads(device, max(configs.values(), key=lambda config: config.n_embd), 8 * block_size)
    opened = partial(open_model, device=device)  # loads at every use: two models in memory
    outcome = dict(models=[])
    for name in folders:
        batches = validation_batches(corpus.val, block_size, 8, options.eval_tokens, Share(device))
        loss = evaluate(opened(name), batches)
        print(f'{name}: validation loss {loss:.4f}', flush=True)  # now: later steps may fail
        row = {'model': name, 'N': configs[name].num_params(), 'val loss': loss}
        row['perplexity'] = math.exp(loss)
        row['bits/byte'] = bits_per_byte(loss, corpus.bytes_per_token)
        if options.tasks:
            row |= run_tasks(name, options, device)
        outcome['models'].append(row)

    def examples(n):  # (n, block_size) int64, spread over the validation split
        batches = validation_batches(corpus.val, block_size, 1, n * block_size, Share(device))
        return torch.cat([x for x, _, _ in batches])

    if options.kl_examples:
        outcome['pairs'], texts = [], examples(options.kl_examples)
        for p, q in pairs_to_compare(folders):
            kl, same = compare(opened(p), opened(q), texts)
            outcome['pairs'].append({'P': p, 'Q': q, 'KL(P || Q)': kl, 'agreement': same})
    if options.drafts:
        texts = examples(options.draft_prompts)
        outcome['drafts'] = drafting(folders[-1], opened, texts, options)
    return outcome


def main(argv):
    """Command line: FOLDERs and config files, then knobs. Prints tables, writes evaluation.json."""
    words = list(takewhile(lambda arg: arg[:1] != '-', argv))
    folders = [word for word in words if not word.endswith('.py')]
    knobs = [word for word in words if word.endswith('.py')] + argv[len(words) :]
    options, _, _ = configure(knobs, Evaluation, program='evaluate.py FOLDER ...')
    outcome = evaluate_folders(members(folders), options)
    print('\n' + render(outcome.values()))
    first = Path(folders[0])
    out = Path(options.out or (first if first.is_dir() else Path('out', first.name)))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / 'evaluation.json', outcome | dict(options=asdict(options)))
    print(f'\nevaluation.json is in {out}/')


if __name__ == '__main__':
    run_as_program(main)
