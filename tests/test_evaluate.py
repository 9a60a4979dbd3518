"""Evaluation: the mean is over targets, and the report says what the results say."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command, train_tokenizer, write_texts
from test_model import small, tokens

from configurator import configure
from data.vocabulary import load_tokenizer
from engine.errors import UserError
from engine.stage import Result
from evaluate import Evaluation, evaluate, kl_divergence, pairs_to_compare, run_tasks
from model import GPT, GPTConfig


def test_the_mean_is_over_targets_not_over_batches():
    model, x, y = small(), tokens(4), tokens(4).roll(1, 1)
    y_padded = torch.cat((y[3:], torch.full_like(y[:2], -100)))
    x_padded = torch.cat((x[3:], x[:2]))
    found = evaluate(model, [(x[:3], y[:3], 60), (x_padded, y_padded, 20)])
    assert found == pytest.approx(model(x, y).loss.item(), abs=1e-6)
    assert model.training


# ----------------------------------------------------------------------------------------------
# how alike


def test_kl_divergence_is_the_mean_over_positions_then_examples():
    one, other, x = small(), small(n_layer=2), tokens(5, 12)
    p, q = one(x).logits.softmax(-1), other(x).logits.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean(1).mean().item()
    assert kl_divergence(one, other, x) == pytest.approx(expected, rel=1e-4)
    assert kl_divergence(one, one, x) == 0 and kl_divergence(other, one, x) != pytest.approx(
        expected, rel=1e-2
    )


def test_neighbours_in_a_family_and_one_size_across_families_are_compared(tmp_path):
    alone = dict(independent='wsd')
    runs = dict(a={}, b={}, alone_a=alone, alone_b=alone, b_s1=dict(seed=1))
    for name, labels in runs.items():
        (tmp_path / name).mkdir()
        labels = dict(size='a' if name[-1] == 'a' else 'b', seed=0) | labels
        Result(name, str(tmp_path / name), val_loss=1.0, labels=labels).write()
    folders = [str(tmp_path / name) for name in ('a', 'b', 'alone_a', 'alone_b', 'b_s1')]
    found = [tuple(Path(f).name for f in pair) for pair in pairs_to_compare(folders)]
    assert found == [('a', 'b'), ('alone_a', 'alone_b'), ('a', 'alone_a'), ('b', 'alone_b')]
    across = pairs_to_compare(['x/32x2', 'x/64x2', 'y/32x2', 'y/64x2'])  # folders without results
    assert ('x/32x2', 'x/64x2') in across and ('x/64x2', 'y/64x2') in across and len(across) == 4


# ----------------------------------------------------------------------------------------------
# the command line, and tasks


def test_evaluating_folders(data_dir, tmp_path):
    for layers in (1, 2):
        GPT(GPTConfig.named(f'16x{layers}', vocab_size=257, block_size=32)).save(
            tmp_path / f'model{layers}', 'bytes'
        )
    process = run_command(
        'evaluate.py',
        tmp_path / 'model1',
        tmp_path / 'model2',
        f'--data_dir={data_dir}',
        '--eval_tokens=1024',
        '--kl_examples=8',
        f'--drafts={tmp_path}/model1,{tmp_path}/model2',
        '--draft_prompts=3',
    )
    assert process.returncode == 0 and 'KL(P || Q)' in process.stdout, process.stderr
    outcome = json.loads((tmp_path / 'model1' / 'evaluation.json').read_text())
    one, two = outcome['models']
    assert one['perplexity'] == pytest.approx(math.exp(one['val loss'])) and two['N'] > one['N']
    (pair,) = outcome['pairs']
    assert pair['P'].endswith('model1') and pair['KL(P || Q)'] > 0
    other, itself = outcome['drafts']  # model2 has no better draft than itself
    assert itself['acceptance rate'] == 1 and abs(itself['KL on text']) < 1e-6
    assert 0 < other['acceptance rate'] < 1 and other['seconds'] > 0
    assert other['KL on text'] == pytest.approx(pair['KL(P || Q)'], rel=0.2)
    for argument, word in (
        (tmp_path / 'nothing', 'config.json'),
        (tmp_path / 'model1', 'block_size=64, but the models read 32'),
        ('--data=no', 'nothing to evaluate'),
    ):
        how = f'--data_dir={data_dir}', '--block_size=64'
        process = run_command('evaluate.py', argument, *how)
        assert (
            process.returncode == 2 and word in process.stderr and process.stderr.count('\n') == 1
        ), process.stderr


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
"""


