"""
Learning from a teacher: losses and objectives against direct computations, and Late-to-Early
Training as a method.
"""

import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import kd_loss, reverse_kl
from test_model import small, tokens
from test_train import metrics, same

import let
import train
from engine import teacher as teachers
from engine.errors import UserError
from engine.report import mean_curve, steps_to_loss
from engine.stage import Progress, Result, next_token
from engine.teacher import open_teacher
from let import (
    Alignment,
    alignment_loss,
    cosine_similarity,
    distil,
    match_width,
    pair_layers,
)
from model import GPT, GPTConfig, load

START = Progress(0, 100)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------------
# losses


@pytest.mark.parametrize(
    'width, target',
    [(7, 3), (3, 7), (2048, 576), (64, 63), (63, 64), (2, 9), (9, 2), (5, 5), (1, 4), (8, 1)],
)
def test_widths_are_matched_by_linear_interpolation_with_both_ends_kept(width, target):
    hidden = drawn(2, 3, width)
    found = match_width(hidden, target)
    if target > 1:
        expected = F.interpolate(
            hidden.flatten(0, 1)[:, None], size=target, mode='linear', align_corners=True
        )[:, 0].view(2, 3, target)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for j in range(target):  # Eq. 6, coordinate by coordinate
        u = j * (width - 1) / max(1, target - 1)
        low, high = math.floor(u), min(math.floor(u) + 1, width - 1)
        torch.testing.assert_close(
            found[..., j],
            (1 - (u - low)) * hidden[..., low] + (u - low) * hidden[..., high],
            atol=1e-12,
            rtol=0,
        )
    assert torch.equal(found[..., 0], hidden[..., 0]) and (
        target == 1 or torch.allclose(found[..., -1], hidden[..., -1], atol=1e-13)
    )


def test_cosine_alignment_is_the_mean_over_positions_that_have_a_partner():
    target, teacher, covered = drawn(2, 5, 6), drawn(2, 5, 4, seed=1), torch.rand(2, 5) > 0.4
    one_by_one = [
        [float(a @ b / a.norm() / b.norm()) for a, b in zip(*rows)]
        for rows in zip(match_width(target, 4), teacher)
    ]
    assert alignment_loss(target, teacher).item() == pytest.approx(-np.mean(one_by_one))
    assert cosine_similarity(target, teacher, covered).item() == pytest.approx(
        np.array(one_by_one)[covered.numpy()].mean()
    )
    assert alignment_loss(target, 3 * target).item() == pytest.approx(-1)


def test_logsum_is_the_log_of_summed_fourth_powers_and_the_same_in_micro_batches():
    target, teacher = drawn(2, 5, 6), drawn(2, 5, 6, seed=1)

    def standardised(x):  # every feature over the positions of a sequence
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-4)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    ways = ((let.per_feature, standardised), (let.per_vector, unit))
    for normalise, expected in ways:
        difference = expected(target.numpy()) - expected(teacher.numpy())
        by_hand = np.log((difference**4).sum(-1).mean(-1)).mean()
        found = let.logsum(target, teacher, None, normalise).item()
        assert found == pytest.approx(by_hand)
        pieces = [let.logsum(a[None], b[None], None, normalise) for a, b in zip(target, teacher)]
        assert found == pytest.approx(torch.stack(pieces).mean().item())
        first = torch.arange(5).expand(2, 5) < 3
        assert let.logsum(target, teacher, first, normalise).item() == pytest.approx(
            let.logsum(target[:, :3], teacher[:, :3], None, normalise).item()
        )
    assert alignment_loss(target, teacher, 'logsum') == let.logsum(target, teacher, None)


def test_what_a_constant_vector_reaches():
    unit = F.normalize(drawn(4, 50, 8) + 1, dim=-1)
    best = F.normalize(unit.mean((0, 1)), dim=0)
    expected = F.cosine_similarity(unit, best, dim=-1).mean()
    assert let.constant_similarity(3 * unit).item() == pytest.approx(expected.item())
    half = torch.arange(50).expand(4, 50) < 25
    assert let.constant_similarity(unit, half).item() == pytest.approx(
        let.constant_similarity(unit[:, :25]).item()
    )


