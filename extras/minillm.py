"""
On-policy distillation as MiniLLM does it (Gu et al.; Chain-of-Learngene, Appendix C.1): the
student answers prompts itself, now and then with a word of the teacher's choice, and learns from
the teacher's opinion of what it said.

    grad KL(q || p) = E_{y ~ q} sum_t [ grad KL(q(. | y_<t) || p(. | y_<t))
                                        - R_{t+1} grad log q(y_t | y_<t) ]

with q the student, p the teacher and R_{t+1} = sum over t' > t of log p / q at y_t' (single-step
decomposition). R is divided by the number of its terms (length normalisation); tokens are drawn
from share p + (1 - share) q and weighted by q over that; every batch of samples serves several
epochs, with the ratio of new to old q clipped as in PPO; the cross entropy of pretraining text is
added. The loop's own batches are that text.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data.instruct import shuffled
from engine.decoding import Decoding
from engine.errors import UserError
from engine.parallel import gather, is_sharded, processes
from engine.teacher import LazyTeacher


class Answering(NamedTuple):
    """How prompts are answered."""

    max_new_tokens: int
    ends: tuple  # tokens that end an answer; the first fills up
    temperature: float = 1.0  # 0: greedy
    share: float = 0.0  # of the teacher in the distribution that is drawn from


class Answers(NamedTuple):
    """Prompts with their answers, (n, T) each; the logarithms are 0 outside the answers."""

    ids: torch.Tensor  # filled up with end-of-text
    mask: torch.Tensor  # bool: which of them are answers
    log_q: torch.Tensor  # of the model
    log_p: torch.Tensor  # of the teacher
    log_mix: torch.Tensor  # of the distribution that was drawn from


@torch.no_grad()
def answer(model, prompts, how, teacher=None, generator=None):
    """
    Answer prompts (1-d int64 tensors of any lengths) together. The sequences stand side by side
    from their first token: while one is still in its prompt, what is drawn for it is not used.
    """
    device = prompts[0].device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    models = [model] if teacher is None else [model, teacher]
    longest = min(m.config.block_size for m in models)
    vocab_size = min(m.config.vocab_size for m in models)  # of one tokenizer, padded differently
    limit = min(int(lengths.max()) + how.max_new_tokens, longest)
    ids = torch.full((len(prompts), limit), how.ends[0], device=device)
    for row, p in zip(ids, prompts):
        row[: len(p)] = p
    mask = torch.zeros_like(ids, dtype=torch.bool)
    log_q, log_p, log_mix = torch.zeros(3, *ids.shape, device=device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    ends = torch.tensor(how.ends, device=device)
    decodings = [Decoding(m, len(ids), limit) for m in models]
    for t in range(int(lengths.min()), limit):
        logs = []
        for decoding in decodings:
            logits = decoding.following(ids[:, :t]).float()
            logs.append(logits[:, :vocab_size].log_softmax(-1))
        mixed = mixture(logs, how.share)
        if how.temperature == 0:
            token = mixed.argmax(-1)
        else:
            p = (mixed / how.temperature).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)[:, 0]
        last = lengths + how.max_new_tokens
        speaking = (t >= lengths) & ~done & (t < last)
        ids[:, t] = torch.where(speaking, token, ids[:, t])
        mask[:, t] = speaking
        drawn = [(log_q, logs[0]), (log_mix, mixed)]
        if teacher is not None:
            drawn.append((log_p, logs[1]))
        for log, values in drawn:
            chosen = values.gather(-1, token[:, None])[:, 0]
            log[:, t] = torch.where(speaking, chosen, 0.0)
        done |= speaking & torch.isin(token, ends)
        if (done | (t + 1 >= last)).all():
            break
    return Answers(ids, mask, log_q, log_p, log_mix)


def mixture(logs, share):
    """log of share p + (1 - share) q; logs: [log q] or [log q, log p]."""
    if len(logs) == 1:
        return logs[0]
    of_model = math.log1p(-share) if share < 1 else -math.inf
    of_teacher = math.log(share) if share else -math.inf
    return torch.logaddexp(logs[0] + of_model, logs[1] + of_teacher)


def returns(log_ratio, mask, normalised=True):
    """
    R_{t+1} at every answer token: the sum of log p / q over the answer's later tokens, or their
    mean. log_ratio (n, T), mask (n, T) bool; 0 at the last token and outside.
    """
    masked = torch.where(mask, log_ratio, 0.0)
    after = masked.flip(1).cumsum(1).flip(1) - masked
    if normalised:
        later = mask.flip(1).cumsum(1).flip(1) - mask.int()
        after = after / later.clamp(min=1)
    return torch.where(mask, after, 0.0)


def policy_loss(logits, teacher_logits, rollout, clip=0.2):
    """
    (the loss whose gradient is the estimate above, its two parts), sums over answer tokens over
    `tokens`. logits, teacher_logits (n, T - 1, V) on ids[:, :-1]; rollout: ids, answers, log_q
    (when drawn), weight and advantage = R_{t+1}, each (n, T); tokens: the answer tokens of n rows,
    the mean over all rows of the step, so that its gradient is the mean over all its tokens.
    """
    target, mask = rollout['ids'][:, 1:], rollout['answers'][:, 1:]
    weight = torch.where(mask, rollout['weight'][:, 1:], 0.0) / rollout['tokens'].clamp(min=1)
    V = min(logits.shape[-1], teacher_logits.shape[-1])
    log_q = logits.float()[..., :V].log_softmax(-1)
    log_p = teacher_logits.detach().float()[..., :V].log_softmax(-1)
    single_step = (weight * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()
    now = log_q.gather(-1, target[..., None])[..., 0]
    ratio = (now - rollout['log_q'][:, 1:]).exp()
    R = rollout['advantage'][:, 1:]
    clipped = torch.minimum(ratio * R, ratio.clamp(1 - clip, 1 + clip) * R)
    long_range = -(weight * clipped).sum()
    return single_step + long_range, dict(single_step=single_step, long_range=long_range)


@dataclass
class MiniLLM:
    """The settings of on-policy distillation."""

    batch_size: int  # sequences of a step, over all processes
    seed: int
    samples: int = 256  # answers in a batch ...
    inner_epochs: int = 4  # ... which serves this many times
    share: float = 0.2  # of the teacher in the sampling
    clip: float = 0.2  # of the ratio of new to old probabilities
    length: int = 512  # tokens of prompt and answer
    text: float = 1.0  # weight of the cross entropy on the loop's own batches

    @property
    def batches(self):
        """Steps that one pass over the samples takes."""
        return max(1, self.samples // self.batch_size)

    @property
    def steps(self):
        """Steps that a batch of samples serves."""
        return self.batches * self.inner_epochs


class Rollouts:
    """
    The answers a stage learns from: a part of its saved state, so that an interrupted run continues
    with the same.
    """

    def __init__(self, examples, settings):
        self.examples, self.settings = examples, settings
        self.first, self.current = None, None
        self.step, self.used = None, 0  # rows used within the current step

    def state_dict(self):
        """{name: tensor} of the current batch of answers, and the step at which it began."""
        return {} if self.first is None else self.current | dict(first=torch.tensor(self.first))

    def load_state_dict(self, state):
        """Go on with what state_dict() returned."""
        if state:
            self.first = int(state['first'])
            self.current = {name: t for name, t in state.items() if name != 'first'}

    def next_rows(self, step, n, student, teacher):
        """The answers that the next n rows of this process's share of a step learn from."""
        settings, world, device = self.settings, processes()[1], student.wte.weight.device
        first = step // settings.steps * settings.steps
        if self.first != first:
            self.first, self.current = first, self.draw(first, student, teacher)
        if self.step != step:
            self.step, self.used = step, 0
        turn, place = divmod(step - first, settings.batches)
        generator = torch.Generator().manual_seed(hash((settings.seed, first, turn)))
        order = torch.randperm(len(self.current['ids']), generator=generator)
        size = settings.batch_size // world
        of_step = order[place * size : (place + 1) * size]
        rows = of_step[self.used : self.used + n]
        self.used += n
        part = {name: t[rows.to(t.device)].to(device) for name, t in self.current.items()}
        return part | dict(tokens=self.current['tokens'][of_step].sum() * (n / size / world))

    def draw(self, first, student, teacher):
        """Let the student answer: ids, answers (a mask), log_q, weight and advantage."""
        settings, (rank, world) = self.settings, processes()
        device = student.wte.weight.device
        positions = torch.arange(settings.samples)[rank::world].numpy()
        positions = positions + first // settings.steps * settings.samples
        room = min(settings.length, student.config.block_size) // 2
        prompts = []
        for i in shuffled(positions, len(self.examples), settings.seed):
            prompts.append(torch.from_numpy(self.examples.prompt(i, room)).to(device))
        generator = torch.Generator(device)
        generator.manual_seed(hash((settings.seed, first, rank)) % 2**63)
        how = Answering(room, self.examples.ends, share=settings.share)
        found = answer(student, prompts, how, teacher, generator)
        weight = torch.where(found.mask, (found.log_q - found.log_mix).exp(), 0.0)
        advantage = returns(found.log_p - found.log_q, found.mask)
        tokens = sum(gather(found.mask.sum(1).cpu()))  # of a row, on all processes
        rollout = dict(ids=found.ids, answers=found.mask, log_q=found.log_q, tokens=tokens)
        return rollout | dict(weight=weight, advantage=advantage)


