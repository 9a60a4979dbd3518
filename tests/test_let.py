"""
Learning from a teacher: losses and objectives against direct computations, and Late-to-Early
Training as a method.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, refuses, same_weights, succeeds, train_tokenizer
from test_model import small, tokens
from test_train import plan_of

import let
from engine import teacher as teachers
from engine.errors import UserError
from engine.log import read_metrics
from engine.stage import Progress, Result, next_token
from engine.teacher import open_teacher
from let import Alignment, alignment_loss, distil, let_objective, match_width, pair_layers
from model import GPT, GPTConfig, load

START = Progress(0, 100)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------
# losses


@pytest.mark.parametrize('width, target', [(7, 3), (3, 7), (2048, 576), (5, 5), (1, 4), (8, 1)])
def test_widths_are_matched_by_linear_interpolation_with_both_ends_kept(width, target):
    hidden, j = drawn(2, 3, width), torch.arange(target).double()
    u = j * (width - 1) / max(1, target - 1)  # Eq. 6
    low = u.floor().long()
    high, rest = (low + 1).clamp(max=width - 1), u - low
    expected = (1 - rest) * hidden[..., low] + rest * hidden[..., high]
    torch.testing.assert_close(match_width(hidden, target), expected, atol=1e-12, rtol=0)


def test_cosine_alignment_is_the_mean_over_positions():
    target, teacher = drawn(2, 5, 6), drawn(2, 5, 4, seed=1)
    pairs = zip(match_width(target, 4).flatten(0, 1), teacher.flatten(0, 1))
    expected = -np.mean([float(a @ b / a.norm() / b.norm()) for a, b in pairs])
    assert alignment_loss(target, teacher).item() == pytest.approx(expected)
    assert alignment_loss(target, 3 * target).item() == pytest.approx(-1)


def test_logsum_is_the_log_of_summed_fourth_powers_of_what_is_standardised_over_the_batch():
    target, teacher = drawn(2, 5, 6), drawn(2, 5, 6, seed=1)
    flat = [x.flatten(0, 1).numpy() for x in (target, teacher)]  # over positions of all sequences
    one, other = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4) for x in flat)
    expected = np.log(((one - other) ** 4).sum())
    assert alignment_loss(target, teacher, 'logsum').item() == pytest.approx(expected)


def test_cca_is_the_mean_squared_canonical_correlation_and_sees_through_linear_maps():
    target, teacher = drawn(200, 6), drawn(200, 4, seed=1)
    bases = [np.linalg.qr((x - x.mean(0)).numpy())[0] for x in (target, teacher)]
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    found = let.cca(target, teacher, ridge=0).item()
    assert found == pytest.approx(-(correlations**2).mean())
    mapped = target @ drawn(6, 6, seed=2)
    assert let.cca(target, mapped, ridge=1e-12).item() == pytest.approx(-1)


@pytest.mark.parametrize('kind', let.ALIGNMENTS)
def test_alignment_teaches_no_layer_above_k_and_not_the_teacher(kind):
    model, teacher = small(), drawn(16, 20, 12).requires_grad_()
    alignment_loss(model(tokens(16), hidden_at=2).hidden, teacher, kind).backward()
    assert teacher.grad is None
    for name, p in model.named_parameters():  # Eq. 10
        below = name.startswith(('wte', 'blocks.0.', 'blocks.1.'))
        assert (p.grad is not None and p.grad.any().item()) == below, name


# ----------------------------------------------------------------------------------------------
# objectives


@pytest.fixture
def taught(tmp_path):
    """A teacher's folder, the teacher, a student of another width and depth, ids and targets."""
    teacher, x = small(n_layer=2, n_embd=24, n_head=3).float(), tokens()
    teacher.save(tmp_path / 'teacher')
    return tmp_path / 'teacher', teacher, small().float(), x, x.roll(-1, 1)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize('s_stop, last', [(40, 39), (0.4, 39), (0.005, 0)])
def test_let_adds_the_weighted_alignment_and_decays_it_to_nothing(taught, s_stop, last):
    folder, teacher, student, x, y = taught
    objective = let_objective(folder, Alignment(target_layer=2, lambda0=0.3, s_stop=s_stop))
    theirs, S_stop = teacher.residual_stream(x)[0], s_stop if s_stop > 1 else 100 * s_stop
    for step in (last + 1, 99):
        loss, _, scalars = objective(student, x, y, Progress(step, 100))
        assert scalars == {} and torch.equal(loss, next_token(student, x, y, START)[0])
    for step in (0, last):
        loss, _, scalars = objective(student, x, y, Progress(step, 100))
        output, weight = student(x, y, hidden_at=2), 0.3 * (S_stop - step) / S_stop
        similarity = F.cosine_similarity(match_width(output.hidden, 24), theirs, dim=-1).mean()
        assert loss.item() == pytest.approx((output.loss - weight * similarity).item(), rel=1e-5)


