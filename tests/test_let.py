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
from conftest import kd_loss, train_tokenizer
from test_model import small, tokens
from test_train import metrics, planned, same

import let
import train
from engine import teacher as teachers
from engine.errors import UserError
from engine.report import mean_curve
from engine.stage import Progress, Result, next_token
from engine.teacher import open_teacher
from let import Alignment, alignment_loss, distil, let_objective, match_width, pair_layers
from model import GPT, GPTConfig, load

START = Progress(0, 100)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------------
# losses


@pytest.mark.parametrize(
    'width, target', [(7, 3), (3, 7), (2048, 576), (64, 63), (9, 2), (5, 5), (1, 4), (8, 1)]
)
def test_widths_are_matched_by_linear_interpolation_with_both_ends_kept(width, target):
    hidden = drawn(2, 3, width)
    found = match_width(hidden, target)
    for j in range(target):  # Eq. 6, coordinate by coordinate
        u = j * (width - 1) / max(1, target - 1)
        low, high = math.floor(u), min(math.floor(u) + 1, width - 1)
        expected = (1 - (u - low)) * hidden[..., low] + (u - low) * hidden[..., high]
        torch.testing.assert_close(found[..., j], expected, atol=1e-12, rtol=0)
    assert torch.equal(found[..., 0], hidden[..., 0])
    if target > 1:
        how = dict(size=target, mode='linear', align_corners=True)
        theirs = F.interpolate(hidden.flatten(0, 1)[:, None], **how)[:, 0].view(2, 3, target)
        torch.testing.assert_close(found, theirs, atol=1e-12, rtol=0)
        assert torch.equal(found[..., -1], hidden[..., -1])


def test_cosine_alignment_is_the_mean_over_positions():
    target, teacher = drawn(2, 5, 6), drawn(2, 5, 4, seed=1)
    one_by_one = [
        float(a @ b / a.norm() / b.norm())
        for rows in zip(match_width(target, 4), teacher)
        for a, b in zip(*rows)
    ]
    assert alignment_loss(target, teacher).item() == pytest.approx(-np.mean(one_by_one))
    assert alignment_loss(target, 3 * target).item() == pytest.approx(-1)


def test_logsum_is_the_log_of_summed_fourth_powers_of_what_is_standardised_over_the_batch():
    target, teacher = drawn(2, 5, 6), drawn(2, 5, 6, seed=1)

    def standardised(x):  # every feature, over all positions of all sequences
        x = x.flatten(0, 1).numpy()
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-4)

    by_hand = np.log(((standardised(target) - standardised(teacher)) ** 4).sum())
    assert alignment_loss(target, teacher, 'logsum').item() == pytest.approx(by_hand)


def test_cca_is_the_mean_squared_canonical_correlation_and_sees_through_linear_maps():
    target, teacher = drawn(200, 6), drawn(200, 4, seed=1)
    bases = [np.linalg.qr((x - x.mean(0)).numpy())[0] for x in (target, teacher)]
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    found = let.cca(target, teacher, ridge=0).item()
    assert found == pytest.approx(-(correlations**2).mean())
    mapped = target @ drawn(6, 6, seed=2)
    assert let.cca(target, mapped, ridge=1e-12).item() == pytest.approx(-1)
    assert alignment_loss(target, target, 'cca').item() < -0.99
    one = bases[1].T @ (target[:, 0] - target[:, 0].mean()).numpy()  # one feature, six times
    explained = (one**2).sum() / float(target[:, 0].var(correction=0) * 200)
    found = let.cca(target[:, :1].expand(200, 6), teacher).item()
    assert found == pytest.approx(-explained / 4, rel=0.01)


def test_what_a_constant_vector_reaches():
    unit = F.normalize(drawn(4, 50, 8) + 1, dim=-1)
    best = F.normalize(unit.mean((0, 1)), dim=0)
    expected = F.cosine_similarity(unit, best, dim=-1).mean()
    assert let.constant_similarity(3 * unit).item() == pytest.approx(expected.item())