def unwrap(model):
    """The bare GPT inside what `wrap` returned."""
    model = getattr(model, 'module', model)
    return getattr(model, '_orig_mod', model)


def minillm(teacher, examples, settings):
    """
    The objective of on-policy distillation from a model folder. examples: data.instruct.Examples,
    whose prompts are answered; settings: MiniLLM.
    """
    lazy = LazyTeacher(teacher)
    rollouts = Rollouts(examples, settings)

    def objective(model, x, y, progress):
        if is_sharded(model):  # every pass is a collective; answers end when they end
            raise UserError('minillm cannot train shards: it needs --parallel=ddp')
        theirs = lazy.on(x.device)
        part = rollouts.next_rows(progress.step, len(x), unwrap(model), theirs)
        ids = part['ids'][:, :-1]
        with torch.no_grad():
            teacher_logits = theirs(ids).logits
        loss, scalars = policy_loss(model(ids).logits, teacher_logits, part, settings.clip)
        text_loss = model(x, y).loss if settings.text else loss.new_zeros(())
        scalars |= dict(text_loss=text_loss, answer_tokens=part['answers'].sum() / len(ids))
        rows = torch.tensor(len(x), device=x.device)
        return loss + settings.text * text_loss, rows, scalars

    objective.state = rollouts
    return objective
