"""
Learning from answers to prompts (Chain-of-Learngene, sections 3.1 and 3.2, Appendix C.1): a
student's own, judged by its teacher as MiniLLM does it (Gu et al.), or the teacher's, as a
supervised set in any vocabulary; and how good answers are:

    python -m extras.minillm out/col_gpt2/138m-linit-on-dolly --answers=self-inst.jsonl,vicuna.jsonl

On-policy distillation draws answers y from the student q and lets the teacher p judge each token:

    grad KL(q || p) = E_{y ~ q} sum_t [ grad KL(q(. | y_<t) || p(. | y_<t))
                                        - R_{t+1} grad log q(y_t | y_<t) ]

with R_{t+1} = sum over t' > t of log p / q at y_t' (single-step decomposition). As MiniLLM, we
divide R by the number of its terms (length normalisation), draw tokens from share p + (1 - share) q
and weight them by q over that, use every batch of answers for several inner epochs with the ratio
of new to old q clipped as in PPO, and add the cross entropy of text, which the loop's batches are.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import configure
from data.instruct import (
    Examples,
    encode_examples,
    example_encoder,
    file_records,
    prompt,
    refuse,
    shuffled,
    supervised_source,
)
from data.prepare import Preparation, fresh_counts, write_corpus
from data.vocabulary import load_tokenizer, same_tokenizer, tokenizer_of_model
from engine.decoding import Decoding
from engine.errors import UserError, run_as_program
from engine.files import read_json
from engine.log import progress_bar
from engine.parallel import choose_device, gather, is_sharded, processes
from engine.teacher import lazy_teacher
from model import load

INNER_EPOCHS = 4  # over each batch of answers (Appendix C.1)


# ----------------------------------------------------------------------------------------------
# answers


@torch.no_grad()
def answer(models, prompts, ends, most, share=0.0, generator=None):
    """
    Answer prompts (1-d int64 tensors of any lengths) together, in at most `most` tokens, until one
    of the tokens `ends`. models: the student alone, which says the likeliest; or student and
    teacher, whose `mixture` is drawn from with the generator. The sequences stand side by side from
    their first token: what is drawn for one that is still in its prompt is not used. Returns ids
    (n, T) int64, filled up with end-of-text; mask (n, T), which of them are answers; and their log
    probabilities (models, n, T), 0 elsewhere.
    """
    device, longest = prompts[0].device, min(m.config.block_size for m in models)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = F.pad(pad_sequence(prompts, True, ends[0]), (0, most), value=ends[0])[:, :longest]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    logs = torch.zeros(len(models), *ids.shape, device=device)
    done, ends = torch.zeros_like(lengths, dtype=torch.bool), torch.tensor(ends, device=device)
    decodings = [Decoding(m, *ids.shape) for m in models]
    V = min(m.config.vocab_size for m in models)  # of one tokenizer, padded differently
    for t in range(int(lengths.min()), ids.shape[1]):
        now = [decoding.following(ids[:, :t])[:, :V].float() for decoding in decodings]
        now = torch.stack(now).log_softmax(-1)
        if generator is None:
            token = now[0].argmax(-1)
        else:
            p = mixture(now, share).exp()
            token = torch.multinomial(p, 1, generator=generator)[:, 0]
        speaking = (lengths <= t) & (t < lengths + most) & ~done
        ids[:, t] = torch.where(speaking, token, ids[:, t])
        mask[:, t] = speaking
        logs[..., t] = now[:, torch.arange(len(ids)), token] * speaking
        done |= speaking & torch.isin(token, ends)
        if (done | (t + 1 >= lengths + most)).all():
            break
    return ids, mask, logs


def mixture(logs, share):
    """log of (1 - share) q + share p, of the logarithms (2, ...) of q and p."""
    weights = logs.new_tensor([1 - share, share]).log()
    return torch.logaddexp(logs[0] + weights[0], logs[1] + weights[1])


def answer_texts(model, tokenizer, prompts):
    """
    Yield a GPT's likeliest answer, a text, to each of a list of prompts, ids of its tokenizer, in
    at most 256 tokens or half of its context.
    """
    longest, device = model.config.block_size, model.wte.weight.device
    most = min(256, longest // 2)
    for i in progress_bar(range(0, len(prompts), 16), desc='answers'):
        asked = [[*p][most - longest :] or [tokenizer.end] for p in prompts[i : i + 16]]
        rows = [torch.tensor(row, dtype=torch.int64, device=device) for row in asked]
        ids, mask, _ = answer([model], rows, tokenizer.ends, most)
        for row, said, before in zip(ids, mask, asked):
            yield tokenizer.text(row[said].tolist(), before).strip()


# ----------------------------------------------------------------------------------------------
# the student's own answers: MiniLLM


def returns(log_ratio, mask):
    """
    R_{t+1} at every answer token: the mean of log p / q over the answer's later tokens. log_ratio
    (n, T), mask (n, T) bool; 0 at the last token and outside.
    """
    both = torch.stack((torch.where(mask, log_ratio, 0.0), mask.to(log_ratio)))
    after, later = both.flip(-1).cumsum(-1).flip(-1) - both  # their sum, and their number
    return torch.where(mask, after / later.clamp(min=1), 0.0)


def policy_loss(logits, teacher_logits, rollout, clip=0.2):
    """
    (the loss whose gradient is the estimate above, its two parts): means over n answers. logits,
    teacher_logits (n, T - 1, V) on ids[:, :-1]; rollout: ids, log_q (when drawn), weight (0 outside
    the answers), and R = R_{t+1}, each (n, T).
    """
    ids, drawn, weight, R = (rollout[name][:, 1:] for name in ('ids', 'log_q', 'weight', 'R'))
    weight = weight / len(ids)
    V = min(logits.shape[-1], teacher_logits.shape[-1])
    log_q, log_p = (x[..., :V].float().log_softmax(-1) for x in (logits, teacher_logits.detach()))
    single_step = (weight * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()
    ratio = (log_q.gather(-1, ids[..., None])[..., 0] - drawn).exp()
    clipped = torch.minimum(ratio * R, ratio.clamp(1 - clip, 1 + clip) * R)
    long_range = -(weight * clipped).sum()
    return single_step + long_range, dict(single_step=single_step, long_range=long_range)


@dataclass
class MiniLLM:
    """The objective of on-policy distillation; the answers are a part of a stage's saved state."""

    teacher: str  # model folder
    examples: Examples  # whose prompts are answered
    batch_size: int  # sequences of a step, over all processes
    seed: int
    batches: int = 4  # steps that learn from as many answers, once an inner epoch
    share: float = 0.2  # of the teacher in the distribution that they are drawn from

    def __post_init__(self):
        self.state, self.opened = self, lazy_teacher(self.teacher)
        self.first = self.step = -1  # at which the answers were drawn, and which uses them
        self.rollout = {}

    def __call__(self, model, x, y, progress):
        if is_sharded(model):  # every pass is a collective; answers end when they end
            raise UserError('minillm cannot train shards: it needs --parallel=ddp')
        theirs = self.opened(x.device)
        if progress.step != self.step:
            self.step = progress.step
            student = getattr(model, 'module', model)  # the bare GPT
            self.left = self.rows_of_step(getattr(student, '_orig_mod', student), theirs)
        rows = [self.left.pop() for _ in x]  # of this micro-batch
        rollout = {name: t[rows].to(x.device) for name, t in self.rollout.items()}
        ids = rollout['ids'][:, :-1]
        loss, scalars = policy_loss(model(ids).logits, theirs(ids).logits, rollout)
        text_loss = model(x, y).loss
        count = torch.tensor(len(x), device=x.device)
        return loss + text_loss, count, scalars | dict(text_loss=text_loss)

    def rows_of_step(self, student, teacher):
        """The rows of the answers from which this process learns in this step."""
        batches, B = self.batches, self.batch_size // processes()[1]
        epoch, i = divmod(self.step % (batches * INNER_EPOCHS), batches)
        first = self.step - epoch * batches - i
        if first != self.first:
            self.first, self.rollout = first, self.draw(first, student, teacher)
        order = np.random.default_rng((self.seed, first, epoch)).permutation(batches * B)
        return order[i * B : (i + 1) * B].tolist()

    def draw(self, first, student, teacher):
        """Let the student answer: a rollout of this process's share of the samples."""
        (rank, world), device = processes(), student.wte.weight.device
        room, samples = student.config.block_size // 2, self.batches * self.batch_size
        places = first // INNER_EPOCHS * self.batch_size + np.arange(samples)[rank::world]
        numbers = shuffled(places, len(self.examples), self.seed)
        prompts = [torch.from_numpy(self.examples.prompt(i, room)).to(device) for i in numbers]
        how = self.share, torch.Generator(device).manual_seed(hash((self.seed, first, rank)))
        ids, mask, logs = answer([student, teacher], prompts, self.examples.ends, room, *how)
        length = sum(gather(mask.sum().item())) / samples  # of an answer, on average
        weight = mask * (logs[0] - mixture(logs, self.share)).exp() / length
        R = returns(logs[1] - logs[0], mask)
        return dict(ids=ids, log_q=logs[0], weight=weight, R=R)

    def state_dict(self):
        """{name: tensor} of the current answers, and the step at which they were drawn."""
        return self.rollout | dict(first=torch.tensor(self.first))

    def load_state_dict(self, state):
        """Go on with what state_dict() returned."""
        self.rollout = dict(state)
        self.first = int(self.rollout.pop('first'))


