"""
What a run's folder holds: resumable states, what each stage is, and what explains the numbers.

    out_dir/run.json                  knobs; for every session command, commit, versions, device
    out_dir/STAGE/stage.json          what the stage is; another stage is refused this folder
    out_dir/STAGE/metrics.jsonl       one line every few steps
    out_dir/STAGE/state-000001000/    weights, optimizer, random states; removed at the end
    out_dir/STAGE/stable-000000900/   the same at the end of a stable phase (wsd), kept
    out_dir/STAGE/config.json, model.safetensors, result.json, checksums.json     the result
    out_dir/STAGE/optimizer.safetensors      its AdamW state, where a later stage needs it
"""

import json
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch

from engine.device import processes
from engine.errors import UserError
from engine.files import digest, read_json, write_json

# ----------------------------------------------------------------------------------------------
# the states in it


def saved_states(folder):
    """The complete states in a stage's folder, the newest last."""
    found = Path(folder).glob('*-*')
    states = [path for path in found if re.fullmatch(r'(state|stable)-\d{9,}', path.name)]
    return sorted(states, key=lambda path: (step_of(path), path.name))


def step_of(path):
    """The step of a saved state or rollout, from its file name: state-000001000."""
    return int(path.name.split('-')[1].partition('.')[0])


def remove_states(folder):
    """Remove what only resuming needed; states at the end of stable phases are kept."""
    folder = Path(folder)
    for path in [*folder.glob('state-*'), *folder.glob('stable-*.tmp'), folder / 'best']:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob('rollout-*'):
        path.unlink()


# ----------------------------------------------------------------------------------------------
# what a stage is

# knobs that may change when a stage continues: where and how fast it is trained, not what
MACHINE_KNOBS = {
    'out_dir',
    'data_dir',
    'eval_interval',
    'micro_batch_size',
    'device',
    'dtype',
    'compile',
    'log_interval',
    'save_minutes',
    'max_minutes',
    'anyway',
    'tensorboard',
    'wandb',
    'dry_run',
    'gpu_tflops',
    'keep_states',
    'keep_every',
    'accept_changes',
    'parallel',
    'recompute',
}
# the meaning of the steps already done depends on these: they can never change
FIXED = re.compile(
    r'origin|teaching|continues_optimizer|parent.*|position|params|toy|block_size|batch_size|'
    r'batch_tokens|model\..*'
)


def stage_identity(stage, knobs, texts):
    """What a stage is, as the content of stage.json. texts: {corpus: checksum}."""
    identity = dict(
        origin=asdict(stage.origin),
        teaching=stage.teaching,
        continues_optimizer=stage.optimizer_state is not None,
        parent=None,
        tokens=stage.tokens,
        params=stage.params,
        position=stage.position,
    )
    if stage.parent:
        identity |= {
            'parent': stage.parent.name,
            'parent.position': stage.parent.position,
            'parent.val_loss': stage.parent.val_loss,
        }
    identity |= {k: v for k, v in asdict(knobs).items() if k not in MACHINE_KNOBS}
    identity |= {f'model.{k}': v for k, v in asdict(stage.config).items()}
    identity |= {f'text of {name}': checksum for name, checksum in texts.items()}
    return json.loads(json.dumps(identity))  # as it will be read back


def read_identity(folder):
    """The content of stage.json, or None if there is none. Raises UserError for a damaged one."""
    path = Path(folder) / 'stage.json'
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f'{error}; delete {folder} to train this stage again') from None


def owner_of(folder):
    """What a stage's manifests belong to: a hash of what the stage was when it began."""
    return (read_identity(folder) or {}).get('owner', '')


def claim_folder(folder, identity, accept_changes):
    """
    Write stage.json if the folder is new. Returns {key: (before, now)} of accepted changes.
    Raises UserError, listing the differences, if the folder holds another stage: with
    accept_changes only for those that would invalidate the steps already done.
    """
    found = read_identity(folder)
    if found is None:
        if processes()[0] == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_json(Path(folder) / 'stage.json', identity | dict(owner=digest(identity)))
        return {}
    # a knob that is newer than the run has its default
    common = [key for key in identity if key in found]
    # compared as they are stored: the loss of a model from elsewhere, NaN, equals itself there
    keys = [key for key in common if json.dumps(found[key]) != json.dumps(identity[key])]
    changes = {key: (found[key], identity[key]) for key in keys}
    fixed = [key for key in changes if FIXED.fullmatch(key)]
    if fixed or changes and not accept_changes:
        way_out = '' if fixed else '; --accept_changes=True continues with the new ones'
        raise UserError(
            f'{folder} holds a stage with other settings ({describe_changes(changes)}): choose '
            f'another --out_dir, or delete that folder{way_out}'
        )
    return changes


def update_identity(folder, identity):
    """Record the accepted changes of a stage that continues; its owner stays."""
    if processes()[0] == 0:
        write_json(Path(folder) / 'stage.json', read_identity(folder) | identity)


def describe_changes(changes):
    """'learning_rate was 0.01, now 0.5; ...' for the first four changes."""
    shown = [f'{key} was {old!r}, now {new!r}' for key, (old, new) in changes.items()]
    return '; '.join(shown[:4])


# ----------------------------------------------------------------------------------------------
# what a run was


def record_session(out_dir, knobs, session):
    """Add a session to run.json, with the commit and versions that explain its numbers."""
    path = Path(out_dir) / 'run.json'
    git = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        how = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = subprocess.run(git, **how).stdout.strip()
    except OSError:  # there is no git
        commit = ''
    session = session | dict(
        started=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        commit=commit,
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    try:
        sessions = read_json(path, sessions=list)['sessions']
    except (OSError, UserError):
        sessions = []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(knobs=knobs, sessions=[*sessions, session]))
