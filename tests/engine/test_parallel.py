"""One model on several processes and in less memory: the same numbers, whatever the knobs say."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from conftest import run_command, run_processes
from torch.utils._python_dispatch import TorchDispatchMode

import train
from engine.errors import UserError
from engine.log import Meter
from engine.optimizer import make_optimizer
from engine.parallel import (
    attention_kernels,
    choose_batch,
    estimate_memory,
    find_hardware,
    wrap,
)
from engine.stage import Progress, Result, Stage, next_token
from model import GPT, GPTConfig, load
from train import Run

TINY = [
    '--size=16x2',
    '--block_size=16',
    '--batch_size=4',
    '--tokens=1280',
    '--eval_tokens=500',
    '--log_interval=1',
    '--learning_rate=0.01',
    '--device=cpu',
    '--eval_interval=10',
]


def metrics(folder):
    return [
        json.loads(line)
        for line in (Path(folder) / '16x2' / 'metrics.jsonl').read_text().splitlines()
    ]


def same_curves(one, other):
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {'tokens_per_second'}:
            assert a[name] == pytest.approx(b[name], rel=1e-4 if name == 'grad_norm' else 1e-5), (
                a['step'],
                name,
            )
    tensors = (load(folder / '16x2').state_dict().values() for folder in (one, other))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*tensors, strict=True))
    assert Result.of(one / '16x2').val_loss == pytest.approx(
        Result.of(other / '16x2').val_loss, rel=1e-5
    )


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """A run of one process that was never interrupted."""
    out = tmp_path_factory.mktemp('whole')
    train.main([f'--data_dir={data_dir}', f'--out_dir={out}', *TINY])
    return out


# ----------------------------------------------------------------------------------------------
# processes


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_two_processes_train_what_one_does(whole, data_dir, tmp_path, how):
    outputs = run_processes(
        2,
        'train.py',
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path}',
        f'--parallel={how}',
        '--micro_batch_size=1',
        *TINY,
    )
    assert f', {how} on 2 processes' in outputs[0]
    same_curves(whole, tmp_path)


def test_shards_in_bfloat16_with_recomputed_activations_train_alike(whole, data_dir, tmp_path):
    run_processes(
        2,
        'train.py',
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path}',
        '--parallel=fsdp',
        '--dtype=bfloat16',
        '--recompute=True',
        '--micro_batch_size=1',
        *TINY,
    )
    for a, b in zip(metrics(whole)[1:], metrics(tmp_path)[1:], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=0.02)


@pytest.mark.parametrize(
    'first, then',
    [(['fsdp', 2], ['auto', 1]), (['auto', 1], ['fsdp', 2])],
)
def test_a_run_goes_on_at_another_number_of_processes(whole, data_dir, tmp_path, first, then):
    for (how, number), more in ((first, ['--max_minutes=1e-9']), (then, [])):  # stops after a step
        how = 'auto' if number == 1 else how
        run = partial(run_processes, number) if number > 1 else run_command
        outputs = run(
            'train.py',
            f'--data_dir={data_dir}',
            f'--out_dir={tmp_path}',
            f'--parallel={how}',
            *TINY,
            *more,
        )
        assert more == [] or list((tmp_path / '16x2').glob('state-00000000[1-9]'))
        if more and number > 1:  # how to go on
            assert 'the same command continues from there' in outputs[0]
    same_curves(whole, tmp_path)


def test_a_branch_continues_its_trunks_sharded_optimizer_and_the_next_size_grows(
    data_dir, tmp_path
):
    family = [
        '--method=progressive',
        '--sizes=16x2,32x2',
        '--scratch_tokens=640,1280',
        '--schedule=wsd',
        '--decay_fraction=0.5',
        '--block_size=16',
        '--eval_tokens=500',
        '--device=cpu',
        '--log_interval=2',
        f'--data_dir={data_dir}',
    ]
    run_processes(2, 'train.py', *family, '--parallel=fsdp', f'--out_dir={tmp_path / "two"}')
    train.main([*family, f'--out_dir={tmp_path / "one"}'])
    for name in ('16x2', '32x2'):
        assert Result.of(tmp_path / 'one' / name).val_loss == pytest.approx(
            Result.of(tmp_path / 'two' / name).val_loss, rel=1e-4
        )


def test_the_first_process_deals_out_a_model_that_is_sharded():
    outputs = run_processes(2, 'tests/programs/deal_shards.py')
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert (
        first['same']
        and first['held'] + second['held'] == first['all']
        and second['held'] < 0.6 * first['all']
    )


def test_shards_are_chosen_when_a_replica_does_not_fit():
    run = Run(device='cpu', block_size=2048, batch_size=64)
    eight_h100 = find_hardware(run)._replace(world_size=8, memory=68e9, device=torch.device('cuda'))
    small, large = (Stage(n, GPTConfig.named(n), 1.0, 1.0) for n in ('1b', '8b'))
    assert choose_batch(run, small, eight_h100)[0] == 'ddp'
    assert choose_batch(run, large, eight_h100._replace(memory=1e12))[0] == 'ddp'
    strategy, fits = choose_batch(run, large, eight_h100)
    assert strategy == 'fsdp' and 1 < fits <= 8
    state, _ = estimate_memory(large.config, run)
    assert state == 16 * large.config.num_params(embedding=True, head=True)
    assert estimate_memory(large.config, run, shards=8)[0] < state / 4
    recomputed = estimate_memory(large.config, Run(recompute=True, block_size=2048))
    assert recomputed[1] < estimate_memory(large.config, run)[1]
    taught = Stage('1b', small.config, 1.0, 1.0, teaching=dict(teacher_params=30e9))
    assert choose_batch(run, taught, eight_h100)[0] == 'fsdp'  # its teacher takes the room
    with pytest.raises(UserError, match='needs several processes'):
        choose_batch(Run(parallel='fsdp'), small, eight_h100._replace(world_size=1))


# ----------------------------------------------------------------------------------------------
# memory


def saved_bytes(function):
    """Bytes that a forward pass keeps for its backward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(sizes)


