"""
What a run's folder holds besides the models: the state from which an interrupted stage goes on, what each stage is, and
what explains the numbers. Everything is whole under its name, or not there, and sealed with checksums.

    out_dir/run.json                  the knobs, and of every session its command, commit, versions and device
    out_dir/STAGE/stage.json          what the stage is; another stage is refused this folder
    out_dir/STAGE/metrics.jsonl       a line every few steps
    out_dir/STAGE/state-000001000/    weights, optimizer, random states: torch.distributed.checkpoint; gone when finished
    out_dir/STAGE/stable-000000900/   the same at the end of a stable phase (schedule wsd), kept: a longer run can go on from it
    out_dir/STAGE/config.json, model.safetensors, result.json, checksums.json      the finished model
    out_dir/STAGE/optimizer.safetensors                            its AdamW state, where a later stage wants it
"""
import contextlib
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from checksums import find_damage, measure, read_seal, seal
from configurator import UserError, differences, move_into_place, read_json, write_atomically
from machine import barrier, gather, processes

warnings.filterwarnings('ignore', message='torch.distributed is disabled, unavailable or uninitialized')   # one process


# ---------------------------------------------------------------------------------------------------------------------
# states

def training_state(model, optimizer):
    """The tensors that going on needs, as torch.distributed.checkpoint saves and fills them; and the optimizer's settings."""
    weights, moments = get_state_dict(model, optimizer)
    random = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        random['cuda'] = torch.cuda.get_rng_state()
    return dict(model=weights, optimizer=moments['state'], random=random), moments['param_groups']


def saved_states(folder):
    """The whole states in a stage's folder, the newest last."""
    found = [path for path in Path(folder).glob('*-*') if re.fullmatch(r'(state|stable)-\d{9,}', path.name)]
    return sorted(found, key=lambda path: (int(path.name.partition('-')[2]), path.name))


def remove_states(folder):
    """Remove every state of a finished stage, whole or not, but those of stable phases, and what else only going on needed."""
    for path in [*Path(folder).glob('state-*'), *Path(folder).glob('stable-*.tmp'), Path(folder) / 'best']:
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob('rollout-*'):
        path.unlink()