def test_cca_is_the_mean_squared_canonical_correlation_and_sees_through_linear_maps():
    target, teacher = drawn(4, 50, 6), drawn(4, 50, 4, seed=1)
    bases = [
        np.linalg.qr(x.flatten(0, 1).numpy() - x.flatten(0, 1).numpy().mean(0))[0]
        for x in (target, teacher)
    ]
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    assert let.cca(target, teacher, None, ridge=0).item() == pytest.approx(
        -(correlations**2).mean()
    )
    assert (
        let.cca(target, target @ drawn(6, 6, seed=2), None, ridge=1e-12).item() == pytest.approx(-1)
        and alignment_loss(target, target, 'cca').item() < -0.99
    )
    with pytest.raises(UserError, match='needs 60 positions in a batch, not 50'):
        let.cca(target[:1], teacher[:1], None)
    half = torch.arange(50).expand(4, 50) < 25
    assert let.cca(target, teacher, half, 0).item() == pytest.approx(
        let.cca(target[:, :25], teacher[:, :25], None, 0).item()
    )


@pytest.mark.parametrize('kind', let.ALIGNMENTS)
def test_alignment_teaches_no_layer_above_k_and_not_the_teacher(kind):
    model, x = small(), tokens(16)
    teacher = drawn(16, 20, 12).requires_grad_()
    alignment_loss(model(x, hidden_at=2).hidden, teacher, kind).backward()
    assert teacher.grad is None
    for name, p in model.named_parameters():  # Eq. 10
        below = name.startswith(('wte', 'blocks.0.', 'blocks.1.'))
        assert (
            (p.grad is not None and p.grad.abs().max() > 0)
            if below
            else p.grad is None or not p.grad.any()
        ), name


