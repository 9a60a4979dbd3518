"""Evaluation: the mean is over targets; how alike two models are; tasks of the harness."""

import json
import math
import re
from functools import cache

import pytest
import torch
from conftest import ROOT, call, refuses, succeeds, train_tokenizer, write_lines, write_texts
from test_model import small, tokens

from configurator import configure
from data.vocabulary import load_tokenizer
from evaluate import Evaluation, evaluate, kl_divergence, run_tasks
from model import GPT, GPTConfig


def test_the_mean_is_over_targets_not_over_batches():
    model, x, y = small(), tokens(4), tokens(4).roll(1, 1)
    y_padded = torch.cat((y[3:], torch.full_like(y[:2], -100)))
    x_padded = torch.cat((x[3:], x[:2]))
    found = evaluate(model, [(x[:3], y[:3], 60), (x_padded, y_padded, 20)])
    assert found == pytest.approx(model(x, y).loss.item(), abs=1e-6)
    assert model.training


def test_kl_divergence_is_the_mean_over_positions_then_examples():
    one, other, x = small(), small(n_layer=2), tokens(5, 12)
    p, q = one(x).logits.softmax(-1), other(x).logits.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean(1).mean().item()
    assert kl_divergence(one, other, x) == pytest.approx(expected, rel=1e-4)
    assert kl_divergence(other, one, x) != pytest.approx(expected, rel=1e-2)


def test_evaluating_folders(data_dir, tmp_path):
    for name in ('16x1', '16x2'):
        GPT(GPTConfig.named(name, vocab_size=257, block_size=32)).save(tmp_path / name, 'bytes')
    one, other = tmp_path / '16x1', tmp_path / '16x2'
    line = f'evaluate.py {one} {other} --data_dir={data_dir} --eval_tokens=1024 --kl_examples=8'
    out = succeeds(f'{line} --drafts={one},{other} --draft_prompts=3')
    assert 'KL(P || Q)' in out
    outcome = json.loads((one / 'evaluation.json').read_text())
    first, _ = outcome['models']
    assert first['perplexity'] == pytest.approx(math.exp(first['val loss']))
    (pair,) = outcome['pairs']
    drafted, itself = outcome['drafts']  # a model has no better draft than itself
    assert itself['acceptance rate'] == 1 and abs(itself['KL on text']) < 1e-6
    assert 0 < drafted['acceptance rate'] < 1
    assert drafted['KL on text'] == pytest.approx(pair['KL(P || Q)'], rel=0.2)
    refuses(f'evaluate.py {one} --data_dir={data_dir} --block_size=64', 'but the models read 32')
    refuses('evaluate.py --data=no', 'nothing to evaluate')


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
"""
CHOOSE = 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
CHOOSE += 'metric_list: [{metric: acc}, {metric: acc_norm}]'
ROLL = 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]'
WRITE = 'doc_to_text: "{{question}}"\ndoc_to_target: " {{answer}}"\n'
WRITE += 'generation_kwargs: {until: ["?"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]'


def test_downstream_tasks_run_through_the_harness(data_dir, tmp_path, monkeypatch):
    tasks = pytest.importorskip('lm_eval.tasks')
    monkeypatch.setattr(tasks, 'TaskManager', cache(tasks.TaskManager))  # it takes seconds
    rows = [
        dict(question=f'{i}?', choices=['yes', 'no'], answer=i % 2, text=f'Text {i}.')
        for i in range(6)
    ]
    file = write_lines(tmp_path / 'data.jsonl', rows)
    for name, kind, more in (
        ('choose', 'multiple_choice', CHOOSE),
        ('other', 'multiple_choice', CHOOSE),
        ('roll', 'loglikelihood_rolling', ROLL),
        ('write', 'generate_until', WRITE),
    ):
        task = TASK.format(name=name, file=file, kind=kind, more=more)
        (tmp_path / f'{name}.yaml').write_text(task)
    folder = tmp_path / 'model'
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=64)).save(folder, 'bytes')
    chosen = ('choose acc_norm', 'other acc')  # as in Table 4 of Inheritune
    tasks = ('choose', 'roll', 'write', 'other:1')
    options = Evaluation(tasks=tasks, average=chosen, task_folder=str(tmp_path))
    found = run_tasks(folder, options, 'cpu')
    assert 0 <= found['choose acc'] <= 1 and found['write exact_match'] == 0
    # a model that knows nothing finds every byte as likely: 256 of them
    assert 150 < found['roll byte_perplexity'] < 600
    assert found['average_accuracy'] == sum(found[name] for name in chosen) / 2
    line = f'evaluate.py {folder} --data_dir={data_dir} --eval_tokens=256 --tasks=chose'
    failed = call(f'{line} --task_folder={tmp_path}')
    assert re.search('--tasks of .*chose', failed.stderr) and failed.returncode == 2
    assert 'model: validation loss 5.' in failed.stdout  # printed before what may fail


def test_presets_of_tasks_name_tasks_of_the_harness():
    pytest.importorskip('lm_eval')
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for preset in (ROOT / 'config').glob('tasks_*.py'):
        options, _, _ = configure([str(preset)], Evaluation)
        tasks = {task.partition(':')[0] for task in options.tasks}
        assert tasks and tasks <= known, preset


def test_a_corpus_of_another_tokenizer_is_refused_with_the_command(tmp_path, data_dir):
    """Ids of bytes all exist in a larger vocabulary: a loss would be printed, and mean nothing."""
    folder = train_tokenizer(tmp_path / 'bpe')
    size = load_tokenizer(folder).vocab_size
    GPT(GPTConfig.named('16x1', vocab_size=size, block_size=32)).save(tmp_path / 'bpe', folder)
    words = (
        r'has another tokenizer than pydocs \(bytes\).*python data/prepare.py .*pydocs.txt --token'
    )
    for line in (f'evaluate.py {folder}', f'inheritune.py {folder}'):
        refuses(f'{line} --data_dir={data_dir}', words)
    texts = write_texts(tmp_path / 'texts', 'txt')
    way_out = f'--tokenizer={folder} --out={tmp_path}/data/own --val_fraction=0.5'
    succeeds(f"data/prepare.py '{texts}' {way_out}")
    succeeds(f'evaluate.py {folder} --data=own --data_dir={tmp_path}/data --eval_tokens=256')
