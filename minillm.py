"""
On-policy distillation as MiniLLM does it (Gu et al., used in paper 004, Appendix C.1): the student answers prompts itself, now
and then prompted by the teacher's choice of words, and learns from the teacher's opinion of what it said.

    grad KL(q || p)  =  E_{y ~ q} sum_t [ grad KL(q(. | y_<t) || p(. | y_<t))  -  R_{t+1} grad log q(y_t | y_<t) ]

with q the student, p the teacher and R_{t+1} = sum over t' > t of log p / q at y_t' (the single-step decomposition). R is divided by
the number of its terms (length normalisation); tokens are drawn from share p + (1 - share) q and weighted by q over that; every
batch of samples serves several epochs, with the ratio of new to old q clipped as in PPO; the cross entropy of pretraining text
is added. The loop's own batches are that text.
"""
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from checkpoint import saved_states
from configurator import UserError
from data.instruct import shuffled
from let import open_teacher
from machine import processes


@torch.no_grad()
def answer(model, prompts, max_new_tokens, end, temperature=1.0, teacher=None, share=0.0, generator=None):
    """
    Continue prompts (1-d int64 tensors of any lengths) together, up to `end`. With a teacher, tokens are drawn from
    share x teacher + (1 - share) x model. Returns ids (n, T), filled up with `end`; which of them are answers (n, T) bool; and
    log q, log p, log of the mixture at each of them, float32 (n, T), 0 elsewhere (p: 0 without a teacher). Sequences stand
    side by side from their first token on: while one is still in its prompt, what is drawn for it is not used.
    """
    device, lengths = prompts[0].device, torch.tensor([len(p) for p in prompts], device=prompts[0].device)
    models = [model] if teacher is None else [model, teacher]
    limit = min(int(lengths.max()) + max_new_tokens, *(m.config.block_size for m in models))
    ids = torch.full((len(prompts), limit), end, device=device)
    for row, p in zip(ids, prompts):
        row[:len(p)] = p
    answers, done = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool, device=device)
    logs, caches = torch.zeros(3, *ids.shape, device=device), [m.new_cache(len(ids)) for m in models]
    seen = 0
    for t in range(int(lengths.min()), limit):
        every = [m(ids[:, seen:t], cache=cache).logits[:, -1].float() for m, cache in zip(models, caches)]
        every, seen = [logits[:, :model.config.vocab_size].log_softmax(-1) for logits in every], t
        mixed = every[0] if teacher is None else torch.logaddexp(
            every[0] + (math.log1p(-share) if share < 1 else -math.inf), every[1] + (math.log(share) if share else -math.inf))
        token = mixed.argmax(-1) if temperature == 0 else torch.multinomial(
            (mixed / temperature).softmax(-1), 1, generator=generator)[:, 0]
        speaking = (t >= lengths) & ~done & (t < lengths + max_new_tokens)
        ids[:, t] = torch.where(speaking, token, ids[:, t])
        answers[:, t] = speaking
        for log, values in zip(logs, (every[0], every[-1] if teacher is not None else None, mixed)):
            if values is not None:
                log[:, t] = torch.where(speaking, values.gather(-1, token[:, None])[:, 0], 0.0)
        done |= speaking & (token == end)
        if (done | (t + 1 >= lengths + max_new_tokens)).all():
            break
    return ids, answers, *logs


def returns(log_ratio, answers, normalised=True):
    """
    R_{t+1} at every answer token: the sum of log p / q over the answer's later tokens, or their mean. log_ratio (n, T), answers
    (n, T) bool; 0 at the last token and outside.
    """
    masked = torch.where(answers, log_ratio, 0.0)
    after = masked.flip(1).cumsum(1).flip(1) - masked
    if normalised:
        after = after / (answers.flip(1).cumsum(1).flip(1) - answers.int()).clamp(min=1)
    return torch.where(answers, after, 0.0)