def test_kd_loss_is_the_softened_divergence_and_teaches_the_student_only():
    student, teacher = (
        drawn(2, 3, 7, dtype=torch.float32).requires_grad_(),
        drawn(2, 3, 7, seed=1, dtype=torch.float32).requires_grad_(),
    )
    for temperature in (1.0, 2.5):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
        assert kd_loss(student, teacher, temperature).item() == pytest.approx(
            expected.item(), rel=1e-5
        )
    kd_loss(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    torch.testing.assert_close(
        student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 6
    )
    assert kd_loss(student, student).item() == pytest.approx(0, abs=1e-6)


def test_reverse_kl():
    student, teacher = drawn(4, 7), drawn(4, 7, seed=1)
    p, q = student.softmax(-1), teacher.softmax(-1)
    assert reverse_kl(student, teacher).item() == pytest.approx(
        (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5
    )


# ----------------------------------------------------------------------------------------------
# objectives


@pytest.fixture
def taught(tmp_path):
    """A teacher's folder, the teacher, a student of another width and depth, ids and targets."""
    teacher, x = small(n_layer=2, n_embd=24, n_head=3).float(), tokens()
    teacher.save(tmp_path / 'teacher')
    return tmp_path / 'teacher', teacher, small().float(), x, x.roll(-1, 1)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_let_adds_the_weighted_alignment_and_decays_it_to_nothing(taught):
    folder, teacher, student, x, y = taught
    objective = let.let(folder, Alignment(target_layer=2, lambda0=0.3, s_stop=40))
    theirs = teacher.residual_stream(x)[0]
    for step, weight in ((0, 0.3), (10, 0.225), (39, 0.0075)):
        loss, _, scalars = objective(student, x, y, Progress(step, 100))
        output = student(x, y, hidden_at=2)
        similarity = F.cosine_similarity(match_width(output.hidden, 24), theirs, dim=-1).mean()
        assert loss.item() == pytest.approx((output.loss - weight * similarity).item(), rel=1e-5)
        assert scalars['similarity'].item() == pytest.approx(
            similarity.item(), rel=1e-5
        ) and scalars['alignment_weight'].item() == pytest.approx(weight)
        assert scalars['data_loss'].item() == pytest.approx(output.loss.item())
    for step in (40, 99):
        loss, _, scalars = objective(student, x, y, Progress(step, 100))
        assert scalars == {} and all(
            map(torch.equal, gradients(loss, student), gradients(student(x, y).loss, student))
        )


def test_progress_counts_steps_or_fractions():
    assert (
        [Progress(step, 200).fraction_of(0.5) for step in (0, 50, 100, 150)]
        == [0, 0.5, 1, 1]
        == [Progress(step, 200).fraction_of(100) for step in (0, 50, 100, 150)]
    )
    assert Progress(0, 10).fraction_of(0) == 1
    assert Progress(5, 10).fraction_of(1) == 0.5  # 1 is all steps: nobody asks for the first alone


def test_lambda_zero_is_next_token_prediction_to_the_bit(taught):
    folder, _, student, x, y = taught
    loss, _, scalars = let.let('nowhere', Alignment(2, lambda0=0.0))(student, x, y, START)
    plain, *_ = next_token(student, x, y, START)
    assert (
        scalars == {}
        and torch.equal(loss, plain)
        and all(map(torch.equal, gradients(loss, student), gradients(plain, student)))
    )


@pytest.mark.parametrize(
    'make',
    [
        lambda teacher: let.let(teacher, Alignment(2, s_stop=0.5)),
        lambda teacher: distil(teacher, s_stop=0.5),
    ],
    ids=['let', 'salt'],
)
def test_from_the_stop_on_the_teacher_is_gone(taught, make, monkeypatch):
    folder, _, student, x, y = taught
    opened = []

    def remember(name, device, untrained):
        model = open_teacher(name, device, untrained)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teachers, 'open_teacher', remember)
    objective = make(folder)
    objective(student, x, y, Progress(49, 100))[0].backward()
    assert opened[0]() is not None
    objective(student, x, y, Progress(50, 100))
    gc.collect()
    assert opened[0]() is None and len(opened) == 1
    make(folder)(student, x, y, Progress(50, 100))
    assert len(opened) == 1  # a run that goes on after the stop never opens it


def test_the_teachers_head_and_later_layers_are_never_run(taught):
    _, teacher, student, x, y = taught
    expected = teacher.residual_stream(x, layers=1)[0]
    teacher.forward = teacher.norm.forward = teacher.blocks[1].forward = None  # calling them fails
    del teacher.lm_head
    loss, _, scalars = let.let(teacher, Alignment(2, teacher_layer=1))(student, x, y, START)
    assert scalars['similarity'].item() == pytest.approx(
        cosine_similarity(student(x, hidden_at=2).hidden, expected).item()
    )


@pytest.mark.parametrize('alpha, temperature', [(0.6, 2.0), (0.0, 1.0)])
def test_distillation_weighs_data_and_teacher(taught, alpha, temperature):
    folder, teacher, student, x, y = taught
    loss, _, scalars = distil(folder, alpha, temperature)(student, x, y, START)
    data, divergence = (
        F.cross_entropy(student(x).logits.flatten(0, 1), y.flatten()),
        kd_loss(student(x).logits, teacher(x).logits, temperature),
    )
    assert scalars['data_loss'].item() == pytest.approx(data.item(), rel=1e-5) and scalars[
        'distillation_loss'
    ].item() == pytest.approx(divergence.item(), rel=1e-4)
    for ours, expected in zip(
        gradients(loss, student),
        gradients(alpha * data + (1 - alpha) * divergence, student),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_salt_is_distillation_first_and_plain_training_then(taught):
    folder, _, student, x, y = taught
    objective = distil(folder, 0.5, s_stop=20)
    assert 'distillation_loss' in objective(student, x, y, Progress(19, 100))[2]
    assert objective(student, x, y, Progress(20, 100))[2] == {}


def test_a_teacher_of_a_shorter_context_reads_in_windows(taught):
    _, _, student, x, y = taught
    teacher = small(n_layer=2, block_size=8).float()  # 20 positions: three windows of 7, 7, 6
    *_, scalars = let.let(teacher, Alignment(1))(student, x, y, START)
    theirs = torch.cat(
        [teacher.residual_stream(x[:, a:b])[0] for a, b in ((0, 7), (7, 14), (14, 20))], 1
    )
    assert scalars['similarity'].item() == pytest.approx(
        cosine_similarity(student(x, hidden_at=1).hidden, theirs).item(), rel=1e-5
    )


def test_any_callable_can_teach(taught):
    _, _, student, x, y = taught
    *_, scalars = let.let(lambda ids: ids[..., None] * torch.ones(10), Alignment(1))(
        student, x, y, START
    )
    assert scalars['similarity'].item() == pytest.approx(
        cosine_similarity(student(x, hidden_at=1).hidden, x[..., None].expand(-1, -1, 10)).item(),
        rel=1e-5,
    )
    with pytest.raises(AssertionError, match='no shape to initialise'):
        let.let(lambda ids: ids, Alignment(2, untrained=True))


def test_the_control_is_the_teachers_shape_as_initialised(taught):
    folder, teacher, student, x, y = taught
    generator = torch.get_rng_state()
    control = let.let(folder, Alignment(2, untrained=True))(student, x, y, START)[2]
    again = let.let(folder, Alignment(2, untrained=True))(student, x, y, START)[2]
    real = let.let(folder, Alignment(2))(student, x, y, START)[2]
    assert control['similarity'] == again['similarity'] != real['similarity']
    assert torch.equal(torch.get_rng_state(), generator)  # the run draws what it would have drawn
    fresh = open_teacher(folder, untrained=True)
    assert fresh.config == teacher.config and not fresh.wte.weight.requires_grad


def test_a_teacher_of_another_vocabulary_is_asked_where_its_tokens_end(taught):
    _, teacher, student, x, y = taught
    objective = let.let(
        teacher, Alignment(2), ('bytes', 'bytes')
    )  # ids below 61 are the same text in both
    assert objective(student, x, y, START)[0].item() == pytest.approx(
        let.let(teacher, Alignment(2))(student, x, y, START)[0].item(), rel=1e-6
    )


def test_objectives_compile_once():
    """
    A changing teacher's state is an input of the compiled step, not a reason to compile it again.
    """
    teacher, student, x = small(n_layer=1).float(), small(n_layer=1).float(), tokens()
    torch.compiler.reset()
    compiled = torch.compile(student)
    for objective in (let.let(teacher, Alignment(1)), distil(teacher)):
        for step in range(3):
            objective(compiled, x, x.roll(-1, 1), Progress(step, 100))[0].backward()
        with torch.compiler.set_stance('fail_on_recompile'):
            objective(compiled, x.flip(0), x.roll(-1, 1), Progress(5, 100))[0].backward()


# ----------------------------------------------------------------------------------------------
# the method


def test_pairs_of_layers():
    assert [pair_layers(p, 30, 24) for p in let.PAIRINGS] == [
        (3, 30),
        (12, 30),
        (24, 30),
        (3, 15),
        (12, 15),
        (24, 15),
    ]
    assert (
        pair_layers('L1F5', 30, 24) == (5, 30)
        and pair_layers('L3F1', 12, 4) == (1, 10)
        and pair_layers('L2E', 2, 4) == (2, 2)
    )
    with pytest.raises(UserError, match='target has 4 layers, there is no layer 5'):
        pair_layers('L1F5', 2, 4)
    with pytest.raises(UserError, match='teacher has 2 layers'):
        pair_layers('L3F1', 2, 4)


def arguments(data_dir, out, *more):
    return [
        '--method=let',
        f'--data_dir={data_dir}',
        f'--out_dir={out}',
        '--size=16x2',
        '--teacher_size=16x1',
        '--tokens=1280',
        '--teacher_tokens=640',
        '--block_size=16',
        '--batch_size=4',
        '--eval_tokens=512',
        '--log_interval=2',
        '--learning_rate=0.01',
        '--device=cpu',
        '--s_stop=10',
        *more,
    ]


@pytest.fixture(scope='module')
def compared(data_dir, tmp_path_factory):
    """Baseline, LET without strength and in other ways, RKD and SALT: 20 steps each."""
    out = tmp_path_factory.mktemp('let')
    train.main(
        arguments(
            data_dir,
            out,
            '--variants=baseline,let,let+0,let+L2M+logsum,let+untrained+1.0+stop0.25,rkd,salt',
            '--eval_interval=5',
        )
    )
    return out


def test_all_variants_run_and_are_reported(compared):
    report = (compared / 'report.md').read_text()
    control = 'let+untrained+1.0+stop0.25'
    variants = ('baseline', 'let', 'let+0', 'let+L2M+logsum', control, 'rkd', 'salt')
    for variant in variants:
        assert f'\n| {variant} ' in report
        assert math.isfinite(Result.of(compared / f'{variant}').val_loss)
    assert '| of a constant |' in report
    assert 'similarity.png' in report and (compared / 'similarity.png').stat().st_size > 5000
    assert same(compared / 'baseline', compared / 'let+0') and not same(
        compared / 'baseline', compared / 'let'
    )
    lines = [m for m in metrics(compared / 'let') if 'loss' in m]
    assert [m.get('alignment_weight') for m in lines[:5]] == pytest.approx(
        [0.095, 0.075, 0.065, 0.045, 0.03], abs=0.011
    )
    assert (
        all({'data_loss', 'alignment_loss', 'similarity'} <= m.keys() for m in lines[:5])
        and 'similarity' not in lines[-1]
    )
    lines = [m for m in metrics(compared / f'{control}') if 'alignment_weight' in m]
    assert [m['alignment_weight'] for m in lines] == pytest.approx([0.9, 0.5, 0.2])  # of 5 steps
    assert (
        'distillation_loss' in metrics(compared / 'rkd')[-1]
        and 'distillation_loss' not in metrics(compared / 'salt')[-1]
    )


def test_a_teachers_forward_passes_count(compared, data_dir, tmp_path):
    """
    2 FLOPs a token for every parameter that is used, with the head for distillation alone; in the
    plan as in the result.
    """
    X, T = Result.of(compared / 'baseline').params, 1280
    whole, layers = Result.of(compared / 'teacher').params, load(compared / 'teacher').num_params()
    assert whole > layers > 0
    used = dict(baseline=0, let=0.5 * layers, rkd=whole, salt=0.5 * whole) | {'let+0': 0}
    for variant, params in used.items():
        result = Result.of(compared / f'{variant}')
        assert result.flops == pytest.approx(T * (6 * X + 2 * params)), variant
        assert metrics(compared / f'{variant}')[-1]['flops'] == result.flops
    argv = arguments(data_dir, tmp_path, '--variants=baseline,let,rkd,salt,let+0')
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    planned = {p.stage.name: p.result.flops for p in train.plan(run, method)}
    found = {name: Result.of(compared / name).flops for name in planned}
    assert planned == pytest.approx(found)


def test_cca_is_of_a_whole_batch(data_dir, tmp_path):
    more = ['--variants=let+cca', '--tokens=640', '--teacher_tokens=64', '--eval_interval=0']
    with pytest.raises(UserError, match='cca of 16 dimensions needs 160 positions in a batch'):
        train.main(arguments(data_dir, tmp_path / 'few', *more))
    assert not (tmp_path / 'few').exists()
    more.append('--batch_size=10')
    train.main(arguments(data_dir, tmp_path / 'whole', *more))
    train.main(arguments(data_dir, tmp_path / 'split', *more, '--micro_batch_size=5'))
    losses = [Result.of(tmp_path / run / 'let+cca').val_loss for run in ('split', 'whole')]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # the teacher's batches are split


def test_models_along_a_run_are_kept_and_evaluated(compared, data_dir, tmp_path, capsys):
    import evaluate

    more = ['--variants=let', '--keep_every=8', f'--teacher={compared / "teacher"}']
    train.main(arguments(data_dir, tmp_path, *more))
    stage = tmp_path / 'let'
    assert {path.name for path in stage.glob('step-*')} == {'step-8', 'step-16'}
    assert same(stage, compared / 'let')  # which it is not disturbed by
    kept, last = load(stage / 'step-16'), load(stage)
    assert kept.config == last.config and not torch.equal(kept.wte.weight, last.wte.weight)
    capsys.readouterr()
    kept = [str(stage / 'step-8'), str(stage / 'step-16'), str(stage)]
    evaluate.main([*kept, f'--data_dir={data_dir}', '--data=pydocs', f'--out={tmp_path}'])
    assert 'step-8' in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_weight_of_alignment(compared, data_dir, tmp_path):
    stops = 0
    while True:
        try:
            train.main(
                arguments(
                    data_dir,
                    tmp_path / 'run',
                    '--variants=let',
                    '--log_interval=1',
                    '--max_minutes=1e-9',
                )
            )  # a step at a time
            break
        except SystemExit:
            stops += 1
    assert stops > 20 and same(tmp_path / 'run' / 'let', compared / 'let')
    weights = [
        m['alignment_weight'] for m in metrics(tmp_path / 'run' / 'let') if 'alignment_weight' in m
    ]
    assert weights == pytest.approx([0.1 * (1 - step / 10) for step in range(10)])


def test_share_of_steps_to_a_loss(tmp_path):
    results = []
    for name, shift in (('a', 0.1), ('b', -0.1)):
        lines = [
            dict(step=10, val_loss=3.0 + shift),
            dict(step=15),
            dict(step=20, val_loss=2.0 + shift),
            dict(step=40),
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        results.append(Result(name, str(tmp_path / name), val_loss=1.0 + shift))
    curve = mean_curve(results)
    assert curve == [(0.25, 3.0), (0.5, 2.0), (1.0, 1.0)] and [
        steps_to_loss(curve, loss) for loss in (2.5, 1.5, 0.5)
    ] == [0.375, 0.75, None]


@pytest.mark.parametrize(
    'more, word',
    [
        (['--pairing=L1F3'], 'target has 2 layers'),
        (['--pairing=E2L'], "no pairing 'E2L'"),
        (['--variants=lett'], 'did you mean let'),
        (['--variants=let+sinus'], "no pairing 'sinus'"),
        (['--alignment=dot'], 'alignment must be one of cosine'),
        (['--lambda0=-1'], 'lambda0 must be a number, at least 0'),
        (['--teacher=nowhere'], 'nowhere is not a folder'),
        (['--variants='], 'variants'),
        (['--variants=let+3+5'], "'let[+]3[+]5' in variants says lambda0 twice"),
        (['--variants=let+logsum+cca'], 'says kind twice'),
        (['--variants=let+cca', '--teacher_size=64x2'], 'cca of 64 dimensions needs 640'),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        train.main(arguments(data_dir, tmp_path / 'run', *more))
    assert not list(tmp_path.rglob('stage.json'))


def test_a_given_teacher_is_examined_before_training(compared, data_dir, tmp_path, capsys):
    train.main(arguments(data_dir, tmp_path / 'run', f'--teacher={compared / "teacher"}'))
    assert f'objective let (teacher {compared / "teacher"}' in capsys.readouterr().out and same(
        tmp_path / 'run' / 'let', compared / 'let'
    )
    elsewhere = tmp_path / 'elsewhere' / 'teacher'  # the same name, another model
    load(compared / 'baseline').save(elsewhere, 'bytes')
    with pytest.raises(UserError, match='teaching was'):
        train.main(arguments(data_dir, tmp_path / 'run', f'--teacher={elsewhere}'))
    folder = tmp_path / 'damaged'
    load(compared / 'teacher').save(folder, 'bytes')
    (folder / 'model.safetensors').write_bytes(b'\0' * 100)
    with pytest.raises(UserError, match='damaged/model.safetensors is damaged'):
        train.main(arguments(data_dir, tmp_path / 'other', f'--teacher={folder}'))
    with pytest.raises(UserError, match='unheard_of is no tokenizer'):
        load(compared / 'teacher').save(folder, 'unheard_of')


def test_a_plan_opens_no_teacher_and_knows_not_how_many_layers_it_has(data_dir, tmp_path, capsys):
    more = ('--teacher=owner/large', '--dry_run=True', '--pairing=L2F1')
    train.main(arguments(data_dir, tmp_path / 'run', *more))
    words = 'teacher owner/large, target_layer 1, teacher_layer by L2F1'
    assert words in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('name, N', [('SmolLM2-135M', 106.2e6), ('SmolLM2-1.7B', 1.61e9)])
def test_a_plan_counts_a_public_teacher_whose_shape_is_known(name, N):
    run, method, _ = train.configure(['config/let_1.4b.py'], train.Run, train.METHODS)
    method.teacher, method.variants = f'HuggingFaceTB/{name}', ('baseline', 'let')
    run.dry_run = True
    baseline, taught = train.plan(run, method)
    tokens = 1500 * run.batch_size * run.block_size
    more = taught.result.flops - baseline.result.flops
    assert more == pytest.approx(2 * N * tokens, rel=0.01)


def test_a_plan_counts_a_teacher_that_is_here(compared, data_dir, tmp_path, capsys):
    """Its forward passes, and its weights in the memory of a GPU."""
    argv = arguments(data_dir, tmp_path, f'--teacher={compared / "teacher"}')
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    (planned,) = train.plan(replace(run, dry_run=True), method)
    assert planned.result.flops == Result.of(compared / 'let').flops
    assert planned.stage.teaching['teacher_layer'] == 1
    teacher = load(compared / 'teacher').num_params()
    assert planned.stage.teaching['teacher_params'] == teacher
    deep = let.Teacher.of('deep', GPTConfig.named('16x4', vocab_size=257, block_size=16))
    middle = let.LET(variants=('let+M2E',)).parse('let+M2E', deep.layers, 6)
    assert deep.used_by(middle) == deep.params / 2  # of four layers two are run


def test_a_teacher_with_another_tokenizer(data_dir, tmp_path):
    pytest.importorskip('tokenizers')
    from conftest import train_tokenizer

    for kind in ('byte-level', 'lowercase'):
        folder = Path(train_tokenizer(kind, tmp_path / kind, 300))
        GPT(train.Run(data_dir='nowhere').model_config('16x1', vocab_size=300, block_size=16)).save(
            folder
        )
    train.main(
        arguments(
            data_dir,
            tmp_path / 'run',
            f'--teacher={tmp_path / "byte-level"}',
            '--tokens=256',
            '--s_stop=2',
        )
    )
    assert 'similarity' in metrics(tmp_path / 'run' / 'let')[0]
    for kind, variants, word in (
        ('lowercase', 'let', 'cannot be aligned'),
        ('byte-level', 'let,rkd', 'need one tokenizer'),
    ):
        with pytest.raises(UserError, match=word):
            train.main(
                arguments(
                    data_dir,
                    tmp_path / 'other',
                    f'--teacher={tmp_path / kind}',
                    f'--variants={variants}',
                )
            )
