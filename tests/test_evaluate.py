"""Evaluation: the mean is over targets, and the report says what the results say."""

import json
import math
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command, train_tokenizer, write_texts
from test_model import small, tokens

from configurator import configure
from data.instruct import prompt
from data.vocabulary import load_tokenizer
from engine.errors import UserError
from evaluate import (
    Evaluation,
    average_accuracy,
    compare_all,
    curves_over_training,
    evaluate,
    evaluation_tables,
    kl_divergence,
    open_for_evaluation,
    run_tasks,
    sliding_window_loss,
)
from extras.bridge import rouge_l, scored_prompts, text_generator
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


def test_matrices_of_a_family():
    models, x = [small(), small(n_layer=2), small()], tokens(6, 12)
    kl, agreement = compare_all([partial(lambda model: model, model) for model in models], x)
    assert (kl >= 0).all() and kl[0, 2] == 0 == kl[1, 1] and kl[0, 1] == kl[2, 1] > 0
    assert (
        torch.equal(agreement, agreement.T)
        and (agreement.diagonal() == 1).all()
        and agreement[0, 1] < 1
    )
    share = (
        (models[0](x).logits.argmax(-1) == models[1](x).logits.argmax(-1)).double().mean().item()
    )
    assert agreement[0, 1].item() == pytest.approx(share)


def test_sliding_window_scores_every_token_once_with_context():
    model, text = small(), tokens(1, 60)[0].numpy()
    side_by_side = sliding_window_loss(model, text, 12, 12, 'cpu')
    sums = [
        (
            model(
                torch.tensor(text[None, i : i + 12])[:, : len(text) - 1 - i],
                torch.tensor(text[None, i + 1 : i + 13]),
            ).loss.item(),
            min(12, 59 - i),
        )
        for i in range(0, 59, 12)
    ]
    assert side_by_side == pytest.approx(sum(loss * n for loss, n in sums) / 59, rel=1e-5)
    one_by_one = sliding_window_loss(model, text, 12, 1, 'cpu')
    logits = [
        model(torch.tensor(text[None, max(0, i - 12) : i]))
        .logits[0, -1]
        .log_softmax(-1)[text[i]]
        .item()
        for i in range(12, 60)
    ]
    first = model(torch.tensor(text[None, :12]), torch.tensor(text[None, 1:13])).loss.item() * 12
    assert one_by_one == pytest.approx((first - sum(logits[1:])) / 59, rel=1e-4)


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
        '--stride=16',
        f'--drafts={tmp_path}/model1,{tmp_path}/model2',
        '--draft_prompts=3',
        f'--out={tmp_path}/out',
    )
    assert (
        process.returncode == 0
        and '| model2 |' in process.stdout
        and 'KL divergence' in process.stdout
    ), process.stderr
    outcome = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert outcome['models']['model1']['perplexity'] == pytest.approx(
        math.exp(outcome['models']['model1']['val_loss'])
    )
    assert (
        len(outcome['kl']) == 2
        and outcome['kl'][0][0] == 0
        and 'sliding_window_perplexity' in outcome['models']['model2']
    )
    alone, other, itself = outcome['drafting']  # model2 has no better draft than itself
    assert alone['seconds'] > 0 and other['draft'].endswith('model1')
    assert itself['acceptance rate'] == 1 and abs(itself['KL where it drafts']) < 1e-6
    assert 0 < other['acceptance rate'] < 1
    assert other['KL(draft || model) on text'] == pytest.approx(outcome['kl'][0][1], rel=0.2)
    for argument, word in (
        (tmp_path / 'nothing', 'config.json'),
        ('--data=no', 'nothing to evaluate'),
    ):
        process = run_command('evaluate.py', argument, f'--data_dir={data_dir}')
        assert (
            process.returncode == 2 and word in process.stderr and process.stderr.count('\n') == 1
        ), process.stderr


def test_at_most_two_models_are_open_and_in_the_dtype_that_is_asked_for(tmp_path):
    x, alive = tokens(2, 12), weakref.WeakSet()

    def opener():
        model = small()
        alive.add(model)
        assert len(alive) <= 2
        return model

    compare_all([opener] * 4, x)
    small().save(tmp_path, 'bytes')
    half = open_for_evaluation(tmp_path, torch.device('cpu'), 'bfloat16')
    assert half.wte.weight.dtype == torch.bfloat16
    assert kl_divergence(half, open_for_evaluation(tmp_path, torch.device('cpu'), 'auto'), x) < 1e-3


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
        asked.append((how['tasks'], how['num_fewshot']))
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
            'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]',
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
        assert 0 <= outcome['choose']['acc'] <= 1 and outcome['write']['exact_match'] == 0
        if not fewshot:  # a model that knows nothing finds every byte as likely: 256 of them
            assert 150 < outcome['roll']['byte_perplexity'] < 600
    assert asked == [(['choose', 'roll', 'write'], 0), (['choose'], 1), (['write'], 0)]
    with pytest.raises(UserError, match='write TASK or TASK:EXAMPLES, as mmlu:5'):
        run_tasks(folder, Evaluation(tasks=('choose:all',), task_folder=str(tmp_path)), 'cpu')
    with pytest.raises(UserError, match='choose is asked for twice'):
        run_tasks(folder, Evaluation(tasks=('choose', 'choose:5')), 'cpu')
    with pytest.raises(UserError, match='no task .chose.'):
        run_tasks(folder, Evaluation(tasks=('chose',), task_folder=str(tmp_path)), 'cpu')


