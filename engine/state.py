"""
What a stage's folder holds: stage.json says what the stage is, state-000001000/ is a resumable
state, result.json is written last. A state is complete under its name or absent, has a manifest
with checksums, and is saved and loaded by all processes together; it is safetensors, no pickle.
"""

import json
import os
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader as Reader
from torch.distributed.checkpoint import HuggingFaceStorageWriter as Writer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.errors import UserError, first_line
from engine.files import (
    digest,
    find_damage,
    measure_files,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from engine.parallel import SIGNALS, barrier, full_state, gather, processes
from engine.stage import Result
from engine.tokenizer_files import tokenizer_files

warnings.filterwarnings('ignore', message='torch.distributed is disabled')  # one process
KEPT = 2  # states: the one before the newest, in case that is damaged

# ----------------------------------------------------------------------------------------------
# what a stage is

# knobs that may change when a stage continues: where and how fast it is trained, not what
MACHINE_KNOBS = set(
    'out_dir data_dir eval_interval micro_batch_size device dtype compile parallel recompute '
    'log_interval save_minutes max_minutes keep_every verify dry_run seeds'.split()
)


def stage_identity(stage, knobs):
    """
    What a stage is, as JSON: its shape and start, what teaches it, what it reads, and every knob
    but those of the machine. A loss tells one ancestor from another of the same name.
    """
    before = filter(None, (stage.parent, *stage.also))
    identity = {
        'origin': asdict(stage.origin),
        'teaching': stage.teaching,
        'tokens': stage.tokens,
        'params': stage.params,
        'position': stage.position,
        'before': [[result.name, result.val_loss] for result in before],
    }
    identity |= {k: v for k, v in asdict(knobs).items() if k not in MACHINE_KNOBS}
    identity |= {k: v for k, v in stage.knobs.items() if k in MACHINE_KNOBS}  # its own
    identity |= {f'model.{k}': v for k, v in asdict(stage.config).items()}
    for corpus in () if stage.source else knobs.open_corpora():
        identity[f'text of {corpus.name}'] = corpus.sha256
    return json.loads(json.dumps(identity))  # as it will be read back


def read_identity(folder):
    """The content of stage.json, or {} if there is none. Raises UserError for a damaged one."""
    try:
        return read_json(Path(folder) / 'stage.json')
    except FileNotFoundError:
        return {}
    except UserError as error:
        raise UserError(f'{error}; delete {folder} to train this stage again') from None


def owner_of(folder):
    """What a stage's manifests belong to: a hash of what the stage is."""
    return digest(read_identity(folder))


def finished_before(folder, identity):
    """
    Claim the folder for a stage of this identity; returns its Result if it is finished, else None.
    Raises UserError for a folder of another stage, listing differences, or for damaged files.
    """
    found = read_identity(folder)
    # compared as they are stored: the loss of a model from elsewhere, NaN, equals itself there
    text = lambda content, key: json.dumps(content.get(key))
    changed = [key for key in identity if found and text(found, key) != text(identity, key)]
    if changed:
        shown = [f'{k} was {found.get(k)!r}, now {identity[k]!r}' for k in changed[:4]]
        raise UserError(
            f'{folder} holds a stage with other settings ({"; ".join(shown)}): choose another '
            '--out_dir, or delete that folder'
        )
    barrier()  # everyone has looked
    if not found and processes()[0] == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        began = dict(command=sys.argv, torch=torch.__version__)
        write_json(Path(folder) / 'stage.json', identity | began)
    barrier()
    if not (Path(folder) / 'result.json').is_file():
        return None
    if damage := find_damage_together(folder, owner_of(folder)):
        raise UserError(
            f'{damage}. Remove {folder}/result.json to train the stage again, from its last state '
            'if it has one'
        )
    if processes()[0] == 0:
        print(f'{Path(folder).name}: finished before')
        remove_states(folder, keep=identity['schedule'] == 'constant')
    return Result.of(folder)


def save_model(model, folder, tokenizer='', dtype=None):
    """Save a model, whole or in shards, as a Hugging Face folder. For every process. UserError."""
    state = full_state(model)
    try:
        if processes()[0] == 0:
            model.save(folder, tokenizer, state, dtype)
    except OSError as error:
        raise UserError(
            f'{folder}: the trained model could not be saved ({error}); its last state is kept: '
            'when there is room on the disk, the same command continues'
        ) from error


def save_result(result, keep):
    """
    Write the manifest of the model in a Result's folder and, last, result.json; then drop all but
    the newest `keep` states. For every process.
    """
    folder = Path(result.folder)
    if processes()[0] == 0:
        saved = [*folder.glob('model*.safetensors*'), folder / 'config.json']
        files = measure_files([*saved, *tokenizer_files(folder)])
        write_manifest(folder, files, owner_of(folder))
        result.write()
        remove_states(folder, keep)
    barrier()


# ----------------------------------------------------------------------------------------------
# saving and loading states


def saved_states(folder):
    """The states in a stage's folder, the newest last."""
    return sorted(p for p in Path(folder).glob('state-*') if p.suffix != '.tmp')


def remove_states(folder, keep):
    """Remove all but the newest `keep` states, and what a crash left of one."""
    folder, states = Path(folder), saved_states(folder)
    old = states[:-keep] if keep else states
    for path in [*folder.glob('state-*.tmp'), *old, *([] if keep else [folder / 'best'])]:
        shutil.rmtree(path, ignore_errors=True)


def training_state(model, optimizer, objective=None):
    """
    (the tensors of a resumable state, the optimizer's settings). `own`: random states, and of an
    objective with a state of its own the part of this process.
    """
    weights, optimizer_state = get_state_dict(model, optimizer)
    own = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        own['cuda'] = torch.cuda.get_rng_state()
    if kept := getattr(objective, 'state', None):
        own |= {f'{processes()[0]}.{name}': v for name, v in kept.state_dict().items()}
    tensors = dict(model=weights, optimizer=optimizer_state['state'], own=own)
    return tensors, optimizer_state['param_groups']


def save_state(folder, model, optimizer, progress, objective=None):
    """
    Save the state of this moment under a temporary name, then its manifest, rename it, and remove
    all but the newest. progress: a dict with 'step'. Called by every process. Raises UserError if
    it cannot be written; earlier states are untouched then.
    """
    rank, world_size = processes()
    target = Path(folder) / f'state-{progress["step"]:09d}'
    unfinished = Path(f'{target}.tmp')
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a crash
    barrier()  # nobody writes before that is done
    files, failure = {}, ''
    try:
        tensors, _ = training_state(model, optimizer, objective)
        dcp.save(tensors, storage_writer=Writer(unfinished, save_distributed=True))
        files = measure_files(sorted(unfinished.iterdir())[rank::world_size])
    except (Exception, CheckpointException) as error:
        if len(SIGNALS) > 1:  # a second Ctrl-C, whatever torch made of it
            raise KeyboardInterrupt from None
        failure = root_cause(error)
    shares = gather((files, failure))
    if failure := max(failure for _, failure in shares):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f'{target} could not be saved ({failure}); what was saved before is kept: when there '
            'is room, the same command continues'
        )
    if rank == 0:
        files = {name: entry for files, _ in shares for name, entry in files.items()}
        write_manifest(unfinished, files, owner_of(folder), progress=progress)
        shutil.rmtree(target, ignore_errors=True)  # saved twice at one step
        os.replace(unfinished, target)
        remove_states(folder, KEPT)
    barrier()