@pytest.mark.parametrize(
    'make', [lambda t: let_objective(t, Alignment(2, s_stop=0.5)), lambda t: distil(t, s_stop=50)]
)
def test_from_the_stop_on_the_teacher_is_gone(taught, make, monkeypatch):
    folder, _, student, x, y = taught
    opened = []

    def remember(*how):
        model = open_teacher(*how)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teachers, 'open_teacher', remember)
    objective = make(folder)
    objective(student, x, y, Progress(49, 100))[0].backward()
    assert opened[0]() is not None
    assert objective(student, x, y, Progress(50, 100))[2] == {}
    gc.collect()
    assert opened[0]() is None
    make(folder)(student, x, y, Progress(50, 100))
    assert len(opened) == 1  # nor is it opened then


def test_the_teachers_head_and_later_layers_are_never_run(taught):
    _, teacher, student, x, y = taught
    expected = teacher.residual_stream(x, layers=1)[0]
    teacher.forward = teacher.norm.forward = teacher.blocks[1].forward = None  # calling them fails
    del teacher.lm_head
    *_, scalars = let_objective(teacher, Alignment(2, teacher_layer=1))(student, x, y, START)
    similarity = -alignment_loss(student(x, hidden_at=2).hidden, expected).item()
    assert scalars['similarity'].item() == pytest.approx(similarity)


def test_the_control_has_the_teachers_shape_and_random_weights(taught):
    folder, _, student, x, y = taught
    scalars = [
        let_objective(folder, Alignment(2, untrained=control))(student, x, y, START)[2]
        for control in (True, True, False)
    ]
    first, again, trained = (s['similarity'] for s in scalars)
    assert first == again != trained