def test_answers_are_scored_by_the_closest_of_their_references(data_dir, tmp_path):
    """Of several references the one counts that is most like what the model says."""
    torch.manual_seed(0)
    config = GPTConfig.named('32x2', vocab_size=257, block_size=64)
    GPT(config).save(tmp_path / 'm', 'bytes')
    asked = ['Name a letter.', 'Name another one.', 'And one more.']
    said = text_generator(str(tmp_path / 'm'), max_new_tokens=32)(
        [prompt(a, '') + '\n' for a in asked]
    )
    right = [dict(instruction=a, output=['xyzzy', s + ' word']) for a, s in zip(asked, said)]
    wrong = [dict(instruction=a, input='', output='xyzzy') for a in asked]
    for name, rows in (('right', right), ('wrong', wrong)):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    files = [str(tmp_path / f'{name}.jsonl') for name in ('right', 'wrong')]
    how = [f'--data_dir={data_dir}', '--eval_tokens=256', f'--answers={",".join(files)}']
    process = run_command('evaluate.py', tmp_path / 'm', *how, '--answer_tokens=32')
    assert process.returncode == 0, process.stderr
    (row,) = json.loads((tmp_path / 'm' / 'evaluation.json').read_text())['models'].values()
    scores = [row['answers'][file]['Rouge-L'] for file in files]
    expected = [max(rouge_l(s, r) for r in row['output']) for s, row in zip(said, right)]
    assert scores == [pytest.approx(100 * sum(expected) / 3), 0.0] and scores[0] > 20
    assert row['average_Rouge-L'] == pytest.approx(scores[0] / 2)
    assert 'average Rouge-L' in process.stdout


def test_a_prompt_is_taken_as_it_is_and_an_instruction_as_models_are_tuned(tmp_path):
    rows = [
        dict(prompt='Say a.', output='a'),
        dict(instruction='Say', input='b', output=['b', 'c']),
    ]
    (tmp_path / 'q.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = scored_prompts(str(tmp_path / 'q.jsonl'))
    assert found == [('Say a.', ['a']), (prompt('Say', 'b') + '\n', ['b', 'c'])]


@pytest.mark.parametrize(
    'text, word',
    [
        ('', 'holds no records'),
        ('{"instruction": "a"}', 'line 1: not instruction'),
        ('{"prompt": 1, "output": "b"}', 'line 1'),
        ('{"instruction": "a", "output": []}', 'line 1'),
        ('[1]', 'line 1'),
        ('{', 'line 1: JSONDecodeError'),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, text, word):
    (tmp_path / 'q.jsonl').write_text(text)
    with pytest.raises(UserError, match=word):
        scored_prompts(str(tmp_path / 'q.jsonl'))


def test_the_average_is_of_tasks_with_an_accuracy_and_drawn_over_training(tmp_path):
    scores = dict(a=dict(acc=0.25), b=dict(acc=0.75, acc_norm=0.5), c=dict(perplexity=9.0))
    scores |= {'b_part': dict(acc=0.9)}  # of a group
    assert average_accuracy(scores, ('a', 'b:5', 'c')) == dict(average_accuracy=0.5)
    assert average_accuracy(scores, ('a', 'c')) == {}
    stage = tmp_path / 'let-0'
    stage.mkdir()
    lines = '{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 9.0, "data_loss": 2.0}\n{"step": 30}\n'
    (stage / 'metrics.jsonl').write_text(lines)
    row = dict(n_params=1, val_loss=1.0, perplexity=2.7, average_accuracy=0.5)
    models = {'let-0/step-20': row, 'let-0/step-9': row | dict(average_accuracy=0.4)}
    models |= {'let-0': row | dict(average_accuracy=0.6), 'other': row}
    folders = {name: str(tmp_path / name) for name in models}
    outcome = dict(models=models)
    loss, perplexity, accuracy = curves_over_training(outcome, folders)
    assert [(line.label, line.x, line.y) for line in loss.lines] == [('let-0', [10, 20], [3, 2])]
    assert (accuracy.lines[0].x, accuracy.lines[0].y) == ([9, 20, 30], [0.4, 0.5, 0.6])
    assert perplexity.lines[0].y == [2.7] * 3
    assert evaluation_tables(outcome).split('\n')[0].endswith('| average accuracy |')


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
        ('inheritune.py', folder, '--samples=4', '--length=16'),
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
