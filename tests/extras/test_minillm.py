"""
Learning from answers: the gradient of on-policy distillation against the divergence of whole
answers, all enumerated; answers across two vocabularies; and how good answers are.
"""

import itertools
import json

import pytest
import torch
from conftest import run_command, train_tokenizer

import data.prepare
import extras.minillm
import train
from data.instruct import Examples, prompt
from data.prepare import Preparation, prepare
from engine.errors import UserError
from engine.stage import Progress, Result
from extras.minillm import (
    MiniLLM,
    answer,
    answer_texts,
    mixture,
    policy_loss,
    pseudo_answers,
    returns,
    rouge_l,
    score,
    scored_prompts,
)
from model import GPT, GPTConfig


def tiny(seed, vocab_size=3, **more):
    torch.manual_seed(seed)
    shape = dict(n_layer=1, n_head=1, n_embd=4, n_mlp=4, block_size=8, init_std=0.8)
    return GPT(GPTConfig(**shape | dict(vocab_size=vocab_size) | more)).double()


def log_probabilities(model, ids, start):
    """log p of each token of ids (n, T) from `start` on, given those before it: (n, T - start)."""
    logs = model(ids[:, :-1]).logits.log_softmax(-1)
    return logs.gather(-1, ids[:, 1:, None])[:, start - 1 :, 0]


def test_the_expected_gradient_is_that_of_the_divergence_between_answers():
    """
    KL(q || p) over all 27 answers of 3 tokens to one prompt: its gradient, and the mean of the
    estimate over the answers drawn.
    """
    student, teacher, length = tiny(0), tiny(1), 3
    ids = torch.tensor([[0, *y] for y in itertools.product(range(3), repeat=length)])
    log_q, log_p = log_probabilities(student, ids, 1), log_probabilities(teacher, ids, 1).detach()
    exact = torch.autograd.grad(
        (log_q.sum(1).exp() * (log_q.sum(1) - log_p.sum(1))).sum(), student.parameters()
    )
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    pad = torch.zeros(len(ids), 1, dtype=torch.float64)
    log_ratio = torch.cat((pad, (log_p - log_q).detach()), 1)
    rollout = dict(ids=ids, mask=mask, log_q=torch.cat((pad, log_q.detach()), 1))
    later = log_ratio.flip(1).cumsum(1).flip(1) - log_ratio  # not normalised by their number
    rollout |= dict(weight=torch.ones_like(log_ratio), R=later)
    estimate = [torch.zeros_like(p) for p in student.parameters()]
    for i, probability in enumerate(log_q.detach().sum(1).exp()):  # as the student draws them
        one = {name: t[i : i + 1] for name, t in rollout.items()}
        x = one['ids'][:, :-1]
        loss, _ = policy_loss(student(x).logits, teacher(x).logits, one)
        for total, g in zip(estimate, torch.autograd.grad(loss, student.parameters())):
            total += probability * g
    for ours, wanted in zip(estimate, exact, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-4)  # log-softmax is in float32


def test_returns_are_the_mean_over_later_tokens_alone():
    log_ratio = torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    assert returns(log_ratio, mask).tolist() == [[0, 3, 4, 0, 0]]


def test_clipping_stops_what_has_moved_far_enough():
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    rollout = dict(ids=torch.tensor([[0, 1]]), mask=torch.tensor([[False, True]]))
    rollout |= dict(weight=torch.ones(1, 2), R=torch.tensor([[0.0, 1.0]]))
    rollout['log_q'] = torch.tensor([[0.0, -3.0]])
    policy_loss(logits, logits.detach(), rollout)[0].backward()  # risen from -3 to -1.1: no further
    assert logits.grad.abs().max() < 1e-6
    rollout['log_q'] = torch.tensor([[0.0, -1.1]])
    policy_loss(logits, logits.detach(), rollout)[0].backward()
    assert logits.grad[0, 0, 1] < 0


PROMPTS = [torch.tensor(p) for p in ([1], [2, 3, 1], [0, 1, 2, 3, 2])]