def minillm(stage, teacher, method):
    """
    Let a stage learn on-policy from the Result `teacher`. We assume one answer token per text
    token: 6 X FLOPs to learn it, 2 X_teacher to judge it, 2 (X + X_teacher) to draw it, which is
    done once for all inner epochs. method: the ChainOfLearngene, whose `samples` are rounded up to
    whole steps.
    """
    examples_in(method, method.sft_data)  # there must be some
    run, X, X_teacher = method.run, stage.params, teacher.params
    size = stage.knobs.get('batch_size', run.batch_size)
    batches = -(-method.samples // size)
    if run.toy:
        size, batches = min(4, size), 2
    each = 6 * X + 2 * X_teacher + 2 * (X + X_teacher) / INNER_EPOCHS
    stage.more_flops = lambda progress, tokens: each * progress.step * tokens
    stage.teaching |= dict(teacher_params=X_teacher, samples=batches * size, share=method.share)
    if not run.dry_run:
        examples = Examples(method.sft_data, run.data_dir, 'train')
        stage.objective = MiniLLM(teacher.folder, examples, size, run.seed, batches, method.share)


# ----------------------------------------------------------------------------------------------
# the teacher's answers: sequence-level distillation and the bridge


EXAMPLES = dict(xsum=204_045, mmlu=285, hellaswag=39_905, winogrande=40_398, boolq=9_427)


def examples_in(method, data):
    """
    How many training examples a supervised set has; of one that is not prepared, as published.
    method: the ChainOfLearngene. Raises UserError for a set in another vocabulary than its text.
    """
    if not data:
        raise UserError('answers need prompts: --sft_data=NAME, a supervised set')
    run = method.run
    if not (Path(run.data_dir) / data).is_dir():
        return EXAMPLES.get(data, 15_000)
    examples, ours = Examples(data, run.data_dir, 'train'), run.source().tokenizer
    if data != method.ansnet_data and not same_tokenizer(examples.tokenizer, ours):
        raise UserError(f'{data} was not prepared with the tokenizer of {run.data}, {ours}')
    return len(examples)


def use_set(stage, folder):
    """Let a stage read a supervised set."""
    stage.source = partial(supervised_source, name=folder.name)
    stage.knobs |= dict(val_data='', data_dir=str(folder.parent))


def seqkd(stage, teacher, method):
    """Let a stage learn from a Result's answers to the prompts of sft_data (Eq. 2)."""
    run, data = method.run, method.sft_data
    answers = 2 * teacher.params * examples_in(method, data) * run.block_size
    stage.more_flops = lambda progress, tokens: answers
    if not run.dry_run:
        out = Path(run.out_dir) / f'{stage.name}-data-{run.seed}'
        use_set(stage, pseudo_answers(teacher.folder, data, run, out))


def pseudo_answers(teacher, name, run, out):
    """
    A supervised set in the folder `out`, made once, of the prompts of the prepared set `name` and
    the answers of the model in a folder to them (Eq. 2), in the tokenizer of `name`. An interrupted
    run continues. Returns `out`.
    """
    meta = out / 'meta.json'
    while processes()[0] and not meta.is_file():
        time.sleep(1)  # one process writes, the others wait for it
    if meta.is_file():
        return out
    examples, progress = Examples(name, run.data_dir, 'train'), Path(f'{out}.partial/progress.json')
    state = read_json(progress) if progress.is_file() else dict(counts=fresh_counts(), read=0)
    ours, theirs = load_tokenizer(examples.tokenizer), load_tokenizer(tokenizer_of_model(teacher))
    numbers = range(state['read'], 8 if run.toy else len(examples))
    texts = [ours.decode(examples.prompt(i, 2**31).tolist()) for i in numbers]
    model = load(teacher, choose_device(run.device)).eval()
    options = Preparation(name, tokenizer=examples.tokenizer, prompt='plain')

    def batches():
        answered = zip(texts, answer_texts(model, theirs, [*map(theirs.encode, texts)]))
        for i, (text, said) in enumerate(answered, state['read'] + 1):
            said = said or '?' * run.toy  # what hardly was trained may say nothing
            record = dict(prompt=text.removesuffix('\n'), completion=said)
            rows = [(name, record, i % 20 == 1)] if said else []
            yield encode_examples(rows, options, refuse, example_encoder(options)), i

    return write_corpus(batches(), 'supervised', options, out, state)


# ----------------------------------------------------------------------------------------------
# how good answers are


def rouge_l(texts, references):
    """
    100 times the mean Rouge-L (Eq. 8, beta = 1) of texts: the F-measure of the longest common
    subsequence of words of a text and the closest of its list of references.
    """
    from rouge_score.rouge_scorer import RougeScorer  # a second, which not every command needs

    score = RougeScorer(['rougeL']).score_multi
    return 100 * statistics.mean(score(r, t)['rougeL'].fmeasure for t, r in zip(texts, references))


def score(model, data, data_dir, which):
    """
    {Rouge-L, share of exact answers} of a GPT's likeliest answers to the validation examples
    `which`, a slice, of a prepared set in its tokenizer.
    """
    examples = Examples(data, data_dir, 'val')
    tokenizer, chosen = load_tokenizer(examples.tokenizer), range(len(examples))[which]
    asked = [examples.prompt(i, 2**31).tolist() for i in chosen]
    right = [tokenizer.text(ids[said].tolist()).strip() for ids, said in map(examples.fit, chosen)]
    said = [*answer_texts(model, tokenizer, asked)]
    exact = statistics.mean(map(str.__eq__, said, right))
    return {'Rouge-L': rouge_l(said, [[text] for text in right]), 'exact answers': exact}


def scored_prompts(path):
    """
    [(prompt, references)] of a .jsonl or .json file of records with `instruction` and maybe
    `input`, or a whole `prompt`; and `output`, a text or a list of texts that are all right. Raises
    UserError.
    """
    found = []
    for where, row in file_records(path):
        try:
            right = [row['output']] if isinstance(row['output'], str) else row['output']
            asked = row.get('prompt') or f'{prompt(row["instruction"], row.get("input"))}\n'
            found.append((asked + '', [text + '' for text in right or [None]]))
        except (TypeError, KeyError, AttributeError) as error:
            refuse(where, error)
    if not found:
        raise UserError(f'{path} holds no records')
    return found


@dataclass
class Scoring:
    """Rouge-L of a model's likeliest answers: extras/minillm.py FOLDER --answers=FILE,FILE."""

    model: str = ''  # model folder, or a name on the hub
    answers: tuple[str, ...] = ()  # .jsonl files of instructions and right answers


def main(argv):
    """Command line: FOLDER, then knobs. Prints the Rouge-L of each file, and the mean."""
    options, _, _ = configure(
        argv, Scoring, program='python -m extras.minillm FOLDER', words=('model',)
    )
    tokenizer = load_tokenizer(tokenizer_of_model(options.model))
    model, scores = load(options.model, choose_device('auto')).eval(), []
    for path in options.answers or ['--answers=FILE,...']:  # which is missing
        prompts, references = zip(*scored_prompts(path))
        said = answer_texts(model, tokenizer, [*map(tokenizer.encode, prompts)])
        scores.append(rouge_l(said, references))
        print(f'{path}: Rouge-L {scores[-1]:.2f}')
    print(f'the average: {statistics.mean(scores):.2f}')


if __name__ == '__main__':
    run_as_program(main)
