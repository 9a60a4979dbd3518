"""
Learning from answers: the gradient of on-policy distillation against the divergence of whole
answers, all enumerated; answers across two vocabularies; and how good answers are.
"""

import itertools

import pytest
import torch
from conftest import succeeds, train_tokenizer, write_lines

from data.instruct import Examples, prompt
from data.prepare import Preparation, prepare
from data.vocabulary import load_tokenizer
from engine.errors import UserError
from engine.stage import Progress, Result
from extras.minillm import (
    MiniLLM,
    answer,
    answer_texts,
    policy_loss,
    returns,
    rouge_l,
    scored_prompts,
)
from model import GPT, GPTConfig, load


def tiny(seed, vocab_size, block_size=16):
    torch.manual_seed(seed)
    shape = dict(n_layer=1, n_head=1, n_embd=4, n_mlp=4, block_size=block_size, init_std=0.8)
    return GPT(GPTConfig(**shape, vocab_size=vocab_size))


def log_probabilities(model, ids):
    """log p of each token of ids (n, T) after the first, given those before it: (n, T - 1)."""
    return model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def test_the_expected_gradient_is_that_of_the_divergence_between_answers():
    """
    KL(q || p) over all 27 answers of 3 tokens to one prompt: its gradient, and the mean of the
    estimate over the answers drawn.
    """
    student, teacher = tiny(0, 3).double(), tiny(1, 3).double()
    ids = torch.tensor([[0, *y] for y in itertools.product(range(3), repeat=3)])
    log_q, log_p = log_probabilities(student, ids), log_probabilities(teacher, ids).detach()
    divergence = (log_q.sum(1).exp() * (log_q.sum(1) - log_p.sum(1))).sum()
    exact = torch.autograd.grad(divergence, student.parameters())
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
    rollout = dict(ids=torch.tensor([[0, 1]]), mask=torch.tensor([[False, True]]))
    rollout |= dict(weight=torch.ones(1, 2), R=torch.tensor([[0.0, 1.0]]))
    for log_q, moves in ((-3.0, False), (-1.1, True)):  # risen from -3 to -1.1: no further
        logits = torch.zeros(1, 1, 3, requires_grad=True)
        rollout['log_q'] = torch.tensor([[0.0, log_q]])
        policy_loss(logits, logits.detach(), rollout)[0].backward()
        assert (logits.grad[0, 0, 1] < -1e-6) == moves


PROMPTS = [torch.tensor(p) for p in ([1], [2, 3, 1], [0, 1, 2, 3, 2])]


@pytest.mark.parametrize('share', [0.0, 0.2, 1.0])
def test_answers_to_prompts_of_any_lengths(share):
    models = [tiny(seed, 5) for seed in (0, 1)]
    ids, mask, logs = answer(models, PROMPTS, (4,), 6, share, torch.Generator().manual_seed(0))
    for i, p in enumerate(PROMPTS):
        row, said = ids[i], mask[i]
        assert row[: len(p)].tolist() == p.tolist()
        assert not said[: len(p)].any() and said[len(p)] and said.sum() <= 6
        ended = (row[said] == 4).nonzero()
        assert len(ended) <= 1 and (not len(ended) or int(ended[0]) == said.sum() - 1)
        for model, log in zip(models, logs):
            alone = log_probabilities(model, row[None])[0]
            torch.testing.assert_close(log[i, 1:][said[1:]], alone[said[1:]], atol=1e-5, rtol=1e-4)


def test_what_is_drawn_is_drawn_from_the_mixture():
    models, n, one = [tiny(seed, 5) for seed in (0, 1)], 4000, torch.tensor([2, 1])
    q, p = (m(one[None]).logits[0, -1].softmax(-1) for m in models)
    for share in (0.0, 0.5, 1.0):
        ids, *_ = answer(models, [one] * n, (4,), 1, share, torch.Generator().manual_seed(0))
        found = torch.bincount(ids[:, 2], minlength=5) / n
        torch.testing.assert_close(found, (1 - share) * q + share * p, atol=0.03, rtol=0)


@pytest.fixture
def on_policy(data_dir, tmp_path):
    """(makes the objective, student): 4 answers serve 8 steps of 2."""
    student, teacher = (tiny(seed, 257, block_size=32) for seed in (0, 1))
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
    losses = losses_of(make(), student, range(10))
    assert losses_of(make(), student, range(10), n=1) == pytest.approx(losses, rel=1e-5)
    epochs = [sum(losses[i : i + 2]) for i in range(0, 10, 2)]  # the student does not move
    assert epochs[1:4] == pytest.approx(epochs[:1] * 3) and abs(epochs[4] - epochs[0]) > 1e-2
    losses_of(objective, student, range(6))
    again.state.load_state_dict(objective.state.state_dict())  # as a saved state has it
    assert losses_of(again, student, range(6, 8)) == losses[6:8]