@pytest.mark.parametrize('share', [0.0, 0.2, 1.0])
def test_answers_to_prompts_of_any_lengths(share):
    models = [tiny(seed, 5, block_size=16).float() for seed in (0, 1)]
    how = share, torch.Generator().manual_seed(0)
    ids, mask, logs = answer(models, PROMPTS, (4,), 6, *how)
    for i, p in enumerate(PROMPTS):
        row, said = ids[i], mask[i]
        assert row[: len(p)].tolist() == p.tolist()
        assert not said[: len(p)].any() and said[len(p)] and said.sum() <= 6
        ended = (row[said] == 4).nonzero()
        assert len(ended) <= 1 and (not len(ended) or int(ended[0]) == said.sum() - 1)
        for model, log in zip(models, logs):
            alone = model(row[None]).logits.log_softmax(-1)[0, :-1].gather(-1, row[1:, None])[:, 0]
            torch.testing.assert_close(log[i, 1:][said[1:]], alone[said[1:]], atol=1e-5, rtol=1e-4)
    q, p = logs.exp()
    torch.testing.assert_close(mixture(logs, share).exp(), (1 - share) * q + share * p)


def test_what_is_drawn_is_drawn_from_the_mixture():
    models, n = [tiny(seed, 5, block_size=16).float() for seed in (0, 1)], 4000
    prompts = [torch.tensor([2, 1])] * n
    for share in (0.0, 0.5, 1.0):
        ids, _, _ = answer(models, prompts, (4,), 1, share, torch.Generator().manual_seed(0))
        q, p = (m(prompts[0][None]).logits[0, -1].softmax(-1) for m in models)
        found = torch.bincount(ids[:, 2], minlength=5) / n
        torch.testing.assert_close(found, (1 - share) * q + share * p, atol=0.03, rtol=0)


def test_the_likeliest_answers_are_those_of_generate():
    model = tiny(0, 7, block_size=24).float()
    ids, mask, _ = answer([model], PROMPTS, (6,), 5)
    for row, said, p in zip(ids, mask, PROMPTS):
        alone = model.generate(p[None], 5, 0.0)[0, len(p) :]
        assert row[said].tolist() == alone.tolist()[: int(said.sum())]


@pytest.fixture
def on_policy(data_dir, tmp_path):
    """(makes the objective, student): 4 answers serve 8 steps of 2."""
    student, teacher = (tiny(seed, 257, block_size=32).float() for seed in (0, 1))
    teacher.save(tmp_path / 'teacher')
    examples = Examples('signatures', data_dir, 'train')
    return lambda: MiniLLM(tmp_path / 'teacher', examples, 2, seed=3, batches=2), student


def losses_of(objective, student, steps, n=2):
    """The loss of each step, in micro-batches of n."""
    x, found = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0)), []
    for step in steps:
        parts = [objective(student, rows, rows, Progress(step, 100))[0] for rows in x.split(n)]
        found.append(torch.stack(parts).mean().item())
    return found


def test_answers_serve_four_epochs_and_a_run_that_goes_on(on_policy):
    make, student = on_policy
    objective, again = make(), make()
    losses = losses_of(objective, student, range(10))
    assert losses_of(make(), student, range(10), n=1) == pytest.approx(losses, rel=1e-5)
    losses_of(objective, student, range(6))
    again.state.load_state_dict(objective.state.state_dict())  # as a saved state has it
    assert losses_of(again, student, range(6, 8)) == losses[6:8]
    x = torch.randint(257, (2, 16))
    loss, count, scalars = again(student, x, x, Progress(8, 100))
    parts = sum(scalars[name].item() for name in ('single_step', 'long_range', 'text_loss'))
    assert loss.item() == pytest.approx(parts, rel=1e-5) and count == 2


