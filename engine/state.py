"""
The folder of a stage: stage.json identifies the stage, state-000001000/ is a resumable state after
1,000 steps, result.json is written last. A state gets its name only when it is complete, has a
manifest with checksums, and is saved and loaded by all processes together, as safetensors.
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

# torch.distributed.checkpoint gives this warning in a run of one process
warnings.filterwarnings('ignore', message='torch.distributed is disabled')
KEPT = 2  # states to keep: the newest, and one before it in case that one is damaged

# ----------------------------------------------------------------------------------------------
# what a stage is

# knobs that may change when a stage resumes: they affect where and how fast, not what it learns
MACHINE_KNOBS = set(
    'out_dir data_dir eval_interval micro_batch_size device dtype compile parallel recompute '
    'log_interval save_minutes max_minutes keep_every verify dry_run seeds'.split()
)


def stage_identity(stage, knobs):
    """
    A JSON object that identifies a stage: its shape, starting weights, objective, data, and all
    knobs except MACHINE_KNOBS. Ancestors are listed with their losses, which differ even if names
    are equal.
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
    identity |= {k: v for k, v in stage.knobs.items() if k in MACHINE_KNOBS}  # set by the method
    identity |= {f'model.{k}': v for k, v in asdict(stage.config).items()}
    for corpus in () if stage.source else knobs.open_corpora():
        identity[f'text of {corpus.name}'] = corpus.sha256
    return json.loads(json.dumps(identity))  # as it will be read back: tuples become lists


def read_identity(folder):
    """The content of stage.json, or {} if there is none. Raises UserError for a damaged one."""
    try:
        return read_json(Path(folder) / 'stage.json')
    except FileNotFoundError:
        return {}
    except UserError as error:
        raise UserError(f'{error}; delete {folder} to train this stage again') from None


def owner_of(folder):
    """The owner of a stage's manifests: a hash of its stage.json."""
    return digest(read_identity(folder))


def finished_before(folder, identity):
    """
    Claim a folder for the stage with this identity, by writing stage.json; returns the stage's
    Result if it is finished, else None. Raises UserError if the folder belongs to another stage,
    listing the differences, or has damaged files. Every process must call this.
    """
    found = read_identity(folder)
    # compare JSON texts, in which NaN, the loss of a model from elsewhere, equals itself
    text = lambda content, key: json.dumps(content.get(key))
    changed = [key for key in identity if found and text(found, key) != text(identity, key)]
    if changed:
        shown = [f'{k} was {found.get(k)!r}, now {identity[k]!r}' for k in changed[:4]]
        raise UserError(
            f'{folder} holds a stage with other settings ({"; ".join(shown)}): choose another '
            '--out_dir, or delete that folder'
        )
    barrier()  # every process must have read the folder before process 0 writes to it
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
    """
    Save a model, whole or sharded, as a Hugging Face folder. Raises UserError if it cannot be
    written. Every process must call this.
    """
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
    Write the manifest of the model in a Result's folder, then result.json, then remove all but the
    newest `keep` states. Every process must call this.
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
    """Remove all but the newest `keep` states, and unfinished ones; if keep is 0, also `best`."""
    folder, states = Path(folder), saved_states(folder)
    old = states[:-keep] if keep else states
    for path in [*folder.glob('state-*.tmp'), *old, *([] if keep else [folder / 'best'])]:
        shutil.rmtree(path, ignore_errors=True)


def training_state(model, optimizer, objective=None):
    """
    (the tensors of a resumable state, the optimizer's param_groups). The tensors under `own` are
    the states of the random generators and, if the objective has a `state`, this process's part.
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
    Save the current state and its manifest under a temporary name, rename it, and remove all but
    the newest KEPT states. progress: a dict with 'step', which load_state returns. Raises UserError
    if it cannot be written; earlier states are then left as they are. Every process must call this.
    """
    rank, world_size = processes()
    target = Path(folder) / f'state-{progress["step"]:09d}'
    unfinished = Path(f'{target}.tmp')
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a crash
    barrier()  # no process may write before the old files are gone
    files, failure = {}, ''
    try:
        tensors, _ = training_state(model, optimizer, objective)
        dcp.save(tensors, storage_writer=Writer(unfinished, save_distributed=True))
        files = measure_files(sorted(unfinished.iterdir())[rank::world_size])  # its share
    except (Exception, CheckpointException) as error:
        if len(SIGNALS) > 1:  # a second Ctrl-C, which torch may have wrapped in its own error
            raise KeyboardInterrupt from None
        failure = root_cause(error)
    shares = gather((files, failure))
    if failure := max(failure for _, failure in shares):  # '' if all went well
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f'{target} could not be saved ({failure}); what was saved before is kept: when there '
            'is room, the same command continues'
        )
    if rank == 0:
        files = {name: entry for files, _ in shares for name, entry in files.items()}
        write_manifest(unfinished, files, owner_of(folder), progress=progress)
        shutil.rmtree(target, ignore_errors=True)  # exists if this step was saved before
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
    Restore the newest state in a folder into model, optimizer, objective and random generators;
    returns the progress it was saved with. Raises UserError if there is none or if it is damaged,
    naming the last intact one. Every process must call this.
    """
    states = saved_states(folder)
    if not states:
        raise UserError(f'{folder} has no saved state')
    newest, owner = states[-1], owner_of(folder)
    if damage := find_damage_together(newest, owner):
        intact = [path.name for path in states[:-1] if not find_damage(path, owner)]
        good = f'{intact[-1]}, which is intact' if intact else 'the beginning of the stage'
        raise UserError(f'{damage}. Remove {newest}, and the same command continues from {good}')
    state, settings = training_state(model, optimizer)  # tensors for read_state to overwrite
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
    Load a saved state into the tensors of `state`, nested dicts. Returns the saved entry `own`
    instead of filling it, as its names and shapes are known only from the file. Raises UserError if
    it cannot be read.
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