def save_state(folder, model, optimizer, progress, keep=1, stable=False):
    """
    Save under a temporary name, seal, move into place, then remove all but the newest `keep` states; stable: a state that
    stays. Called by every process. Raises UserError when it cannot be written; the states before it are untouched then.
    """
    rank, world_size = processes()
    target = Path(folder) / f'{"stable" if stable else "state"}-{progress["step"]:09d}'
    unfinished = Path(f'{target}.tmp')
    if rank == 0:
        for path in Path(folder).glob('sta*-*.tmp'):   # what a crash left
            shutil.rmtree(path, ignore_errors=True)
    barrier()   # nobody writes before that is done
    files, failed = {}, ''
    try:
        dcp.save(training_state(model, optimizer)[0], checkpoint_id=unfinished)
        files = measure(sorted(unfinished.iterdir())[rank::world_size])
    except (Exception, CheckpointException) as error:
        failed = _cause(error)
    parts = gather((files, failed))
    failed = next(filter(None, (failure for _, failure in parts)), '')
    if rank == 0 and not failed:
        try:
            seal(unfinished, {name: entry for part, _ in parts for name, entry in part.items()}, owner_of(folder), progress=progress)
            if target.exists():   # saved twice at one step
                os.replace(target, f'{target}.old.tmp')
            os.replace(unfinished, target)
        except OSError as error:
            failed = _cause(error)
    failed = gather(failed)[0] or failed
    if failed:   # on every process
        shutil.rmtree(unfinished, ignore_errors=True)
        free, before = shutil.disk_usage(folder).free, saved_states(folder)
        raise UserError(f'{target} could not be saved ({failed}; {free / 1e9:.1f} GB are free on that disk). '
                        + (f'{before[-1]} is whole: when there is room, ' if before else 'When there is room, ')
                        + 'the same command goes on')
    if rank == 0:
        shutil.rmtree(f'{target}.old.tmp', ignore_errors=True)
        for path in [p for p in saved_states(folder) if p.name.startswith('state')][:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    barrier()


def _cause(error):
    """The innermost reason of a failed save, in a few words."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'[:120]


class _Reader(dcp.FileSystemReader):
    """dcp's, without its one open door: the index of a state is a pickle, and of that only what an index is made of is let in."""

    def read_metadata(self, *args, **kwargs):
        with open(self.path / '.metadata', 'rb') as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = getattr(metadata, 'storage_meta', None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    # tensors and how they are stored: what else an index may name, dcp would unpickle in turn
    allowed = re.compile(r'torch\.distributed\.checkpoint\.(filesystem\._StorageInfo|metadata\.(Metadata|MetadataIndex|'
                         r'StorageMeta|TensorStorageMetadata|TensorProperties|ChunkStorageMetadata|_MEM_FORMAT_ENCODING))|'
                         r'torch\.(Size|bool|[a-z]+\d+)|torch\.serialization\._get_layout|pathlib\.(_local\.)?\w*Path')

    def find_class(self, module, name):
        if self.allowed.fullmatch(f'{module}.{name}'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} has no place in a state')


def damage_in(folder, owner):
    """find_damage by all processes together: each looks at its share of the files, and all get the same answer."""
    return next(filter(None, gather(find_damage(folder, owner, *processes()))), '')


def load_state(folder, model, optimizer, progress):
    """
    Go on from the newest saved state in the folder, if there is one: fills model, optimizer, random states, `progress`. Raises
    UserError that names what is damaged, and the state before it, if that is whole.
    """
    states = saved_states(folder)
    if not states:
        return
    newest, owner = states[-1], owner_of(folder)
    damage = damage_in(newest, owner)
    if damage:
        good = next((path for path in states[-2::-1] if not find_damage(path, owner)), None)
        raise UserError(f'{damage}. Remove {newest}, and the same command goes on from '
                        + (f'{good.name}, which is whole' if good else 'the beginning of the stage'))
    try:
        state, settings = training_state(model, optimizer)
        if 'random.cuda' not in _Reader(newest).read_metadata().state_dict_metadata:   # saved where there was no GPU
            state['random'].pop('cuda', None)
        dcp.load(state, storage_reader=_Reader(newest))
        found = read_seal(newest)['progress']
    except (Exception, CheckpointException) as error:   # whole, and yet not what this version of the code saves
        raise UserError(f'{newest} cannot be read ({_cause(error)}): was it saved by other versions of torch or of this code?') from error
    set_state_dict(model, optimizer, model_state_dict=state['model'],
                   optim_state_dict=dict(state=state['optimizer'], param_groups=settings))
    torch.set_rng_state(state['random']['cpu'].cpu())
    if 'cuda' in state['random']:
        torch.cuda.set_rng_state(state['random']['cuda'].cpu())
    progress.update(found)


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer's state of a finished stage

def save_moments(folder, model, optimizer):
    """
    Write AdamW's state by parameter names to optimizer.safetensors: for a stage that grows from this one. Called by every
    process.
    """
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if processes()[0]:
        return
    states = whole['state']
    tensors = {f'{key}.{name}': state[key].contiguous()
               for name, state in states.items() for key in ('exp_avg', 'exp_avg_sq')}
    step = int(max(state['step'] for state in states.values()))
    path = Path(folder) / 'optimizer.safetensors'
    save_file(tensors, f'{path}.tmp', metadata=dict(step=str(step)))
    move_into_place(f'{path}.tmp', path)


def load_moments(folder):
    """{'step': ..., 'exp_avg': {name: tensor}, 'exp_avg_sq': {...}} as save_moments wrote it. Raises UserError."""
    try:
        with safe_open(Path(folder) / 'optimizer.safetensors', 'pt') as file:
            moments = dict(step=int(file.metadata()['step']), exp_avg={}, exp_avg_sq={})
            for name in file.keys():
                key, _, parameter = name.partition('.')
                tensor = file.get_tensor(name)
                moments[key][parameter] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))   # to be grown in
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f'{folder} has no readable optimizer.safetensors ({error})') from error
    return moments