def test_answers_of_a_tuned_ansnet_in_another_vocabulary_teach_a_bridge(data_dir, tmp_path):
    """It answers as it was tuned, another vocabulary learns that, and the ledger has the cost."""
    big = train_tokenizer(tmp_path / 'big', vocab_size=300)
    for name, size in (('big', 300), ('small', 257)):
        shape = dict(vocab_size=size, block_size=64)
        GPT(GPTConfig.named('16x1', **shape)).save(tmp_path / name)
    rows = [dict(instruction=f'Count to {i}.', output=f'{i}') for i in range(40)]
    path = write_lines(tmp_path / 'tasks.jsonl', rows)
    for name, tokenizer in (('theirs', big), ('tasks', 'bytes')):
        how = dict(val_fraction=0.2, prompt='plain')
        prepare(Preparation(path, str(tmp_path / 'data' / name), tokenizer, **how))
    (tmp_path / 'data' / 'pydocs').symlink_to(data_dir / 'pydocs')
    line = f'train.py --method=col --ansnet={big} --ansnet_data=theirs --bridge={tmp_path}/small'
    line += ' --chain=16x1 --desnets= --baselines= --sft_data=tasks --sft_epochs=1 --tokens=640'
    line += ' --bridge_epochs=1 --block_size=64 --eval_tokens=512 --answers=4'
    succeeds(f'{line} --data_dir={tmp_path}/data --out_dir={tmp_path}/run')
    tuned, bridge = (Result.of(tmp_path / 'run' / name) for name in ('ansnet-sft', 'bridge'))
    assert bridge.inherited_flops == tuned.flops > 0
    learned = Examples('bridge-data-1337', tmp_path / 'run', 'train')
    model, tokenizer = load(tuned.folder), load_tokenizer(big)
    for ids, said in map(learned.fit, range(len(learned))):
        question, found = (bytes(p.tolist()).decode() for p in (ids[~said], ids[said][:-1]))
        assert [found] == [*answer_texts(model, tokenizer, [tokenizer.encode(question)])]


# ----------------------------------------------------------------------------------------------
# how good answers are


def test_rouge_l_is_the_share_of_the_longest_common_subsequence():
    for text, reference, common, words in (
        ('the cat sat on the mat', 'The cat lay on a mat.', 4, 12),
        ('a b c', 'c b a', 1, 6),
        ('Return 12 items, now!', 'return items 12 now', 3, 8),
        ('', 'x', 0, 1),
    ):
        found = rouge_l([text], [['another', reference]])
        assert found == pytest.approx(100 * 2 * common / words)


def test_the_command_scores_files_by_the_closest_of_their_references(tmp_path):
    model, tokenizer = tiny(0, 257, block_size=64), load_tokenizer('bytes')
    model.save(tmp_path / 'm', 'bytes')
    asked = prompt('Name a letter.', '') + '\n'
    (said,) = answer_texts(model, tokenizer, [tokenizer.encode(asked)])
    right = dict(instruction='Name a letter.', output=['xyzzy', said + ' word'])
    rows = dict(right=right, wrong=right | dict(output='xyzzy'))
    paths = [write_lines(tmp_path / name, [row]) for name, row in rows.items()]
    out = succeeds(f'-m extras.minillm {tmp_path}/m --answers={",".join(paths)}')
    scores = [float(line.split()[-1]) for line in out.splitlines()]
    expected = rouge_l([said], [right['output']])
    assert scores == pytest.approx([expected, 0, expected / 2], abs=0.01) and expected > 20


def test_a_prompt_is_taken_as_it_is_and_an_instruction_as_models_are_tuned(tmp_path):
    rows = [dict(prompt='Say a.', output='a')]
    rows.append(dict(instruction='Say', input='b', output=['b', 'c']))
    path = tmp_path / 'q.jsonl'
    found = scored_prompts(write_lines(path, rows))
    assert found == [('Say a.', ['a']), (prompt('Say', 'b') + '\n', ['b', 'c'])]
    for line in ('{"instruction": "a"}', '{"prompt": "a", "output": []}', '[1]', '{', ''):
        path.write_text(line)
        with pytest.raises(UserError, match='q.jsonl(, line 1| holds no)'):
            scored_prompts(str(path))