def test_every_answer_that_is_drawn_is_learned_from_once_an_epoch(on_policy, monkeypatch):
    make, student = on_policy
    objective, drawn, used = make(), [], []
    draw, loss = objective.draw, policy_loss

    def drawing(*how):
        drawn.append(draw(*how))
        return drawn[-1]

    def learning(logits, theirs, rollout):
        used.append(rollout['ids'])
        return loss(logits, theirs, rollout)

    objective.draw = drawing
    monkeypatch.setattr(extras.minillm, 'policy_loss', learning)
    losses_of(objective, student, range(16))
    assert len(drawn) == 2
    for i, rollout in enumerate(drawn):
        assert not rollout['weight'][:, 0].any()  # a prompt's tokens have none
        for epoch in range(4):
            rows = torch.cat(used[8 * i + 2 * epoch : 8 * i + 2 * epoch + 2]).tolist()
            assert sorted(rows) == sorted(rollout['ids'].tolist())


def test_answers_of_a_tuned_ansnet_in_another_vocabulary_teach_a_bridge(data_dir, tmp_path):
    """It answers as it was tuned, another vocabulary learns that, and the ledger has the cost."""
    big, sets = tmp_path / 'big', tmp_path / 'data'
    train_tokenizer('byte-level', big, 300)
    for folder, size in ((big, 300), (tmp_path / 'small', 257)):
        shape = dict(n_layer=1, n_head=1, n_embd=16, head_dim=16, vocab_size=size, block_size=64)
        GPT(GPTConfig(**shape)).save(folder)
    sets.mkdir()
    (sets / 'pydocs').symlink_to(data_dir / 'pydocs')
    rows = [json.dumps(dict(instruction=f'Count to {i}.', output=f'{i}')) for i in range(40)]
    (tmp_path / 'tasks.jsonl').write_text('\n'.join(rows))
    how = dict(val_fraction=0.2, prompt='plain')
    for name, tokenizer in (('theirs', str(big)), ('tasks', 'bytes')):
        options = Preparation(str(tmp_path / 'tasks.jsonl'), str(sets / name), tokenizer, **how)
        prepare(options)
    words = [f'--ansnet={big}', '--ansnet_data=theirs', f'--bridge={tmp_path / "small"}']
    words += ['--chain=16x1', '--desnets=', '--baselines=', '--sft_data=tasks', '--sft_epochs=1']
    words += ['--tokens=640', '--bridge_epochs=1', '--block_size=64', '--eval_tokens=512']
    words += [f'--data_dir={sets}', f'--out_dir={tmp_path / "run"}', '--device=cpu', '--answers=4']
    train.main(['--method=col', *words])
    results = {p.parent.name: Result.of(p.parent) for p in tmp_path.glob('run/*/result.json')}
    tuned, bridge = results['ansnet-sft'], results['bridge']
    n = len(Examples('tasks', sets, 'train'))
    assert tuned.tokens > 0 and bridge.tokens == -(-n // 8) * 8 * 64
    learned = 6 * bridge.params * bridge.tokens
    assert bridge.flops == pytest.approx(learned + 2 * tuned.params * n * 64)
    assert bridge.inherited_flops == tuned.flops
    learned = Examples('bridge-data-1337', tmp_path / 'run', 'train')
    assert learned.tokenizer == 'bytes' and 0 < len(learned) <= n
    model, tokenizer = extras.minillm.load(tuned.folder), extras.minillm.load_tokenizer(str(big))
    for ids, said in map(learned.fit, range(len(learned))):
        question, answered = (
            bytes(part.tolist()).decode() for part in (ids[~said], ids[said][:-1])
        )
        assert [answered] == [*answer_texts(model, tokenizer, [tokenizer.encode(question)])]


def test_answers_go_on_where_they_were_interrupted(data_dir, tmp_path, monkeypatch):
    torch.manual_seed(0)
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=64)).save(tmp_path / 'm', 'bytes')
    run, out, asked = train.Run(data_dir=str(data_dir), device='cpu'), tmp_path / 'set', []

    def answers(model, tokenizer, prompts):
        for i, row in enumerate(prompts):
            asked.append(tokenizer.decode(row))
            if len(asked) == 6:
                raise KeyboardInterrupt
            yield f'answer {i}'

    monkeypatch.setattr(extras.minillm, 'answer_texts', answers)
    monkeypatch.setattr(data.prepare, 'SAVE_EVERY', 4)
    with pytest.raises(KeyboardInterrupt):
        pseudo_answers(str(tmp_path / 'm'), 'signatures', run, out)
    assert pseudo_answers(str(tmp_path / 'm'), 'signatures', run, out) == out
    n = len(Examples('signatures', data_dir, 'train'))
    assert len(asked) == 6 + n - 4 and asked[4] == asked[6]  # four were saved
    found = [Examples('set', tmp_path, split) for split in ('train', 'val')]
    assert len(found[0]) + len(found[1]) == n
    said = [bytes(ids[marks][:-1].tolist()).decode() for ids, marks in map(found[0].fit, range(5))]
    assert said == [f'answer {i}' for i in (1, 2, 3, 0, 1)]  # the first of all is for validation
    assert pseudo_answers(str(tmp_path / 'm'), 'signatures', run, out) == out  # made once
    assert len(asked) == 6 + n - 4