def set_moments(model, optimizer, moments, dtype=None):
    """Give a fresh AdamW the state `moments`, its tensors in `dtype`; None: in the parameters'."""
    def like(tensor, parameter):
        tensor = tensor.to(parameter.device, dtype or parameter.dtype)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else tensor
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = dict(
            step=torch.tensor(float(moments['step']), device=parameter.device if optimizer.defaults.get('fused') else 'cpu'),
            **{key: like(moments[key][name], parameter) for key in ('exp_avg', 'exp_avg_sq')})


# ---------------------------------------------------------------------------------------------------------------------
# what a stage is, and what a run was

def keep_metrics(path, step):
    """Drop from metrics.jsonl what was logged after `step`: it is trained, and logged, again."""
    if Path(path).is_file():
        lines = Path(path).read_text(encoding='utf-8', errors='replace').splitlines(keepends=True)
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):   # a killed process may leave half a line
                if json.loads(line)['step'] <= step and line.endswith('\n'):
                    kept.append(line)
        write_atomically(path, ''.join(kept))


# knobs that may change when a stage goes on: they say where and how fast it is trained, not what
MACHINE_KNOBS = {'out_dir', 'data_dir', 'eval_interval', 'micro_batch_size', 'device', 'dtype', 'compile', 'log_interval',
                 'save_minutes', 'max_minutes', 'dry_run', 'gpu_tflops', 'keep_states', 'accept_changes', 'parallel', 'recompute'}
# what the steps already done mean depends on these: they cannot change even where changes are accepted
FIXED = re.compile(r'start|parent.*|params|toy|block_size|batch_size|batch_tokens|optimizer_dtype|model\..*')


def read_stage(folder):
    """The content of stage.json, or None where there is none. Raises UserError for a damaged one."""
    path = Path(folder) / 'stage.json'
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f'{error}; delete {folder} to train this stage anew') from None


def owner_of(folder):
    """What the seals of a stage say they belong to: a hash of what the stage was when it began."""
    return (read_stage(folder) or {}).get('owner', '')


def claim(folder, stage, knobs, data=None, write=True):
    """
    Write what the stage is to stage.json; data: {corpus: checksum}. Raises UserError, with the differences, if the folder holds
    another stage; with accept_changes, only for differences that would make nonsense of the steps already done. Returns the
    differences accepted.
    """
    parent = stage.parent
    identity = dict(start=stage.start, parent=parent.name if parent else None, tokens=stage.tokens,
                    **{'parent.position': parent.position, 'parent.val_loss': parent.val_loss} if parent else {},
                    params=stage.params, **{k: v for k, v in asdict(knobs).items() if k not in MACHINE_KNOBS},
                    **{f'model.{k}': v for k, v in asdict(stage.config).items()},
                    **{f'text of {name}': digest for name, digest in (data or {}).items()})
    identity, found = json.loads(json.dumps(identity)), read_stage(folder)
    if found is None:
        if write:
            Path(folder).mkdir(parents=True, exist_ok=True)
            owner = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            write_atomically(Path(folder) / 'stage.json', json.dumps(dict(identity, owner=owner), indent=1) + '\n')
        return []
    changed = [k for k in identity if k in found and found[k] != identity[k]]   # a knob newer than the run: its default
    shown = [f'{k} was {found[k]!r}, now {identity[k]!r}' for k in changed]
    if not changed:
        return []
    fixed = [k for k in changed if FIXED.fullmatch(k)]
    if fixed or not knobs.accept_changes:
        way = '' if fixed else '; --accept_changes=True goes on with the new ones'
        raise UserError(f'{folder} holds a stage with other settings ({"; ".join(shown[:4])}): '
                        f'choose another --out_dir, or delete that folder{way}')
    if write and not (Path(folder) / 'result.json').is_file():
        write_atomically(Path(folder) / 'stage.json', json.dumps(found | identity, indent=1) + '\n')
    return shown


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
        sessions = read_json(path, sessions=list)['sessions']
    except (OSError, UserError):
        sessions = []
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict(knobs=asdict(run) | asdict(method), sessions=[*sessions, session])
    write_atomically(path, json.dumps(content, indent=1) + '\n')
