"""
How good models are, and how alike: validation loss, KL divergence and agreement inside a family,
drafting, downstream tasks.

    python evaluate.py out/progressive_tiny                                # every member of a run
    python evaluate.py out/a out/b --data=pycode --kl_examples=10000       # as many as the paper's
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
# how alike models are


def kl_divergence(model_a, model_b, examples):
    """D(P_a || P_b) in nats per token over examples (n, T)."""
    return compare(model_a, model_b, examples)[0]


def pairs_to_compare(folders):
    """The pairs of neighbours in a family, and of one size across families (Table 4)."""
    families, sizes = {}, {}
    for folder in map(Path, folders):
        labels = dict(size=folder.name)
        if (folder / 'result.json').is_file():
            labels |= Result.of(folder).labels
        if 'trunk' in labels:  # a piece of a run, no member
            continue
        key = [labels.get(name) for name in ('family', 'independent', 'seed', 'phase')]
        families.setdefault((folder.parent, *key), []).append(str(folder))
        sizes.setdefault((labels['size'], *key[2:]), []).append(str(folder))
    groups = *map(pairwise, families.values()), *(combinations(s, 2) for s in sizes.values())
    return list(chain(*groups)) or list(pairwise(folders))


def drafting(name, opened, examples, options):
    """
    Records of how well each of options.drafts drafts for the model `name` (Table 5): examples
    (n, T) of validation text, the beginnings of which are the prompts. opened: name -> model.
    """
    model, half = opened(name), examples.shape[1] // 2
    prompts = progress_bar(examples[:, None, :half], desc='drafting')
    limits = half, options.draft_tokens
    records = []
    for draft in options.drafts:
        torch.manual_seed(0)
        smaller = opened(draft)
        _, record = draft_for(model, smaller, prompts, limits, Sampling())
        record['KL on text'] = kl_divergence(smaller, model, examples)
        records.append({'draft': draft} | record)
    return records


# ----------------------------------------------------------------------------------------------
# downstream tasks


def run_tasks(folder, options, device):
    """
    {'TASK METRIC': value} of lm-evaluation-harness for options.tasks, with the mean of the metrics
    options.average; transformers opens the folder. Raises UserError for what it cannot do.
    """
    lm_eval = import_extra('lm_eval', '--tasks needs lm-evaluation-harness')
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager, scores = TaskManager(include_path=options.task_folder or None), {}
    try:
        model = HFLM(str(model_folder(folder)), device=str(device), batch_size=8)
        for text in options.tasks:
            task, _, shots = text.partition(':')
            how = dict(num_fewshot=int(shots or 0), task_manager=manager, bootstrap_iters=0)
            found = lm_eval.simple_evaluate(model, tasks=[task], **how)['results']
            for name in [task] if task in found else found:  # a group's parts count within it
                for metric, value in found[name].items():
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

    data: str = 'pydocs'  # prepared corpus whose validation split is used
    data_dir: str = 'data'  # where prepared corpora are
    eval_tokens: Natural = 1048576  # validation tokens; 0: the whole split
    block_size: Natural = 0  # tokens of context; 0: what the models were trained with
    kl_examples: Natural = 256  # sequences for KL and agreement (the paper: 10000); 0: none
    drafts: tuple[str, ...] = ()  # models that draft for the last one that is evaluated
    draft_prompts: Count = 1000  # beginnings of validation sequences that are continued for that
    draft_tokens: Count = 8  # drafted ahead
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness: arc_easy, mmlu:5 (with 5 examples)
    average: tuple[str, ...] = ()  # of these metrics (hellaswag acc_norm); empty: of every acc
    task_folder: str = ''  # folder of task files of your own, beside the harness' tasks
    out: str = ''  # folder of evaluation.json; empty: the first one, of a hub model out/NAME
    device: str = 'auto'  # cuda, mps or cpu


def members(folders):
    """The models among folders, and of runs those of their finished stages. UserError for none."""
    found = []
    for folder in folders:
        is_run = any(Path(folder).glob('*/result.json'))
        found += [r.folder for r in finished_stages(folder)] if is_run else [str(Path(folder))]
    if not found:
        raise UserError('nothing to evaluate; usage: evaluate.py FOLDER [FOLDER ...]')
    return found


def open_model(folder, device):
    """A model for evaluation: on a GPU in bfloat16."""
    model = load(folder, device).eval()
    return model.to(torch.bfloat16) if device.type == 'cuda' else model


def evaluate_folders(folders, options):
    """Everything the options ask for: {'models': records, 'pairs': records, 'drafts': records}."""
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
    set_threads(device, max(configs.values(), key=lambda config: config.n_embd), 8 * block_size)
    opened = partial(open_model, device=device)
    outcome = dict(models=[])
    for name in folders:
        batches = validation_batches(corpus.val, block_size, 8, options.eval_tokens, Share(device))
        loss = evaluate(opened(name), batches)
        print(f'{name}: validation loss {loss:.4f}', flush=True)  # what follows may fail
        row = {'model': name, 'N': configs[name].num_params(), 'val loss': loss}
        row['perplexity'] = math.exp(loss)
        row['bits/byte'] = bits_per_byte(loss, corpus.bytes_per_token)
        if options.tasks:
            row |= run_tasks(name, options, device)
        outcome['models'].append(row)

    def examples(n):  # (n, block_size), spread over the validation split
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
    """Command line: folders, config files and knobs."""
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