@pytest.mark.parametrize('kind', let.ALIGNMENTS)
def test_alignment_teaches_no_layer_above_k_and_not_the_teacher(kind):
    model, x = small(), tokens(16)
    teacher = drawn(16, 20, 12).requires_grad_()
    alignment_loss(model(x, hidden_at=2).hidden, teacher, kind).backward()
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
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize('s_stop, last', [(40, 39), (0.4, 39), (0, -1), (0.005, 0)])
def test_let_adds_the_weighted_alignment_and_decays_it_to_nothing(taught, s_stop, last):
    folder, teacher, student, x, y = taught
    objective = let_objective(folder, Alignment(target_layer=2, lambda0=0.3, s_stop=s_stop))
    theirs, S_stop = teacher.residual_stream(x)[0], s_stop if s_stop > 1 else 100 * s_stop
    for step in sorted({0, 10, last, last + 1, 99} - {-1}):
        loss, _, scalars = objective(student, x, y, Progress(step, 100))
        if step > last:  # to the bit
            plain = next_token(student, x, y, START)[0]
            assert scalars == {} and torch.equal(loss, plain)
            assert all(map(torch.equal, gradients(loss, student), gradients(plain, student)))
            continue
        output, weight = student(x, y, hidden_at=2), 0.3 * (S_stop - step) / S_stop
        similarity = F.cosine_similarity(match_width(output.hidden, 24), theirs, dim=-1).mean()
        assert loss.item() == pytest.approx((output.loss - weight * similarity).item(), rel=1e-5)
        assert scalars['similarity'].item() == pytest.approx(similarity.item(), rel=1e-5)
        assert scalars['data_loss'].item() == pytest.approx(output.loss.item())


def test_lambda_zero_is_next_token_prediction_and_opens_no_teacher(taught):
    _, _, student, x, y = taught
    loss, _, scalars = let_objective('nowhere', Alignment(2, lambda0=0.0))(student, x, y, START)
    assert scalars == {} and torch.equal(loss, next_token(student, x, y, START)[0])


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
    assert opened[0]() is None and len(opened) == 1
    make(folder)(student, x, y, Progress(50, 100))
    assert len(opened) == 1  # a run that goes on after the stop never opens it


def test_the_teachers_head_and_later_layers_are_never_run(taught):
    _, teacher, student, x, y = taught
    expected = teacher.residual_stream(x, layers=1)[0]
    teacher.forward = teacher.norm.forward = teacher.blocks[1].forward = None  # calling them fails
    del teacher.lm_head
    *_, scalars = let_objective(teacher, Alignment(2, teacher_layer=1))(student, x, y, START)
    similarity = -alignment_loss(student(x, hidden_at=2).hidden, expected).item()
    assert scalars['similarity'].item() == pytest.approx(similarity)