def test_downstream_tasks_run_through_the_harness(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval')
    real, asked = lm_eval.simple_evaluate, []

    def spy(model, **how):
        asked.append((*how['tasks'], how['num_fewshot']))
        return real(model, **how)

    monkeypatch.setattr(lm_eval, 'simple_evaluate', spy)
    (tmp_path / 'data.jsonl').write_text(
        ''.join(
            json.dumps(
                dict(
                    question=f'What is {i}?',
                    choices=['yes', 'no'],
                    answer=i % 2,
                    text=f'Some text number {i}.',
                )
            )
            + '\n'
            for i in range(6)
        )
    )
    kinds = dict(
        choose=(
            'multiple_choice',
            'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
            'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]',
        ),
        roll=(
            'loglikelihood_rolling',
            'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]',
        ),
        write=(
            'generate_until',
            'doc_to_text: "{{question}}"\ndoc_to_target: " {{answer}}"\n'
            'generation_kwargs: {until: ["?"], max_gen_toks: 4}\n'
            'metric_list: [{metric: exact_match}]',
        ),
    )
    kinds['other'] = kinds['choose']
    for name, (kind, more) in kinds.items():
        (tmp_path / f'{name}.yaml').write_text(
            TASK.format(name=name, file=tmp_path / 'data.jsonl', kind=kind, more=more)
        )
    folder = tmp_path / 'model'
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=64)).save(folder, 'bytes')
    for fewshot in (0, 1):
        tasks = ('choose:1', 'write') if fewshot else ('choose', 'roll', 'write')
        options = Evaluation(tasks=tasks, task_folder=str(tmp_path))
        outcome = run_tasks(folder, options, 'cpu')
        assert 0 <= outcome['choose acc'] <= 1 and outcome['write exact_match'] == 0
        if not fewshot:  # a model that knows nothing finds every byte as likely: 256 of them
            assert 150 < outcome['roll byte_perplexity'] < 600
    assert asked == [('choose', 0), ('roll', 0), ('write', 0), ('choose', 1), ('write', 0)]
    both = run_tasks(
        folder, Evaluation(tasks=('choose', 'other'), task_folder=str(tmp_path)), 'cpu'
    )
    assert both['average_accuracy'] == (both['choose acc'] + both['other acc']) / 2
    chosen = ('choose acc_norm', 'other acc')  # as in Table 4 of Inheritune
    options = Evaluation(tasks=('choose', 'other'), average=chosen, task_folder=str(tmp_path))
    found = run_tasks(folder, options, 'cpu')
    assert found['average_accuracy'] == sum(found[name] for name in chosen) / 2
    with pytest.raises(UserError, match='--tasks of .*invalid literal.*all'):
        run_tasks(folder, Evaluation(tasks=('choose:all',), task_folder=str(tmp_path)), 'cpu')
    with pytest.raises(UserError, match='--tasks of .*chose'):
        run_tasks(folder, Evaluation(tasks=('chose',), task_folder=str(tmp_path)), 'cpu')


@pytest.mark.parametrize('preset', sorted((ROOT / 'config').glob('tasks_*.py')), ids=str)
def test_presets_of_tasks_name_tasks_of_the_harness(preset):
    pytest.importorskip('lm_eval')
    from lm_eval.tasks import TaskManager

    options, _, _ = configure([str(preset)], Evaluation)
    tasks = {task.partition(':')[0] for task in options.tasks}
    assert tasks and tasks <= set(TaskManager().all_tasks)


def test_a_corpus_of_another_tokenizer_is_refused_with_the_command(tmp_path, data_dir):
    """Ids of bytes all exist in a larger vocabulary: a loss would be printed, and mean nothing."""
    pytest.importorskip('tokenizers')
    folder = Path(train_tokenizer('byte-level', tmp_path / 'bpe', 400))
    size = load_tokenizer(str(folder)).vocab_size
    GPT(GPTConfig.named('16x1', vocab_size=size, block_size=32)).save(folder, str(folder))
    for command in (
        ('evaluate.py', folder),
        ('inheritune.py', folder, '--samples=4'),
        ('train.py', f'--init_from={folder}', '--tokens=100', f'--out_dir={tmp_path}/run'),
    ):
        process = run_command(*command, f'--data_dir={data_dir}')
        assert process.returncode == 2, process.stderr
        assert 'has another tokenizer than pydocs (bytes)' in process.stderr
        assert f'python data/prepare.py pydocs --tokenizer={folder} --out=' in process.stderr
    text = write_texts(tmp_path / 'texts', 'txt')  # a minute less than all of pydocs
    way_out = f'--tokenizer={folder}', f'--out={tmp_path}/data/own'
    prepared = run_command('data/prepare.py', text, *way_out, '--val_fraction=0.5')
    assert prepared.returncode == 0, prepared.stderr
    knobs = ('--data=own', f'--data_dir={tmp_path}/data', '--eval_tokens=256')
    process = run_command('evaluate.py', folder, *knobs)
    assert process.returncode == 0, process.stderr