def test_distillation_weighs_data_and_teacher(taught):
    folder, teacher, student, x, y = taught
    loss, *_ = distil(folder, 0.6, 2.0)(student, x, y, Progress(99, 100))
    data = F.cross_entropy(student(x).logits.flatten(0, 1), y.flatten())
    q, p = ((model(x).logits / 2).log_softmax(-1) for model in (student, teacher))
    divergence = 4 * F.kl_div(q, p.detach(), log_target=True, reduction='none').sum(-1).mean()
    expected = 0.6 * data + 0.4 * divergence
    for ours, theirs in zip(gradients(loss, student), gradients(expected, student)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_teacher_of_a_shorter_context_reads_in_windows(taught):
    _, _, student, x, y = taught
    teacher = small(n_layer=2, block_size=8).float()  # 20 positions: three windows of 7, 7, 6
    *_, scalars = let_objective(teacher, Alignment(1))(student, x, y, START)
    windows = [teacher.residual_stream(part)[0] for part in x.split([7, 7, 6], 1)]
    similarity = -alignment_loss(student(x, hidden_at=1).hidden, torch.cat(windows, 1)).item()
    assert scalars['similarity'].item() == pytest.approx(similarity, rel=1e-5)


def test_what_only_pads_a_sequence_is_not_aligned(taught):
    """Series of a set differ in length: what comes after the last target does not count."""
    _, teacher, student, x, y = taught
    y[0, 12:] = y[0, 3] = -100  # the latter is without a target, but within
    *_, scalars = let_objective(teacher, Alignment(2), padded=True)(student, x, y, START)
    hidden, theirs = student(x, hidden_at=2).hidden, teacher.residual_stream(x)[0]
    both = [torch.cat((h[0, :12], h[1:].flatten(0, 1))) for h in (hidden, theirs)]
    assert scalars['similarity'].item() == pytest.approx(-alignment_loss(*both).item(), rel=1e-5)


def test_objectives_compile_once():
    """A changing teacher's state is an input of the compiled step: no reason to compile again."""
    teacher, student, x = small(n_layer=1).float(), small(n_layer=1).float(), tokens()
    torch.compiler.reset()
    compiled = torch.compile(student, backend='eager')
    for objective in (let_objective(teacher, Alignment(1)), distil(teacher)):
        for step in range(3):
            objective(compiled, x, x.roll(-1, 1), Progress(step, 100))[0].backward()
        with torch.compiler.set_stance('fail_on_recompile'):
            objective(compiled, x.flip(0), x.roll(-1, 1), Progress(5, 100))[0].backward()


# ----------------------------------------------------------------------------------------------
# the method


def test_pairs_of_layers():
    pairs = {'L2E': (3, 30), 'L2L': (24, 30), 'M2M': (12, 15), 'L1F5': (5, 30), 'L3F1': (1, 28)}
    assert {pairing: pair_layers(pairing, 30, 24) for pairing in pairs} == pairs
    assert pair_layers('L2E', 2, 4) == (2, 2) and pair_layers('M2M', 1, 1) == (1, 1)
    with pytest.raises(UserError, match='the target has 4 layers, the teacher 2'):
        pair_layers('L3F1', 2, 4)


TINY = 'train.py --method=let --size=16x2 --teacher_size=16x1 --tokens=1280 --teacher_tokens=640'
TINY += ' --block_size=16 --batch_size=4 --eval_tokens=512 --log_interval=2 --s_stop=10'
TINY += ' --learning_rate=0.01'  # 20 steps
CONTROL = 'let,untrained=True,lambda0=1.0,s_stop=0.25'
VARIANTS = ['baseline', 'let', 'let,lambda0=0', 'let,pairing=L2M,alignment=logsum', CONTROL]
VARIANTS += ['rkd', 'salt']


@pytest.fixture(scope='module')
def compared(data_dir, tmp_path_factory):
    """Baseline, LET without strength and in other ways, RKD and SALT."""
    out = tmp_path_factory.mktemp('let')
    line = f'{TINY} --variants={",".join(VARIANTS)} --eval_interval=5'
    succeeds(f'{line} --data_dir={data_dir} --out_dir={out}')
    return out


def test_all_variants_run_and_are_reported(compared):
    report = (compared / 'report.md').read_text()
    assert all(f'\n| {variant} ' in report for variant in VARIANTS)
    assert ' constant similarity |' in report and " steps to the baseline's loss |" in report
    assert same_weights(compared / 'baseline', compared / 'let,lambda0=0')
    for variant, scalar, steps in (
        ('let', 'similarity', 10),
        (CONTROL, 'similarity', 5),
        ('salt', 'distillation_loss', 10),
        ('rkd', 'distillation_loss', 20),
    ):
        lines = [m for m in read_metrics(compared / variant) if 'loss' in m]
        assert all((scalar in m) == (m['step'] <= steps) for m in lines), variant


def test_a_teachers_forward_passes_count(compared, data_dir):
    """
    2 FLOPs a token for every parameter that is used, with the head for distillation alone; in the
    plan as in the result.
    """
    X, T = Result.of(compared / 'baseline').params, 1280
    whole, layers = Result.of(compared / 'teacher').params, load(compared / 'teacher').num_params()
    used = dict(baseline=0, let=0.5 * layers, rkd=whole, salt=0.5 * whole) | {'let,lambda0=0': 0}
    for variant, params in used.items():
        flops = Result.of(compared / variant).flops
        assert flops == pytest.approx(T * (6 * X + 2 * params)), variant
    line = f'{TINY} --variants={",".join(used)} --data_dir={data_dir}'
    plan = {name: p.result.flops for name, p in plan_of(*line.split()[1:]).items()}
    assert plan == pytest.approx({name: Result.of(compared / name).flops for name in plan})


def test_cca_and_logsum_are_of_the_papers_micro_batch(data_dir, tmp_path):
    variants = '--variants=let,alignment=cca,let,alignment=logsum,let'
    plan = plan_of('config/let_1.4b.py', variants).values()
    assert [p.stage.knobs.get('micro_batch_size') for p in plan] == [16, 16, None]
    line = f'{TINY} --variants=let,alignment=cca --data_dir={data_dir} --out_dir={tmp_path}'
    refuses(line, 'cca needs 160 positions in a micro-batch, not 64')
    assert not list(tmp_path.rglob('stage.json'))  # not even the teacher's
    succeeds(f'{line} --batch_size=20 --micro_batch_size=10')
    assert 'similarity' in read_metrics(tmp_path / 'let,alignment=cca')[0]


def test_a_given_teacher_is_identified(compared, data_dir, tmp_path):
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path}/run --teacher={tmp_path}'
    teacher = load(compared / 'teacher')
    teacher.save(tmp_path / 'teacher', 'bytes')
    succeeds(f'{line}/teacher')
    assert same_weights(tmp_path / 'run' / 'let', compared / 'let')
    load(compared / 'baseline').save(tmp_path / 'x' / 'teacher', 'bytes')  # of the same name
    assert 'teaching was' in call(f'{line}/x/teacher').stderr
    teacher.save(tmp_path / 'unnamed')
    refuses(f'{line}/unnamed', 'unnamed has no tokenizer')  # whose are its ids?


def as_it_is(tokenizer):
    pass


def forget_capitals(tokenizer):
    from tokenizers.normalizers import Lowercase

    tokenizer.normalizer = Lowercase()


@pytest.mark.parametrize(
    'change, rows, words',
    [
        (as_it_is, 300, 'RKD and SALT need one tokenizer, not bytes'),
        (forget_capitals, 300, 'cannot be aligned'),
        (as_it_is, 290, '10 tokens for which the model'),
    ],
)
def test_a_teacher_with_another_tokenizer_is_aligned_or_refused(
    data_dir, tmp_path, change, rows, words
):
    folder = train_tokenizer(tmp_path / 'teacher', vocab_size=300, change=change)
    GPT(GPTConfig.named('16x1', vocab_size=rows, block_size=16)).save(tmp_path / 'teacher')
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path}/run --teacher={folder}'
    refuses(f'{line} --variants=rkd' if 'RKD' in words else line, words)
    if 'RKD' in words:
        succeeds(line)
        assert 'similarity' in read_metrics(tmp_path / 'run' / 'let')[0]
