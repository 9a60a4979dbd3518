"""
What a stage's folder holds: stage.json says what the stage is, state-000001000/ is a resumable
state, result.json is written last. A state is complete under its name or absent, has a manifest
with checksums, and is saved and loaded by all processes together.
"""

import json
import os
import pickle
import re
import shutil
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
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
    'log_interval save_minutes max_minutes keep_every wandb verify dry_run '
    'seeds'.split()
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
        write_json(Path(folder) / 'stage.json', identity)
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


def record_session(run, hardware, argv, knobs, origins):
    """Add a session to run.json, with the machine and versions behind its numbers."""
    path = Path(run.out_dir) / 'run.json'
    session = dict(
        command=['train.py', *argv],
        set_by=origins,
        device=hardware.name,
        torch=torch.__version__,
        started=time.strftime('%Y-%m-%d %H:%M:%S %z'),
    )
    try:
        sessions = read_json(path, sessions=list)['sessions']
    except (OSError, UserError):
        sessions = []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(knobs=knobs, sessions=[*sessions, session]))


# ----------------------------------------------------------------------------------------------
# saving and loading states


def saved_states(folder):
    """The states in a stage's folder, the newest last."""
    return sorted(p for p in Path(folder).glob('state-*') if p.suffix != '.tmp')


def remove_states(folder, keep):
    """Remove all but the newest `keep` states, and what a crash left of one."""
    folder, states = Path(folder), saved_states(folder)
    old = states[: max(0, len(states) - keep)]
    for path in [*folder.glob('state-*.tmp'), *old, *([] if keep else [folder / 'best'])]:
        shutil.rmtree(path, ignore_errors=True)


def training_state(model, optimizer, objective=None):
    """
    (the tensors of a resumable state, the optimizer's settings). Of an objective with a state of
    its own each process has a part.
    """
    weights, optimizer_state = get_state_dict(model, optimizer)
    random = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_available():
        random['cuda'] = torch.cuda.get_rng_state()
    tensors = dict(model=weights, optimizer=optimizer_state['state'], random=random)
    own = getattr(objective, 'state', None)
    if own:
        tensors['objective'] = {f'{processes()[0]}.{k}': v for k, v in own.state_dict().items()}
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
        dcp.save(training_state(model, optimizer, objective)[0], checkpoint_id=unfinished)
        files = measure_files(sorted(unfinished.iterdir())[rank::world_size])
    except (Exception, CheckpointException) as error:
        if len(SIGNALS) > 1:  # a second Ctrl-C, whatever torch made of it
            raise KeyboardInterrupt from None
        failure = root_cause(error)
    shares = gather((files, failure))
    failure = max(failure for _, failure in shares)
    if rank == 0 and not failure:
        files = {name: entry for files, _ in shares for name, entry in files.items()}
        try:
            write_manifest(unfinished, files, owner_of(folder), progress=progress)
            shutil.rmtree(target, ignore_errors=True)  # saved twice at one step
            os.replace(unfinished, target)
        except OSError as error:
            failure = root_cause(error)
    failure = gather(failure)[0]
    if failure:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f'{target} could not be saved ({failure}); what was saved before is kept: when there '
            'is room, the same command continues'
        )
    if rank == 0:
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
    state['objective'] = {}
    read_state(newest, state)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state['model'],
        optim_state_dict=dict(state=state['optimizer'], param_groups=settings),
    )
    if own := getattr(objective, 'state', None):
        mine = f'{processes()[0]}.'
        parts = {k.removeprefix(mine): v for k, v in state['objective'].items()}
        own.load_state_dict({k: v for k, v in parts.items() if '.' not in k})
    torch.set_rng_state(state['random']['cpu'].cpu())
    if 'cuda' in state['random']:
        torch.cuda.set_rng_state(state['random']['cuda'].cpu())
    return read_manifest(newest)['progress']


def read_state(path, state):
    """
    Fill `state`, nested dicts of tensors, from a saved one that is intact; a part that is empty
    gets all there is. Raises UserError for one that cannot be read.
    """
    try:
        saved = StateReader(path).read_metadata().state_dict_metadata
        for part in [name for name in state if not state[name]]:
            for key, found in saved.items():
                if key.startswith(f'{part}.'):
                    tensor = torch.empty(found.size, dtype=found.properties.dtype)
                    state[part][key.removeprefix(f'{part}.')] = tensor
        if 'random.cuda' not in saved:  # saved where there was no GPU
            state.get('random', {}).pop('cuda', None)
        dcp.load(state, storage_reader=StateReader(path))
    except (Exception, CheckpointException) as error:
        raise UserError(
            f'{path} is intact but cannot be read ({root_cause(error)}): was it saved by other '
            'versions of torch or of this code?'
        ) from error


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