@pytest.mark.parametrize('alpha, temperature', [(0.6, 2.0), (0.0, 1.0)])
def test_distillation_weighs_data_and_teacher(taught, alpha, temperature):
    folder, teacher, student, x, y = taught
    loss, _, scalars = distil(folder, alpha, temperature)(student, x, y, Progress(99, 100))
    data = F.cross_entropy(student(x).logits.flatten(0, 1), y.flatten())
    divergence = kd_loss(student(x).logits, teacher(x).logits, temperature)
    assert scalars['data_loss'].item() == pytest.approx(data.item(), rel=1e-5)
    assert scalars['distillation_loss'].item() == pytest.approx(divergence.item(), rel=1e-4)
    expected = gradients(alpha * data + (1 - alpha) * divergence, student)
    for ours, theirs in zip(gradients(loss, student), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_teacher_of_a_shorter_context_reads_in_windows(taught):
    _, _, student, x, y = taught
    teacher = small(n_layer=2, block_size=8).float()  # 20 positions: three windows of 7, 7, 6
    *_, scalars = let_objective(teacher, Alignment(1))(student, x, y, START)
    windows = [teacher.residual_stream(x[:, a:b])[0] for a, b in ((0, 7), (7, 14), (14, 20))]
    similarity = -alignment_loss(student(x, hidden_at=1).hidden, torch.cat(windows, 1)).item()
    assert scalars['similarity'].item() == pytest.approx(similarity, rel=1e-5)


def test_what_only_pads_a_sequence_is_not_aligned(taught):
    """Series of a set differ in length: what comes after the last target does not count."""
    _, teacher, student, x, y = taught
    y = y.clone()
    y[0, 12:] = -100
    y[0, 3] = -100  # without a target, but within
    how = Alignment(2)
    padded = x.clone()
    padded[0, 12:] = 5
    losses = [
        let_objective(teacher, how, padded=True)(student, i, y, START)[0] for i in (x, padded)
    ]
    assert losses[0] == losses[1]
    *_, scalars = let_objective(teacher, how, padded=True)(student, x, y, START)
    hidden, theirs = student(x, hidden_at=2).hidden, teacher.residual_stream(x)[0]
    both = [torch.cat((h[0, :12], h[1:].flatten(0, 1))) for h in (hidden, theirs)]
    assert scalars['similarity'].item() == pytest.approx(-alignment_loss(*both).item(), rel=1e-5)


def test_the_control_is_the_teachers_shape_as_initialised(taught):
    folder, teacher, student, x, y = taught
    generator = torch.get_rng_state()
    similarity = [
        let_objective(folder, Alignment(2, untrained=control))(student, x, y, START)[2][
            'similarity'
        ]
        for control in (True, True, False)
    ]
    assert similarity[0] == similarity[1] != similarity[2]
    assert torch.equal(torch.get_rng_state(), generator)  # the run draws what it would have drawn
    fresh = open_teacher(folder, untrained=True)
    assert fresh.config == teacher.config and not fresh.wte.weight.requires_grad


def test_a_teacher_of_another_vocabulary_is_asked_where_its_tokens_end(taught):
    _, teacher, student, x, y = taught
    same_text = let_objective(teacher, Alignment(2), ('bytes', 'bytes'))
    plain = let_objective(teacher, Alignment(2))(student, x, y, START)[0].item()
    assert same_text(student, x, y, START)[0].item() == pytest.approx(plain, rel=1e-6)


def test_objectives_compile_once():
    """
    A changing teacher's state is an input of the compiled step, not a reason to compile it again.
    """
    teacher, student, x = small(n_layer=1).float(), small(n_layer=1).float(), tokens()
    torch.compiler.reset()
    compiled = torch.compile(student)
    for objective in (let_objective(teacher, Alignment(1)), distil(teacher)):
        for step in range(3):
            objective(compiled, x, x.roll(-1, 1), Progress(step, 100))[0].backward()
        with torch.compiler.set_stance('fail_on_recompile'):
            objective(compiled, x.flip(0), x.roll(-1, 1), Progress(5, 100))[0].backward()


# ----------------------------------------------------------------------------------------------
# the method


def test_pairs_of_layers():
    pairs = {'L2E': (3, 30), 'L2M': (12, 30), 'L2L': (24, 30)}
    pairs |= {'M2E': (3, 15), 'M2M': (12, 15), 'M2L': (24, 15), 'L1F5': (5, 30), 'L3F1': (1, 28)}
    assert {pairing: pair_layers(pairing, 30, 24) for pairing in pairs} == pairs
    assert pair_layers('L2E', 2, 4) == (2, 2) and pair_layers('M2M', 1, 1) == (1, 1)
    for pairing in ('L1F5', 'L3F1'):
        with pytest.raises(UserError, match='the target has 4 layers, the teacher 2'):
            pair_layers(pairing, 2, 4)


def arguments(data_dir, out, *more):
    words = '--method=let --size=16x2 --teacher_size=16x1 --tokens=1280 --teacher_tokens=640'
    words += ' --block_size=16 --batch_size=4 --eval_tokens=512 --log_interval=2 --s_stop=10'
    words += f' --learning_rate=0.01 --device=cpu --data_dir={data_dir} --out_dir={out}'
    return [*words.split(), *more]


CONTROL = 'let,untrained=True,lambda0=1.0,s_stop=0.25'
VARIANTS = ('baseline', 'let', 'let,lambda0=0', 'let,pairing=L2M,alignment=logsum', CONTROL)
VARIANTS += ('rkd', 'salt')


@pytest.fixture(scope='module')
def compared(data_dir, tmp_path_factory):
    """Baseline, LET without strength and in other ways, RKD and SALT: 20 steps each."""
    out = tmp_path_factory.mktemp('let')
    train.main(arguments(data_dir, out, f'--variants={",".join(VARIANTS)}', '--eval_interval=5'))
    return out


def test_all_variants_run_and_are_reported(compared):
    report = (compared / 'report.md').read_text()
    for variant in VARIANTS:
        assert f'\n| {variant} ' in report and math.isfinite(Result.of(compared / variant).val_loss)
    assert ' constant similarity |' in report and ' steps to its loss |' in report
    baseline = compared / 'baseline'
    assert same(baseline, compared / 'let,lambda0=0') and not same(baseline, compared / 'let')
    for variant, scalar, steps in (
        ('let', 'similarity', 10),
        (CONTROL, 'similarity', 5),
        ('salt', 'distillation_loss', 10),
        ('rkd', 'distillation_loss', 20),
    ):
        lines = [m for m in metrics(compared / variant) if 'loss' in m]
        assert all((scalar in m) == (m['step'] <= steps) for m in lines), variant
        assert {'data_loss', scalar} <= lines[0].keys()


def test_a_teachers_forward_passes_count(compared, data_dir, tmp_path):
    """
    2 FLOPs a token for every parameter that is used, with the head for distillation alone; in the
    plan as in the result.
    """
    X, T = Result.of(compared / 'baseline').params, 1280
    whole, layers = Result.of(compared / 'teacher').params, load(compared / 'teacher').num_params()
    assert whole > layers > 0
    used = dict(baseline=0, let=0.5 * layers, rkd=whole, salt=0.5 * whole) | {'let,lambda0=0': 0}
    for variant, params in used.items():
        result = Result.of(compared / variant)
        assert result.flops == pytest.approx(T * (6 * X + 2 * params)), variant
        assert metrics(compared / variant)[-1]['flops'] == result.flops
    argv = arguments(data_dir, tmp_path, f'--variants={",".join(used)}')
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    plans = {p.stage.name: p.result.flops for p in train.plan(run, method)}
    assert plans == pytest.approx({name: Result.of(compared / name).flops for name in plans})


def test_cca_and_logsum_are_of_the_papers_micro_batch(data_dir, tmp_path):
    words = ['--variants=let,alignment=cca,let,alignment=logsum,let', '--dry_run=True']
    stages = [stage for stage, _ in planned('let_1.4b.py', *words)]
    assert [stage.knobs.get('micro_batch_size') for stage in stages] == [16, 16, None]
    with pytest.raises(UserError, match='cca needs 40,960 positions in a micro-batch, not 20,480'):
        planned('let_7b.py', *words)
    argv = arguments(data_dir, tmp_path, '--variants=let,alignment=cca', '--tokens=640')
    with pytest.raises(UserError, match='cca needs 160 positions in a micro-batch, not 64'):
        train.main(argv)
    assert not list(tmp_path.rglob('stage.json'))  # not even the teacher's
    train.main([*argv, '--batch_size=20', '--micro_batch_size=10'])
    assert 'similarity' in metrics(tmp_path / 'let,alignment=cca')[0]


def test_where_nobody_is_taught_there_is_no_teacher(data_dir, tmp_path):
    argv = arguments(data_dir, tmp_path, '--variants=baseline')
    for more in ([], ['--teacher=nowhere']):
        run, method, _ = train.configure([*argv, *more], train.Run, train.METHODS)
        assert [p.stage.name for p in train.plan(run, method)] == ['baseline']


def test_a_curve_is_the_mean_over_seeds_against_the_share_of_the_steps(tmp_path):
    results = []
    for name, shift in (('a', 0.1), ('b', -0.1)):
        lines = [dict(step=10, val_loss=3.0 + shift), dict(step=15)]
        lines += [dict(step=20, val_loss=2.0 + shift), dict(step=40)]
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        results.append(Result(name, str(tmp_path / name), val_loss=1.0 + shift))
    assert mean_curve(results) == [(0.25, 3.0), (0.5, 2.0), (1.0, 1.0)]


@pytest.mark.parametrize(
    'more, word',
    [
        (['--pairing=L1F3'], 'the target has 2 layers'),
        (['--variants=let,pairing=sinus'], "no pairing 'sinus'"),
        (['--variants=lett'], 'did you mean let'),
        (['--variants=let,weight=3'], "no knob 'weight'"),
        (['--variants=let,size=64x4'], "no knob 'size'"),
        (['--variants=baseline,lambda0=3'], "no knob 'lambda0'"),
        (['--variants=rkd,untrained=True'], "no knob 'untrained'"),
        (['--alignment=dot'], 'alignment must be one of cosine'),
        (['--lambda0=-1'], 'lambda0 must be a number, at least 0'),
        (['--teacher=nowhere'], 'nowhere is not a folder'),
        (['--variants='], "no variant ''"),
    ],
)
def test_mistakes_are_found_before_training(data_dir, tmp_path, more, word):
    with pytest.raises(UserError, match=word):
        train.main(arguments(data_dir, tmp_path / 'run', *more))
    assert not list(tmp_path.rglob('stage.json'))


def test_a_given_teacher_is_opened_before_training(compared, data_dir, tmp_path, capsys):
    teacher = compared / 'teacher'
    train.main(arguments(data_dir, tmp_path / 'run', f'--teacher={teacher}'))
    assert f'objective let (teacher {teacher}, target_layer 1' in capsys.readouterr().out
    assert same(tmp_path / 'run' / 'let', compared / 'let')
    elsewhere = tmp_path / 'elsewhere' / 'teacher'  # the same name, another model
    load(compared / 'baseline').save(elsewhere, 'bytes')
    with pytest.raises(UserError, match='teaching was'):
        train.main(arguments(data_dir, tmp_path / 'run', f'--teacher={elsewhere}'))
    load(teacher).save(tmp_path / 'unnamed')
    with pytest.raises(UserError, match='unnamed has no tokenizer'):  # whose are its ids?
        train.main(arguments(data_dir, tmp_path / 'other', f'--teacher={tmp_path / "unnamed"}'))
    load(teacher).save(tmp_path / 'damaged', 'bytes')
    (tmp_path / 'damaged' / 'model.safetensors').write_bytes(b'\0' * 100)
    with pytest.raises(UserError, match='damaged/model.safetensors cannot be read'):
        train.main(arguments(data_dir, tmp_path / 'other', f'--teacher={tmp_path / "damaged"}'))


def test_a_plan_opens_no_teacher_and_knows_not_how_large_it_is(data_dir, tmp_path, capsys):
    more = ('--teacher=owner/large', '--dry_run=True', '--pairing=L7F1')
    train.main(arguments(data_dir, tmp_path / 'run', *more))
    words = ' '.join(capsys.readouterr().out.split())
    assert 'teacher owner/large, target_layer 1' in words
    assert 'teacher_params 0' in words


@pytest.mark.parametrize('name, N', [('SmolLM2-135M', 106.2e6), ('SmolLM2-1.7B', 1.61e9)])
def test_a_plan_counts_a_public_teacher_whose_shape_is_known(name, N):
    run, method, _ = train.configure(['config/let_1.4b.py'], train.Run, train.METHODS)
    method.teacher, method.variants = f'HuggingFaceTB/{name}', ('baseline', 'let')
    run.dry_run = True
    baseline, taught = train.plan(run, method)
    tokens = 1500 * run.batch_size * run.block_size
    more = taught.result.flops - baseline.result.flops
    assert more == pytest.approx(2 * N * tokens, rel=0.01)


def test_a_plan_counts_the_layers_of_a_teacher_that_are_run(compared, data_dir, tmp_path):
    argv = arguments(data_dir, tmp_path, f'--teacher={compared / "teacher"}')
    run, method, _ = train.configure(argv, train.Run, train.METHODS)
    (plan,) = train.plan(replace(run, dry_run=True), method)
    assert plan.result.flops == Result.of(compared / 'let').flops
    teacher = load(compared / 'teacher').num_params()
    assert plan.stage.teaching['teacher_params'] == teacher
    deep = GPTConfig.named('16x4', vocab_size=257, block_size=16)
    _, params, _ = let.LET(pairing='M2E').objective('let', let.Teacher('deep', 'deep', deep), 6)
    assert params == deep.num_params() / 2  # of four layers two are run


@pytest.mark.parametrize('kind', ['llama', 'opt'])
def test_a_teacher_with_another_tokenizer_is_aligned(data_dir, tmp_path, kind):
    """OPT's folder has a vocab.json and a merges.txt, and no tokenizer.json."""
    pytest.importorskip('transformers')
    shape = dict(vocab_size=300, block_size=16)
    if kind == 'opt':
        shape |= dict(act='relu', norm='layer', pos='learned', bias=True, n_mlp=64)
    folder = Path(train_tokenizer('byte-level', tmp_path / 'teacher', 300))
    GPT(replace(GPTConfig.named('16x1'), **shape)).save(folder)
    if kind == 'opt':
        model = json.loads((folder / 'tokenizer.json').read_text())['model']
        (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
        (folder / 'merges.txt').write_text('\n'.join(map(' '.join, model['merges'])))
        (folder / 'tokenizer.json').unlink()
        settings = dict(tokenizer_class='GPT2Tokenizer', eos_token='<|endoftext|>')
        (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
        assert json.loads((folder / 'config.json').read_text())['model_type'] == 'opt'
    argv = arguments(data_dir, tmp_path / 'run', f'--teacher={folder}', '--tokens=256')
    train.main([*argv, '--s_stop=2'])
    assert 'similarity' in metrics(tmp_path / 'run' / 'let')[0]
    with pytest.raises(UserError, match='RKD and SALT need one tokenizer, not bytes'):
        train.main([*argv, '--variants=let,rkd'])


@pytest.mark.parametrize(
    'kind, rows, word',
    [('lowercase', 300, 'cannot be aligned'), ('byte-level', 290, '10 tokens for which the model')],
)
def test_a_tokenizer_that_does_not_fit_is_refused(data_dir, tmp_path, kind, rows, word):
    """One that forgets capitals, and one with more tokens than its model has rows."""
    folder = Path(train_tokenizer(kind, tmp_path / 'teacher', 300))
    GPT(GPTConfig.named('16x1', vocab_size=rows, block_size=16)).save(folder)
    with pytest.raises(UserError, match=word):
        train.main(arguments(data_dir, tmp_path / 'run', f'--teacher={folder}'))
