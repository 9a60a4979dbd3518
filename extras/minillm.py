"""
Distillation through answers to prompts (Chain-of-Learngene, sections 3.1 and 3.2, Appendix C.1): a
student's own answers, judged by its teacher as in MiniLLM (Gu et al.), or the teacher's answers, as
a supervised set in any vocabulary. Also a score for answers:

    python -m extras.minillm out/col_gpt2/138m-linit-on-dolly --answers=self-inst.jsonl,vicuna.jsonl

On-policy distillation draws answers y from the student q and lets the teacher p judge each token:

    grad KL(q || p) = E_{y ~ q} sum_t [ grad KL(q(. | y_<t) || p(. | y_<t))
                                        - R_{t+1} grad log q(y_t | y_<t) ]

with R_{t+1} = sum over t' > t of log p / q at y_t' (single-step decomposition). Like MiniLLM, we
divide R by the number of its terms (length normalisation); sample from share p + (1 - share) q and
weight tokens by q over that (importance sampling); use a batch of answers for several inner epochs,
with the ratio of new to old q clipped as in PPO; and add the cross entropy of text, which is what
the training loop's own batches hold.
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
    Answer prompts (1-d int64 tensors of any lengths) together, each until one of the tokens `ends`,
    in at most `most` tokens. models: the student alone, decoded greedily; or student and teacher,
    with a generator that samples their `mixture` by `share`. Sequences are aligned at their first
    tokens: what is generated for one that is still in its prompt is discarded. Returns ids (n, T)
    int64, padded with end-of-text; mask (n, T) bool, True for tokens of answers; and the log
    probabilities of these, (models, n, T), 0 elsewhere.
    """
    device, longest = prompts[0].device, min(m.config.block_size for m in models)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = F.pad(pad_sequence(prompts, True, ends[0]), (0, most), value=ends[0])[:, :longest]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    logs = torch.zeros(len(models), *ids.shape, device=device)
    done, ends = torch.zeros_like(lengths, dtype=torch.bool), torch.tensor(ends, device=device)
    decodings = [Decoding(m, *ids.shape) for m in models]
    V = min(m.config.vocab_size for m in models)  # one tokenizer, whose padding may differ
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
    """log((1 - share) q + share p), (...). logs: log q and log p, (2, ...)."""
    weights = logs.new_tensor([1 - share, share]).log()
    return torch.logaddexp(logs[0] + weights[0], logs[1] + weights[1])