def test_rouge_l_is_the_share_of_the_longest_common_subsequence():
    for text, reference, common, words in (
        ('the cat sat on the mat', 'The cat lay on a mat.', 4, 12),
        ('a b c', 'c b a', 1, 6),
        ('Return 12 items, now!', 'return items 12 now', 3, 8),
        ('', 'x', 0, 1),
    ):
        found = rouge_l([text], [['another', reference]])
        assert found == pytest.approx(100 * 2 * common / words)


def test_a_model_is_scored_by_what_it_says_right(data_dir, monkeypatch):
    examples = Examples('signatures', data_dir, 'val')
    right = [ids[said][:-1] for ids, said in map(examples.fit, range(3))]
    right = [bytes(ids.tolist()).decode() for ids in right]
    monkeypatch.setattr(extras.minillm, 'answer_texts', lambda *how: [right[0], '', ''])
    found = score(None, 'signatures', data_dir, slice(3))
    assert found == {'Rouge-L': pytest.approx(100 / 3), 'exact answers': pytest.approx(1 / 3)}


def test_the_command_scores_files_by_the_closest_of_their_references(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('32x2', vocab_size=257, block_size=64))
    model.save(tmp_path / 'm', 'bytes')
    asked, tokenizer = (
        ['Name a letter.', 'Name another one.'],
        extras.minillm.load_tokenizer('bytes'),
    )
    said = answer_texts(model, tokenizer, [tokenizer.encode(prompt(a, '') + '\n') for a in asked])
    right = [dict(instruction=a, output=['xyzzy', s + ' word']) for a, s in zip(asked, said)]
    wrong = [dict(instruction=a, input='', output='xyzzy') for a in asked]
    for name, rows in (('right', right), ('wrong', wrong)):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    files = [str(tmp_path / f'{name}.jsonl') for name in ('right', 'wrong')]
    process = run_command('-m', 'extras.minillm', tmp_path / 'm', f'--answers={",".join(files)}')
    assert process.returncode == 0, process.stderr
    scores = [float(line.split()[-1]) for line in process.stdout.splitlines()]
    expected = rouge_l([row['output'][1][:-5] for row in right], [row['output'] for row in right])
    assert scores[0] == pytest.approx(expected, abs=0.01) and scores[0] > 20
    assert scores[1] == 0 and scores[2] == pytest.approx(scores[0] / 2, abs=0.01)


def test_a_prompt_is_taken_as_it_is_and_an_instruction_as_models_are_tuned(tmp_path):
    rows = [
        dict(prompt='Say a.', output='a'),
        dict(instruction='Say', input='b', output=['b', 'c']),
    ]
    (tmp_path / 'q.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    found = scored_prompts(str(tmp_path / 'q.jsonl'))
    assert found == [('Say a.', ['a']), (prompt('Say', 'b') + '\n', ['b', 'c'])]


@pytest.mark.parametrize(
    'line',
    ['{"instruction": "a"}', '{"prompt": 1, "output": "b"}', '{"prompt": "a", "output": []}']
    + ['[1]', '{', ''],
)
def test_files_without_prompts_are_refused(tmp_path, line):
    (tmp_path / 'q.jsonl').write_text(line)
    with pytest.raises(UserError, match='q.jsonl(, line 1| holds no)'):
        scored_prompts(str(tmp_path / 'q.jsonl'))
