"""
Resumable states of training: weights, optimizer and random states, saved and loaded by all
processes together. A state is complete under its name or absent, and has a manifest with checksums.
"""

import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.device import SIGNALS, barrier, gather, processes
from engine.errors import UserError, first_line
from engine.files import find_damage, measure_files, read_manifest, write_manifest
from engine.run_folder import owner_of, read_identity, saved_states, step_of

warnings.filterwarnings('ignore', message='torch.distributed is disabled')  # one process


def training_state(model, optimizer):
    """(the tensors of a resumable state, the optimizer's settings)."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    random = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        random['cuda'] = torch.cuda.get_rng_state()
    tensors = dict(model=weights, optimizer=optimizer_state['state'], random=random)
    return tensors, optimizer_state['param_groups']


def save_state(folder, model, optimizer, progress, keep=1, stable=False):
    """
    Save the state of this moment under a temporary name, then its manifest, rename it, and remove
    all but the newest `keep`. progress: a dict with 'step'; stable: it is kept for good. Called by
    every process. Raises UserError if it cannot be written; earlier states are untouched then.
    """
    rank, world_size = processes()
    kind = 'stable' if stable else 'state'
    target = Path(folder) / f'{kind}-{progress["step"]:09d}'
    unfinished = Path(f'{target}.tmp')
    if rank == 0:
        for path in Path(folder).glob('sta*-*.tmp'):  # left by a crash
            shutil.rmtree(path, ignore_errors=True)
    barrier()  # nobody writes before that is done
    files, failure = {}, ''
    try:
        dcp.save(training_state(model, optimizer)[0], checkpoint_id=unfinished)
        files = measure_files(sorted(unfinished.iterdir())[rank::world_size])
    except (Exception, CheckpointException) as error:
        if len(SIGNALS) > 1:  # a second Ctrl-C, whatever torch made of it
            raise KeyboardInterrupt from None
        failure = root_cause(error)
    failures = [failure]
    for other_files, other_failure in gather((files, failure)):
        files |= other_files
        failures.append(other_failure)
    failure = max(failures)  # any of them, if there is one
    if rank == 0 and not failure:
        failure = commit_state(unfinished, target, files, progress)
    failure = gather(failure)[0]
    if failure:
        report_failed_save(target, failure)
    if rank == 0:
        shutil.rmtree(f'{target}.old.tmp', ignore_errors=True)
        resumable = [path for path in saved_states(folder) if path.name.startswith('state')]
        for path in resumable[:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    barrier()


def commit_state(unfinished, target, files, progress):
    """Write a state's manifest and give it its name; returns why that failed, or ''."""
    try:
        write_manifest(unfinished, files, owner_of(target.parent), progress=progress)
        if target.exists():  # saved twice at one step
            os.replace(target, f'{target}.old.tmp')
        os.replace(unfinished, target)
    except OSError as error:
        return root_cause(error)
    return ''


def report_failed_save(target, failure):
    """Raise the UserError for a state that could not be saved, on every process."""
    folder = target.parent
    shutil.rmtree(f'{target}.tmp', ignore_errors=True)
    free = shutil.disk_usage(folder).free / 1e9
    before = saved_states(folder)
    good = f'{before[-1]} is intact. ' if before else ''
    raise UserError(
        f'{target} could not be saved ({failure}; {free:.1f} GB free). {good}When there is room, '
        'the same command continues'
    )


def root_cause(error):
    """The innermost reason of a failed save or load, in a few words."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)[:120]


class StateReader(dcp.FileSystemReader):
    """dcp's reader; its index is a pickle, of which only an index's own classes are allowed."""

    def read_metadata(self, *args, **kwargs):
        """The index of the state."""
        with open(self.path / '.metadata', 'rb') as file:
            metadata = IndexUnpickler(file).load()
        metadata.storage_meta = getattr(metadata, 'storage_meta', None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class IndexUnpickler(pickle.Unpickler):
    """An unpickler that knows tensors and how they are stored, and nothing else."""

    allowed = re.compile(
        r'torch\.distributed\.checkpoint\.(filesystem\._StorageInfo|metadata\.(Metadata|'
        r'MetadataIndex|StorageMeta|TensorStorageMetadata|TensorProperties|ChunkStorageMetadata|'
        r'_MEM_FORMAT_ENCODING))|torch\.(Size|bool|[a-z]+\d+)|'
        r'torch\.serialization\._get_layout|pathlib\.(_local\.)?\w*Path'
    )

    def find_class(self, module, name):
        """The class of this name, if an index may contain it."""
        if self.allowed.fullmatch(f'{module}.{name}'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed in a state')


def find_damage_together(folder, owner):
    """find_damage, each process checking its share of the files; all get the same answer."""
    return max(gather(find_damage(folder, owner, *processes())))


def load_state(folder, model, optimizer):
    """
    Restore the newest state in the folder, if there is one: fills model, optimizer and random
    states, and returns the progress it was saved with, or None. Raises UserError naming what is
    damaged and the last intact state.
    """
    states = saved_states(folder)
    if not states:
        return None
    newest, owner = states[-1], owner_of(folder)
    damage = find_damage_together(newest, owner)
    if damage:
        intact = [path.name for path in states[:-1] if not find_damage(path, owner)]
        good = f'{intact[-1]}, which is intact' if intact else 'the beginning of the stage'
        raise UserError(f'{damage}. Remove {newest}, and the same command continues from {good}')
    try:
        state, settings = training_state(model, optimizer)
        saved = StateReader(newest).read_metadata().state_dict_metadata
        if 'random.cuda' not in saved:  # saved where there was no GPU
            state['random'].pop('cuda', None)
        dcp.load(state, storage_reader=StateReader(newest))
        progress = read_manifest(newest)['progress']
    except (Exception, CheckpointException) as error:
        raise UserError(
            f'{newest} is intact but cannot be read ({root_cause(error)}): was it saved by other '
            'versions of torch or of this code?'
        ) from error
    optimizer_state = dict(state=state['optimizer'], param_groups=settings)
    set_state_dict(
        model, optimizer, model_state_dict=state['model'], optim_state_dict=optimizer_state
    )
    torch.set_rng_state(state['random']['cpu'].cpu())
    if 'cuda' in state['random']:
        torch.cuda.set_rng_state(state['random']['cuda'].cpu())
    return progress


def newest_weights(folder):
    """
    (fields of model.GPTConfig, {name: tensor}, steps done) of a stage that is not finished, from
    its newest saved state. Raises UserError for a damaged one, or none.
    """
    states = saved_states(folder)
    if not states:
        raise UserError(f'{folder} is not finished and has no saved state yet (--save_minutes)')
    newest = states[-1]
    if damage := find_damage(newest, owner_of(folder)):
        raise UserError(damage)
    identity, weights = read_identity(folder), {}
    for key, found in StateReader(newest).read_metadata().state_dict_metadata.items():
        if key.startswith('model.'):
            tensor = torch.empty(found.size, dtype=found.properties.dtype)
            weights[key.removeprefix('model.')] = tensor
    dcp.load(dict(model=weights), storage_reader=StateReader(newest), no_dist=True)
    fields = {key.removeprefix('model.'): identity[key] for key in identity if key[:6] == 'model.'}
    fields['rope_scaling'] = tuple(fields.get('rope_scaling') or ())
    return fields, weights, step_of(newest)