def test_recomputed_activations_give_the_same_gradients_in_less_memory():
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('64x8', vocab_size=61, block_size=64)).double()
    x = torch.randint(61, (8, 64))

    def gradients():
        model.zero_grad()
        model(x, x).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    def forward():
        return model(x, x).loss  # what is held for the backward pass

    plain, held, run = gradients(), saved_bytes(forward), Run(device='cpu', recompute=True)
    wrap(model, 'ddp', run, find_hardware(run))
    again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert saved_bytes(forward) < 0.5 * held
    with torch.no_grad():  # nothing is kept, so nothing is recomputed
        assert torch.equal(model(x).logits, model(x).logits)


def test_knobs_of_memory_do_not_change_the_numbers(whole, data_dir, tmp_path):
    train.main([f'--data_dir={data_dir}', f'--out_dir={tmp_path}', '--recompute=True', *TINY])
    same_curves(whole, tmp_path)


# ----------------------------------------------------------------------------------------------
# the step


class NoSynchronisation(TorchDispatchMode):
    """
    Fails where the value of a tensor is asked for, for which the host would wait until a GPU is
    done.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, (
            'the host waits for the device'
        )
        return function(*args, **(kwargs or {}))


def step_of(model, hardware, run):
    """A function that trains one step of two micro-batches, as the loop does."""
    optimizer, x = make_optimizer(model, run), torch.randint(61, (2, 16))

    def step(ddp_model, meter):
        for _ in range(2):
            loss, count, _ = next_token(ddp_model, x, x, Progress(0, 10))
            (loss / 2).backward()
            meter.add(dict(loss=loss), count)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize('recompute', [False, True])
def test_a_step_is_one_graph_compiled_once_and_waits_for_nothing(recompute):
    torch._dynamo.reset()
    run = Run(device='cpu', block_size=16, batch_size=4, recompute=recompute)
    model, hardware = GPT(GPTConfig.named('16x2', vocab_size=61, block_size=16)), find_hardware(run)
    step, counter = step_of(model, hardware, run), torch._dynamo.testing.CompileCounter()
    ddp_model = wrap(model, 'ddp', run, hardware)
    compiled = torch.compile(ddp_model, backend=counter, fullgraph=True)  # a break would raise
    for _ in range(3):
        step(compiled, Meter())
    assert counter.frame_count == 1
    meter = Meter()
    with NoSynchronisation():
        step(ddp_model, meter)
    assert meter.read().keys() == {'loss'}


@pytest.mark.parametrize(
    'capability, first', [((9, 0), 'CUDNN_ATTENTION'), ((8, 0), None), ((10, 0), None)]
)
def test_hopper_tries_cudnn_before_flash_attention(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    with attention_kernels(torch.device('cuda')):
        order = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    assert order[0].name == first if first else order == before
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_two_processes_measure_a_given_reference_as_one_does(data_dir, tmp_path):
    common = [f'--data_dir={data_dir}', '--block_size=16', '--eval_tokens=512', '--device=cpu']
    made = run_command('train.py', *common, '--size=16x2', '--tokens=640', f'--out_dir={tmp_path}')
    assert made.returncode == 0, made.stderr
    knobs = [*common, '--method=inheritune', f'--reference={tmp_path}/16x2', '--n=1', '--max_n=1']
    losses = []
    for number in (1, 2):
        out = tmp_path / f'on-{number}'
        run_processes(number, 'train.py', *knobs, '--tokens=640', f'--out_dir={out}')
        losses.append(Result.of(out / 'reference').val_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize('environment', [dict(WORLD_SIZE='two'), dict(WORLD_SIZE='2', RANK='2')])
def test_an_environment_without_torchrun_is_explained(data_dir, environment, tmp_path):
    process = run_command('train.py', f'--out_dir={tmp_path}/run', '--device=cpu', **environment)
    assert process.returncode == 2 and process.stderr.count('\n') == 1, process.stderr
    assert 'start several processes with torchrun' in process.stderr