def policy_loss(logits, their_logits, rollout, clip=0.2):
    """
    The loss whose gradient is the estimate above, a mean over answer tokens. logits, their_logits: (n, T - 1, V) of student and
    teacher on ids[:, :-1]; rollout: ids, answers, log_q (when it was drawn), weight, advantage = R_{t+1}, each (n, T).
    """
    target, answers = rollout['ids'][:, 1:], rollout['answers'][:, 1:]
    weight = torch.where(answers, rollout['weight'][:, 1:], 0.0) / answers.sum().clamp(min=1)
    log_q = logits.float().log_softmax(-1)
    log_p = their_logits.detach().float()[..., :log_q.shape[-1]].log_softmax(-1)
    single = (weight * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()
    ratio = (log_q.gather(-1, target[..., None])[..., 0] - rollout['log_q'][:, 1:]).exp()
    advantage = rollout['advantage'][:, 1:]
    long = -(weight * torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)).sum()
    return single + long, dict(single_step=single, long_range=long)


def minillm(teacher, examples, folder, batch_size, seed, samples=256, epochs=4, share=0.2, clip=0.2, length=512, text=1.0):
    """
    The objective of on-policy distillation from a model folder. examples: data.instruct.Examples, whose prompts are answered;
    folder: the stage's, where each batch of `samples` answers is kept, so that an interrupted run goes on with the same;
    batch_size: of a step, over all processes; every batch of samples serves `epochs` times; length: tokens of prompt and answer;
    text: weight of the cross entropy on the loop's own batches.
    """
    state, batches = {}, max(1, samples // batch_size)
    steps = batches * epochs   # that a batch of samples serves

    def objective(model, x, y, progress):
        if isinstance(model, FSDPModule):   # every pass is a collective, and answers end when they end
            raise UserError('a sharded model cannot answer on each process by itself: minillm needs --parallel=ddp')
        if 'teacher' not in state:
            state['teacher'] = open_teacher(teacher, x.device)
        rank, world = processes()
        first = progress.step // steps * steps
        if state.get('first') != first:
            bare = getattr(model, 'module', model)
            path = Path(folder) / f'rollout-{first:09d}-{rank}of{world}.safetensors'
            state.update(first=first, rollout=_rollout(path, getattr(bare, '_orig_mod', bare), state['teacher'], first, rank, world))
        if state.get('step') != progress.step:
            state.update(step=progress.step, used=0)
        here, mine = progress.step - first, len(state['rollout']['ids'])
        order = torch.randperm(mine, generator=torch.Generator().manual_seed(hash((seed, first, here // batches))))
        share_of_batch = batch_size // world
        rows = order[here % batches * share_of_batch:][state['used']:state['used'] + len(x)]
        state['used'] += len(x)
        part = {name: tensor[rows.to(x.device)] for name, tensor in state['rollout'].items()}
        with torch.no_grad():
            their_logits = state['teacher'](part['ids'][:, :-1]).logits
        loss, scalars = policy_loss(model(part['ids'][:, :-1]).logits, their_logits, part, clip)
        pretraining = model(x, y).loss if text else loss.new_zeros(())
        answered = part['answers'].sum() / len(part['ids'])
        return loss + text * pretraining, dict(scalars, text_loss=pretraining, answer_tokens=answered)

    def _rollout(path, student, their, first, rank, world):
        device = student.wte.weight.device
        if path.is_file():
            try:
                return load_file(path, device=str(device))
            except (SafetensorError, OSError):
                pass   # cut short by a crash: drawn again, to the same
        for old in Path(folder).glob(f'rollout-*-{rank}of{world}.safetensors'):   # the oldest state may still need the newer ones
            states = saved_states(folder)
            if states and int(old.name.split('-')[1]) + steps <= int(states[0].name.partition('-')[2]):
                old.unlink(missing_ok=True)
        positions = torch.arange(samples)[rank::world].numpy() + first // steps * samples
        indices, room = shuffled(positions, len(examples), seed), min(length, student.config.block_size)
        prompts = [torch.from_numpy(examples.prompt(i, room // 2)).to(device) for i in indices]
        generator = torch.Generator(device).manual_seed(hash((seed, first, rank)) % 2 ** 63)
        ids, answers, log_q, log_p, log_mix = answer(student, prompts, room // 2, examples.end, 1.0, their, share, generator)
        rollout = dict(ids=ids, answers=answers, log_q=log_q, weight=torch.where(answers, (log_q - log_mix).exp(), 0.0),
                       advantage=returns(log_p - log_q, answers))
        save_file({name: tensor.contiguous() for name, tensor in rollout.items()}, f'{path}.tmp')
        Path(f'{path}.tmp').replace(path)
        return rollout
    return objective
