"""
What a run's folder holds besides the models: the state from which an interrupted stage goes on, what each stage is, and
what explains the numbers. Everything is whole under its name, or not there.

    out_dir/run.json                  the knobs, and of every session its command, commit, versions and device
    out_dir/STAGE/stage.json          what the stage is; another stage is refused this folder
    out_dir/STAGE/metrics.jsonl       a line every few steps
    out_dir/STAGE/state-000001000/    weights, optimizer, random states: torch.distributed.checkpoint; gone when finished
    out_dir/STAGE/config.json, model.safetensors, result.json      the finished model
    out_dir/STAGE/optimizer.safetensors                            its AdamW state, where a later stage wants it
"""
import contextlib
import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from configurator import UserError, differences, write_atomically

warnings.filterwarnings('ignore', message='torch.distributed is disabled, unavailable or uninitialized')   # one process


def training_state(model, optimizer, progress):
    """Everything that going on needs, as torch.distributed.checkpoint saves and fills it."""
    weights, moments = get_state_dict(model, optimizer)
    random = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        random['cuda'] = torch.cuda.get_rng_state()
    return dict(model=weights, optimizer=moments, random=random, progress=progress)


def saved_states(folder):
    """The whole states in a stage's folder, the newest last."""
    return sorted(path for path in Path(folder).glob('state-*') if path.suffix != '.tmp')


def remove_states(folder):
    """Remove every state, whole or not, of a finished stage, and what else only going on with it needed."""
    for path in [*Path(folder).glob('state-*'), Path(folder) / 'best']:
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob('rollout-*'):
        path.unlink()


def save_state(folder, model, optimizer, progress):
    """Save under a temporary name, move into place, then remove the states before it. Called by every process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    target = Path(folder) / f'state-{progress["step"]:09d}'
    older = [path for path in Path(folder).glob('state-*') if path != target]
    dcp.save(training_state(model, optimizer, progress), checkpoint_id=f'{target}.tmp')
    if rank == 0:
        shutil.rmtree(target, ignore_errors=True)   # saved twice at one step
        os.replace(f'{target}.tmp', target)
        for path in older:
            if path.name != f'{target.name}.tmp':
                shutil.rmtree(path, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def load_state(folder, model, optimizer, progress):
    """Go on from the newest saved state in the folder, if there is one: fills model, optimizer, random states, `progress`."""
    states = saved_states(folder)
    if not states:
        return
    state = training_state(model, optimizer, dict(progress))
    try:
        dcp.load(state, checkpoint_id=states[-1])
    except Exception as error:   # whatever damage does to the files, the way out is the same
        raise UserError(f'{states[-1]} is damaged ({type(error).__name__}): remove it to go on from an older state, or from '
                        'the beginning of the stage') from error
    set_state_dict(model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
    torch.set_rng_state(state['random']['cpu'].cpu())
    if 'cuda' in state['random']:
        torch.cuda.set_rng_state(state['random']['cuda'].cpu())
    progress.update(state['progress'])


def save_moments(folder, model, optimizer):
    """Write AdamW's state by parameter names to optimizer.safetensors: for a stage that grows from this one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {names[parameter]: state for parameter, state in optimizer.state.items()}
    tensors = {f'{key}.{name}': state[key].contiguous()
               for name, state in states.items() for key in ('exp_avg', 'exp_avg_sq')}
    step = int(max(state['step'] for state in states.values()))
    path = Path(folder) / 'optimizer.safetensors.tmp'
    save_file(tensors, path, metadata=dict(step=str(step)))
    os.replace(path, path.with_suffix(''))


def load_moments(folder):
    """{'step': ..., 'exp_avg': {name: tensor}, 'exp_avg_sq': {...}} as save_moments wrote it. Raises UserError."""
    try:
        with safe_open(Path(folder) / 'optimizer.safetensors', 'pt') as file:
            moments = dict(step=int(file.metadata()['step']), exp_avg={}, exp_avg_sq={})
            for name in file.keys():
                key, _, parameter = name.partition('.')
                moments[key][parameter] = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f'{folder} has no readable optimizer.safetensors ({error})') from error
    return moments


def set_moments(model, optimizer, moments):
    """Give a fresh AdamW the state `moments`."""
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = dict(
            step=torch.tensor(float(moments['step']), device=parameter.device),
            **{key: moments[key][name].to(parameter) for key in ('exp_avg', 'exp_avg_sq')})


def keep_metrics(path, step):
    """Drop from metrics.jsonl what was logged after `step`: it is trained, and logged, again."""
    if Path(path).is_file():
        lines = Path(path).read_text(encoding='utf-8').splitlines(keepends=True)
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):   # a killed process may leave half a line
                if json.loads(line)['step'] <= step and line.endswith('\n'):
                    kept.append(line)
        write_atomically(path, ''.join(kept))


# knobs that may change when a stage goes on: they say where and how fast it is trained, not what
MACHINE_KNOBS = {'out_dir', 'data_dir', 'eval_interval', 'micro_batch_size', 'device', 'dtype', 'compile', 'log_interval',
                 'save_minutes', 'max_minutes', 'dry_run', 'gpu_tflops'}


def claim(folder, stage, knobs, write=True):
    """Write what the stage is to stage.json; raise UserError, with the differences, if the folder holds another stage."""
    identity = dict(start=stage.start, parent=stage.parent.name if stage.parent else None, tokens=stage.tokens,
                    params=stage.params, **{k: v for k, v in asdict(knobs).items() if k not in MACHINE_KNOBS},
                    **{f'model.{k}': v for k, v in asdict(stage.config).items()})
    identity, path = json.loads(json.dumps(identity)), Path(folder) / 'stage.json'
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding='utf-8')))
        except (ValueError, TypeError):
            raise UserError(f'{path} is damaged; delete {folder} to train this stage anew') from None
        changed = [f'{k} was {found.get(k)!r}, now {identity.get(k)!r}'
                   for k in identity if k in found and found[k] != identity[k]]   # a knob newer than the run: its default
        if changed:
            raise UserError(f'{folder} holds a stage with other settings ({"; ".join(changed[:4])}): '
                            'choose another --out_dir, or delete that folder')
    elif write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(identity, indent=1) + '\n')


def record_session(out_dir, run, method, origins, argv, device, processes):
    """Add to run.json what explains this run's numbers: knobs, what differs from the defaults, commit, versions, device."""
    path = Path(out_dir) / 'run.json'
    git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True,
                         cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine()
    session = dict(command=['train.py', *argv], started=time.strftime('%Y-%m-%d %H:%M:%S %z'), commit=git.stdout.strip(),
                   python=platform.python_version(), torch=torch.__version__, device=f'{device.type} ({name})',
                   processes=processes, threads=torch.get_num_threads(),
                   differences=differences(run) | differences(method), set_by=origins)
    try:
        sessions = json.loads(path.read_text(encoding='utf-8'))['sessions']
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(knobs=asdict(run) | asdict(method), sessions=[*sessions, session])
    write_atomically(path, json.dumps(content, indent=1) + '\n')
