"""One model on several processes and in less memory: the same numbers, whatever the knobs say."""

import pytest
import torch
import torch._dynamo.testing
from conftest import call, run_processes, succeeds
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import UserError
from engine.log import Meter, read_metrics
from engine.optimizer import make_optimizer
from engine.parallel import choose_batch, find_hardware, wrap
from engine.stage import Progress, Result, Stage, next_token
from model import GPT, GPTConfig, load
from train import Run

TINY = '--size=16x2 --block_size=16 --batch_size=4 --tokens=1280 --eval_tokens=500'
TINY = f'train.py {TINY} --log_interval=1 --learning_rate=0.01 --eval_interval=10 --device=cpu'


def same_curves(one, other):
    one, other = one / '16x2', other / '16x2'
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        a['tokens_per_second'] = b.setdefault('tokens_per_second', 0)
        assert a == pytest.approx(b, rel=1e-4), a['step']
    tensors = (load(folder).state_dict().values() for folder in (one, other))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*tensors, strict=True))


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
    """A run of one process that was never interrupted."""
    out = tmp_path_factory.mktemp('whole')
    succeeds(f'{TINY} --data_dir={data_dir} --out_dir={out}')
    return out


# ----------------------------------------------------------------------------------------------
# processes


def test_a_run_goes_on_at_another_number_of_processes(whole, data_dir, tmp_path):
    line = f'{TINY} --data_dir={data_dir} --out_dir={tmp_path} --micro_batch_size=1'
    first = run_processes(2, f'{line} --parallel=fsdp --max_minutes=1e-9')  # stops after a step
    assert ', fsdp on 2 processes' in first.stdout, first.stderr
    assert 'the same command continues from there' in first.stdout
    assert call(f'{line} --max_minutes=1e-9').returncode == 75  # alone, one step more
    assert len(list((tmp_path / '16x2').glob('state-00000000[12]'))) == 2
    assert run_processes(2, f'{line} --parallel=fsdp').returncode == 0
    same_curves(whole, tmp_path)


def test_shards_in_bfloat16_with_recomputed_activations_train_alike(data_dir, tmp_path):
    line = f'{TINY} --tokens=320 --data_dir={data_dir} --out_dir={tmp_path}'
    succeeds(f'{line}/one')
    run_processes(2, f'{line}/two --parallel=fsdp --dtype=bfloat16 --recompute=True')
    losses = [[m.get('loss') for m in read_metrics(tmp_path / n / '16x2')] for n in ('one', 'two')]
    assert losses[0][1:] == pytest.approx(losses[1][1:], rel=0.02)


def test_a_branch_continues_its_trunks_sharded_optimizer_and_the_next_size_grows(
    data_dir, tmp_path
):
    line = 'train.py --method=progressive --sizes=16x2,32x2 --scratch_tokens=640,1280'
    line += ' --schedule=wsd --decay_fraction=0.5 --block_size=16 --eval_tokens=500 --device=cpu'
    run_processes(2, f'{line} --data_dir={data_dir} --parallel=fsdp --out_dir={tmp_path}/two')
    succeeds(f'{line} --data_dir={data_dir} --out_dir={tmp_path}/one')
    for name in ('16x2', '32x2'):
        one, two = (Result.of(tmp_path / number / name).val_loss for number in ('one', 'two'))
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize('environment', [dict(WORLD_SIZE='two'), dict(WORLD_SIZE='2', RANK='2')])
def test_an_environment_without_torchrun_is_explained(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='start several processes with torchrun'):
        find_hardware(Run(device='cpu'))


def test_shards_are_chosen_when_a_replica_does_not_fit():
    run = Run(device='cpu', block_size=2048, batch_size=64)
    eight_h100 = find_hardware(run)._replace(world_size=8, memory=68e9, device=torch.device('cuda'))
    small, large = (Stage(n, GPTConfig.named(n), 1.0, 1.0) for n in ('1b', '8b'))
    assert choose_batch(run, small, eight_h100)[0] == 'ddp'
    strategy, fits = choose_batch(run, large, eight_h100)
    assert strategy == 'fsdp' and 1 < fits <= 8
    taught = Stage('1b', small.config, 1.0, 1.0, teaching=dict(teacher_params=30e9))
    assert choose_batch(run, taught, eight_h100)[0] == 'fsdp'  # its teacher takes the room
    with pytest.raises(UserError, match='needs several processes'):
        choose_batch(Run(parallel='fsdp'), small, eight_h100._replace(world_size=1))


# ----------------------------------------------------------------------------------------------
# memory and the step


def test_recomputed_activations_give_the_same_gradients_in_less_memory():
    torch.manual_seed(0)
    model = GPT(GPTConfig.named('64x8', vocab_size=61, block_size=64)).double()
    x, found = torch.randint(61, (8, 64)), []
    for recompute in (False, True):
        run, kept = Run(device='cpu', recompute=recompute), []  # kept for the backward pass
        wrap(model, 'ddp', run, find_hardware(run))
        hooks = lambda t: kept.append(t.nbytes) or t, lambda t: t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(x, x).loss
        found.append((sum(kept), torch.autograd.grad(loss, model.parameters())))
    (plain, gradients), (less, again) = found
    assert all(map(torch.equal, gradients, again)) and less < 0.5 * plain


class NoSynchronisation(TorchDispatchMode):
    """Fails where the value of a tensor is asked for: the host would wait until a GPU is done."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, 'the host waits'
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('recompute', [False, True])
def test_a_step_is_one_graph_compiled_once_and_waits_for_nothing(recompute):
    torch._dynamo.reset()
    run = Run(device='cpu', block_size=16, batch_size=4, recompute=recompute)
    model, x = (
        GPT(GPTConfig.named('16x2', vocab_size=61, block_size=16)),
        torch.randint(61, (2, 16)),
    )
    optimizer, counter = make_optimizer(model, run), torch._dynamo.testing.CompileCounter()

    def step(model, meter):
        """One step of two micro-batches, as the loop takes it."""
        for _ in range(2):
            loss, count, _ = next_token(model, x, x, Progress(0, 10))
            (loss / 2).backward()
            meter.add(dict(loss=loss), count)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    wrapped = wrap(model, 'ddp', run, find_hardware(run))
    compiled = torch.compile(wrapped, backend=counter, fullgraph=True)  # a break would raise
    for _ in range(3):
        step(compiled, Meter())
    assert counter.frame_count == 1
    with NoSynchronisation():
        meter = Meter()
        step(wrapped, meter)
    assert meter.read().keys() == {'loss'}
