"""
On-policy distillation: the gradient against the divergence of whole answers, computed by
enumerating them all.
"""

import itertools

import pytest
import torch
from conftest import reverse_kl

from data.instruct import Examples
from engine.stage import Progress
from extras.minillm import Answering, MiniLLM, answer, minillm, policy_loss, returns
from model import GPT, GPTConfig


def tiny(seed, vocab_size=3, **more):
    torch.manual_seed(seed)
    return GPT(
        GPTConfig(
            **{
                **dict(
                    n_layer=1,
                    n_head=1,
                    n_embd=4,
                    n_mlp=4,
                    vocab_size=vocab_size,
                    block_size=8,
                    init_std=0.8,
                ),
                **more,
            }
        )
    ).double()


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
    answers = torch.ones_like(ids, dtype=torch.bool)
    answers[:, 0] = False
    pad = torch.zeros(len(ids), 1, dtype=torch.float64)
    log_ratio = torch.cat((pad, (log_p - log_q).detach()), 1)
    estimate = [torch.zeros_like(p) for p in student.parameters()]
    for i, probability in enumerate(
        log_q.detach().sum(1).exp()
    ):  # what drawing from the student does on average
        one = slice(i, i + 1)
        rollout = dict(
            ids=ids[one],
            answers=answers[one],
            tokens=answers[one].sum(),
            log_q=torch.cat((pad, log_q.detach()), 1)[one],
            weight=torch.ones_like(log_ratio[one]),
            advantage=returns(log_ratio, answers, normalised=False)[one],
        )
        loss, _ = policy_loss(student(ids[one, :-1]).logits, teacher(ids[one, :-1]).logits, rollout)
        for total, g in zip(estimate, torch.autograd.grad(loss * length, student.parameters())):
            total += probability * g
    for ours, wanted in zip(estimate, exact, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-4)  # log-softmax is in float32


def test_returns_are_of_later_tokens_alone():
    log_ratio, answers = (
        torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0]]),
        torch.tensor([[False, True, True, True, False]]),
    )
    assert returns(log_ratio, answers, normalised=False).tolist() == [[0, 6, 4, 0, 0]] and returns(
        log_ratio, answers
    ).tolist() == [[0, 3, 4, 0, 0]]


def test_clipping_stops_what_has_moved_far_enough():
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    rollout = dict(
        ids=torch.tensor([[0, 1]]),
        answers=torch.tensor([[False, True]]),
        tokens=torch.tensor(1),
        log_q=torch.tensor([[0.0, -3.0]]),
        weight=torch.ones(1, 2),
        advantage=torch.tensor([[0.0, 1.0]]),
    )
    policy_loss(logits, logits.detach(), rollout)[
        0
    ].backward()  # log q has risen from -3 to -1.1: no further
    assert logits.grad.abs().max() < 1e-6
    rollout['log_q'] = torch.tensor([[0.0, -1.1]])
    policy_loss(logits, logits.detach(), rollout)[0].backward()
    assert logits.grad[0, 0, 1] < 0


@pytest.mark.parametrize('share', [0.0, 0.2, 1.0])
def test_answers_to_prompts_of_any_lengths(share):
    student, teacher = tiny(0, 5, block_size=16).float(), tiny(1, 5, block_size=16).float()
    prompts = [torch.tensor(p) for p in ([1], [2, 3, 1], [0, 1, 2, 3, 2])]
    generator = torch.Generator().manual_seed(0)
    how = Answering(6, ends=(4,), share=share)
    ids, answers, log_q, log_p, log_mix = answer(student, prompts, how, teacher, generator)
    for row, said, p in zip(ids, answers, prompts):
        assert (
            row[: len(p)].tolist() == p.tolist()
            and not said[: len(p)].any()
            and said[len(p)]
            and said.sum() <= 6
        )
        ended = (row[said] == 4).nonzero()
        assert len(ended) <= 1 and (not len(ended) or int(ended[0]) == said.sum() - 1)
        for model, log in ((student, log_q), (teacher, log_p)):
            alone = model(row[None]).logits.log_softmax(-1)[0, :-1].gather(-1, row[1:, None])[:, 0]
            torch.testing.assert_close(
                log[(ids == row).all(1)][0][1:][said[1:]], alone[said[1:]], atol=1e-5, rtol=1e-4
            )
    mixed = (share * log_p.exp() + (1 - share) * log_q.exp()).log()
    torch.testing.assert_close(log_mix[answers], mixed[answers], atol=1e-5, rtol=1e-4)


def test_greedy_answers_are_those_of_generate():
    model = tiny(0, 7, block_size=24).float()
    prompts = [torch.tensor(p) for p in ([1, 2], [3, 1, 2, 5])]
    ids, answers, *_ = answer(model, prompts, Answering(5, ends=(6,), temperature=0))
    for row, said, p in zip(ids, answers, prompts):
        assert (
            row[said].tolist()
            == model.generate(p[None], 5, 0.0)[0, len(p) :].tolist()[: int(said.sum())]
        )


def test_samples_serve_several_steps_and_are_kept_for_a_run_that_goes_on(data_dir, tmp_path):
    student, teacher = (tiny(seed, 257, block_size=32).float() for seed in (0, 1))
    teacher.save(tmp_path / 'teacher')
    examples, x = Examples('signatures', data_dir, 'train'), torch.randint(257, (2, 16))

    def objective():
        settings = MiniLLM(batch_size=2, seed=3, samples=4, inner_epochs=2, length=24)
        return minillm(tmp_path / 'teacher', examples, settings)

    first, pieces = objective(), objective()
    losses = [
        first(student, x, x, Progress(step, 100))[0].item() for step in range(6)
    ]  # 4 steps a batch of samples
    for step in range(6):  # micro-batches of one: the mean over the step's tokens stays
        each = [pieces(student, row, row, Progress(step, 100))[0] for row in x.split(1)]
        assert torch.stack(each).mean().item() == pytest.approx(losses[step], rel=1e-5)
    again = objective()
    again.state.load_state_dict(first.state.state_dict())  # as a saved state has it
    assert again(student, x, x, Progress(5, 100))[0].item() == losses[5]
    loss, _, scalars = first(student, x, x, Progress(6, 100))
    assert {'single_step', 'long_range', 'text_loss', 'answer_tokens'} <= scalars.keys()
    assert loss.item() == pytest.approx(
        sum(scalars[k].item() for k in ('single_step', 'long_range', 'text_loss')), rel=1e-5
    )


def test_single_step_part_is_the_reverse_divergence_on_what_was_said():
    student, teacher = tiny(0).float(), tiny(1).float()
    ids = torch.tensor([[0, 1, 2, 1]])
    answers = torch.tensor([[False, True, True, True]])
    rollout = dict(
        ids=ids,
        answers=answers,
        tokens=answers.sum(),
        log_q=torch.zeros(1, 4),
        weight=torch.ones(1, 4),
        advantage=torch.zeros(1, 4),
    )
    loss, scalars = policy_loss(student(ids[:, :-1]).logits, teacher(ids[:, :-1]).logits, rollout)
    assert loss.item() == pytest.approx(
        reverse_kl(student(ids[:, :-1]).logits, teacher(ids[:, :-1]).logits).item(), rel=1e-5
    )