def root_cause(error):
    """The innermost reason of a failed save or load, in a few words."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)[:120]


def find_damage_together(folder, owner):
    """find_damage, each process checking its share of the files; all get the same answer."""
    return max(gather(find_damage(folder, owner, *processes())))


def load_state(folder, model, optimizer, objective=None):
    """
    Restore the newest state in the folder: fills model, optimizer and random states, and returns
    the progress it was saved with. Raises UserError naming what is damaged and the last intact
    state.
    """
    states = saved_states(folder)
    if not states:
        raise UserError(f'{folder} has no saved state')
    newest, owner = states[-1], owner_of(folder)
    if damage := find_damage_together(newest, owner):
        intact = [path.name for path in states[:-1] if not find_damage(path, owner)]
        good = f'{intact[-1]}, which is intact' if intact else 'the beginning of the stage'
        raise UserError(f'{damage}. Remove {newest}, and the same command continues from {good}')
    state, settings = training_state(model, optimizer)
    own = read_state(newest, state)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state['model'],
        optim_state_dict=dict(state=state['optimizer'], param_groups=settings),
    )
    if kept := getattr(objective, 'state', None):
        mine = f'{processes()[0]}.'
        kept.load_state_dict({k.removeprefix(mine): own[k] for k in own if k.startswith(mine)})
    torch.set_rng_state(own['cpu'])
    if 'cuda' in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own['cuda'])
    return read_manifest(newest)['progress']


def read_state(path, state):
    """
    Fill `state`, nested dicts of tensors, from a saved one that is intact; returns its part `own`,
    whatever that holds. Raises UserError for one that cannot be read.
    """
    try:
        saved, own = Reader(path).read_metadata().state_dict_metadata, {}
        for key, found in saved.items():
            if key.startswith('own.'):
                tensor = torch.empty(found.size, dtype=found.properties.dtype)
                own[key.removeprefix('own.')] = tensor
        dcp.load(state | dict(own=own), storage_reader=Reader(path))
        return own
    except (Exception, CheckpointException) as error:
        raise UserError(
            f'{path} is intact but cannot be read ({root_cause(error)}): was it saved by other '
            'versions of torch or of this code?'
        ) from error