def answer_texts(model, tokenizer, prompts):
    """
    Yield a GPT's greedy answer to each prompt as text: at most 256 tokens, and half of its context.
    tokenizer: the model's; prompts: a list of lists of ids.
    """
    longest, device = model.config.block_size, model.wte.weight.device
    most = min(256, longest // 2)
    for i in progress_bar(range(0, len(prompts), 16), desc='answers'):
        # the end of a long prompt, to leave room for an answer; an empty one needs a token
        asked = [[*p][most - longest :] or [tokenizer.end] for p in prompts[i : i + 16]]
        rows = [torch.tensor(row, dtype=torch.int64, device=device) for row in asked]
        ids, mask, _ = answer([model], rows, tokenizer.ends, most)
        for row, said, before in zip(ids, mask, asked):
            yield tokenizer.text(row[said].tolist(), before).strip()


# ----------------------------------------------------------------------------------------------
# the student's own answers: MiniLLM


def returns(log_ratio, mask):
    """
    R_{t+1} at every answer token, (n, T): the mean of log p / q over the later tokens of its
    answer; 0 at the last one and outside answers. log_ratio: log p / q, (n, T); mask: answer
    tokens, (n, T) bool.
    """
    both = torch.stack((torch.where(mask, log_ratio, 0.0), mask.to(log_ratio)))
    after, later = both.flip(-1).cumsum(-1).flip(-1) - both  # sum and number of later tokens
    return torch.where(mask, after / later.clamp(min=1), 0.0)


def policy_loss(logits, teacher_logits, rollout, clip=0.2):
    """
    (loss, {name: part}): the gradient of the loss estimates that of KL(q || p) as above, a mean
    over n answers. logits, teacher_logits: (n, T - 1, V), for ids[:, :-1]; rollout: ids, log_q
    (when sampled), weight (0 outside answers) and R (R_{t+1}), each (n, T); clip: PPO's epsilon.
    """
    ids, drawn, weight, R = (rollout[name][:, 1:] for name in ('ids', 'log_q', 'weight', 'R'))
    weight = weight / len(ids)
    V = min(logits.shape[-1], teacher_logits.shape[-1])
    log_q, log_p = (x[..., :V].float().log_softmax(-1) for x in (logits, teacher_logits.detach()))
    single_step = (weight * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()
    # new q / old q; where they are equal, its gradient is grad log q
    ratio = (log_q.gather(-1, ids[..., None])[..., 0] - drawn).exp()
    clipped = torch.minimum(ratio * R, ratio.clamp(1 - clip, 1 + clip) * R)
    long_range = -(weight * clipped).sum()
    return single_step + long_range, dict(single_step=single_step, long_range=long_range)


@dataclass
class MiniLLM:
    """
    The objective of on-policy distillation: (model, x, y, progress) -> (loss, count, scalars), with
    x and y (B, T) of text. The current answers are part of a stage's saved state. Raises UserError
    for a sharded model.
    """

    teacher: str  # model folder
    examples: Examples  # whose prompts are answered
    batch_size: int  # sequences of a step, over all processes
    seed: int
    batches: int = 4  # steps of an inner epoch: answers are sampled for so many batches at once
    share: float = 0.2  # the teacher's share of the distribution that is sampled

    def __post_init__(self):
        self.state, self.opened = self, lazy_teacher(self.teacher)  # engine/state.py saves `state`
        self.first = self.step = -1  # steps: at which answers were sampled, and the current one
        self.rollout = {}

    def __call__(self, model, x, y, progress):
        if is_sharded(model):  # passes are collectives, but answers differ in length
            raise UserError('minillm cannot train shards: it needs --parallel=ddp')
        teacher = self.opened(x.device)
        if progress.step != self.step:
            self.step = progress.step
            student = getattr(model, 'module', model)  # without DDP; below, without torch.compile
            self.left = self.rows_of_step(getattr(student, '_orig_mod', student), teacher)
        rows = [self.left.pop() for _ in x]  # of this micro-batch
        rollout = {name: t[rows].to(x.device) for name, t in self.rollout.items()}
        ids = rollout['ids'][:, :-1]
        loss, scalars = policy_loss(model(ids).logits, teacher(ids).logits, rollout)
        text_loss = model(x, y).loss
        count = torch.tensor(len(x), device=x.device)
        return loss + text_loss, count, scalars | dict(text_loss=text_loss)

    def rows_of_step(self, student, teacher):
        """The rows of the rollout, a list, from which this process learns in this step."""
        batches, B = self.batches, self.batch_size // processes()[1]
        # the same answers serve INNER_EPOCHS epochs of `batches` steps; this is step i of `epoch`
        epoch, i = divmod(self.step % (batches * INNER_EPOCHS), batches)
        first = self.step - epoch * batches - i
        if first != self.first:
            self.first, self.rollout = first, self.draw(first, student, teacher)
        order = np.random.default_rng((self.seed, first, epoch)).permutation(batches * B)
        return order[i * B : (i + 1) * B].tolist()

    def draw(self, first, student, teacher):
        """
        Sample the answers that are used from step `first` on: a rollout, as of `policy_loss`, of
        this process's share of the samples.
        """
        (rank, world), device = processes(), student.wte.weight.device
        room, samples = student.config.block_size // 2, self.batches * self.batch_size
        # prompts are taken in order: `samples` of them for every batches x INNER_EPOCHS steps
        places = first // INNER_EPOCHS * self.batch_size + np.arange(samples)[rank::world]
        numbers = shuffled(places, len(self.examples), self.seed)
        prompts = [torch.from_numpy(self.examples.prompt(i, room)).to(device) for i in numbers]
        how = self.share, torch.Generator(device).manual_seed(hash((self.seed, first, rank)))
        ids, mask, logs = answer([student, teacher], prompts, self.examples.ends, room, *how)
        length = sum(gather(mask.sum().item())) / samples  # mean length, over all processes
        weight = mask * (logs[0] - mixture(logs, self.share)).exp() / length  # q / mixture
        R = returns(logs[1] - logs[0], mask)
        return dict(ids=ids, log_q=logs[0], weight=weight, R=R)

    def state_dict(self):
        """{name: tensor} of the current answers and the step at which they were sampled."""
        return self.rollout | dict(first=torch.tensor(self.first))

    def load_state_dict(self, state):
        """Restore what state_dict() returned."""
        self.rollout = dict(state)
        self.first = int(self.rollout.pop('first'))


def minillm(stage, teacher, method):
    """
    Give a stage the objective of on-policy distillation from the Result `teacher`. For its FLOPs we
    assume one answer token per text token: 6 X to learn it, 2 X_teacher to judge it, and once for
    all inner epochs 2 (X + X_teacher) to sample it. method: the ChainOfLearngene, whose `samples`
    are rounded up to whole steps. Raises UserError without sft_data.
    """
    examples_in(method, method.sft_data)  # raises UserError if there are none
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


# published numbers of training examples, for plans without the sets
EXAMPLES = dict(xsum=204_045, mmlu=285, hellaswag=39_905, winogrande=40_398, boolq=9_427)


def examples_in(method, data):
    """
    The number of training examples of the supervised set `data`; if it is not prepared, as it was
    published. method: the ChainOfLearngene. Raises UserError if no set is named, or if it has
    another tokenizer than the run's text (the AnsNet's own set may).
    """
    if not data:
        raise UserError('answers need prompts: --sft_data=NAME, a supervised set')
    run = method.run
    if not (Path(run.data_dir) / data).is_dir():
        return EXAMPLES.get(data, 15_000)  # of Dolly
    examples, tokenizer = Examples(data, run.data_dir, 'train'), run.source().tokenizer
    if data != method.ansnet_data and not same_tokenizer(examples.tokenizer, tokenizer):
        raise UserError(f'{data} was not prepared with the tokenizer of {run.data}, {tokenizer}')
    return len(examples)


def use_set(stage, folder):
    """Let a stage train on the prepared supervised set in `folder`, a Path."""
    stage.source = partial(supervised_source, name=folder.name)
    stage.knobs |= dict(val_data='', data_dir=str(folder.parent))


def seqkd(stage, teacher, method):
    """
    Let a stage learn from the Result `teacher`'s answers to the prompts of sft_data (Eq. 2).
    method: the ChainOfLearngene. Raises UserError without sft_data.
    """
    run, data = method.run, method.sft_data
    # FLOPs of answering, spent before the first step: at most block_size tokens per prompt
    answers = 2 * teacher.params * examples_in(method, data) * run.block_size
    stage.more_flops = lambda progress, tokens: answers
    if not run.dry_run:
        out = Path(run.out_dir) / f'{stage.name}-data-{run.seed}'
        use_set(stage, pseudo_answers(teacher.folder, data, run, out))


def pseudo_answers(teacher, name, run, out):
    """
    Make a supervised set in the folder `out`, unless it is there: the prompts of the prepared set
    `name` with the greedy answers of the model in the folder `teacher` (Eq. 2), in the tokenizer of
    `name`. Continues if it was interrupted. Returns `out`.
    """
    meta = out / 'meta.json'
    while processes()[0] and not meta.is_file():
        time.sleep(1)  # one process writes, the others wait for it
    if meta.is_file():
        return out
    examples, progress = Examples(name, run.data_dir, 'train'), Path(f'{out}.partial/progress.json')
    state = read_json(progress) if progress.is_file() else dict(counts=fresh_counts(), read=0)
    tokenizer = load_tokenizer(examples.tokenizer)
    teacher_tokenizer = load_tokenizer(tokenizer_of_model(teacher))
    numbers = range(state['read'], 8 if run.toy else len(examples))
    texts = [tokenizer.decode(examples.prompt(i, 2**31).tolist()) for i in numbers]
    prompts = [*map(teacher_tokenizer.encode, texts)]
    model = load(teacher, choose_device(run.device)).eval()
    options = Preparation(name, tokenizer=examples.tokenizer, prompt='plain')

    def batches():
        answered = zip(texts, answer_texts(model, teacher_tokenizer, prompts))
        for i, (text, said) in enumerate(answered, state['read'] + 1):
            said = said or '?' * run.toy  # a model that was hardly trained may say nothing
            record = dict(prompt=text.removesuffix('\n'), completion=said)
            rows = [(name, record, i % 20 == 1)] if said else []  # 5% for validation
            yield encode_examples(rows, options, refuse, example_encoder(options)), i

    return write_corpus(batches(), 'supervised', options, out, state)


# ----------------------------------------------------------------------------------------------
# how good answers are


def rouge_l(texts, references):
    """
    100 times the mean Rouge-L (Eq. 8, beta = 1) of texts: the F-measure of the longest common
    subsequence of words of a text and the closest of its list of references.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second; not every command needs it

    score = RougeScorer(['rougeL']).score_multi
    return 100 * statistics.mean(score(r, t)['rougeL'].fmeasure for t, r in zip(texts, references))


def score(model, data, data_dir, which):
    """
    {'Rouge-L': ..., 'exact answers': their share} of a GPT's greedy answers to validation examples
    of the prepared set `data`, which has its tokenizer. which: a slice of the examples.
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
    [(prompt, references)] from a .jsonl or .json file. A record has an `instruction` and maybe an
    `input`, or a whole `prompt`; and an `output`, a text or a list of equally correct texts. Raises
    UserError.
    """
    found = []
    for where, row in file_records(path):
        try:
            right = [row['output']] if isinstance(row['output'], str) else row['output']
            asked = row.get('prompt') or f'{prompt(row["instruction"], row.get("input"))}\n'
            # + '' raises a TypeError for anything but a text; so does [None], for an empty list
            found.append((asked + '', [text + '' for text in right or [None]]))
        except (TypeError, KeyError, AttributeError) as error:
            refuse(where, error)
    if not found:
        raise UserError(f'{path} holds no records')
    return found


@dataclass
class Scoring:
    """Rouge-L of a model's greedy answers: extras/minillm.py FOLDER --answers=FILE,FILE."""

    model: str = ''  # model folder, or a name on the hub
    answers: tuple[str, ...] = ()  # .jsonl files of instructions and reference answers


def main(argv):
    """Command line: FOLDER, then knobs. Prints the Rouge-L of each file, and the mean."""
    options, _, _ = configure(
        argv, Scoring, program='python -m extras.minillm FOLDER', words=('model',)
    )
    tokenizer = load_tokenizer(tokenizer_of_model(options.model))
    model, scores = load(options.model, choose_device('auto')).eval(), []
    for path in options.answers or ['--answers=FILE,...']:  # an error names this missing file
        prompts, references = zip(*scored_prompts(path))
        said = answer_texts(model, tokenizer, [*map(tokenizer.encode, prompts)])
        scores.append(rouge_l(said, references))
        print(f'{path}: Rouge-L {scores[-1]:.2f}')
    print(f'the average: {statistics.mean(scores):.2f}')


if __name__ == '__main__':
    run_as_program(main)
