"""
Atomic writes, locks and manifests. A manifest, `checksums.json`, records the SHA-256 of the files
in a folder and the run they belong to, so that a truncated, modified or swapped file is detected
before it is used.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from engine.errors import UserError

# ----------------------------------------------------------------------------------------------
# atomic writes


def commit_file(temporary, path):
    """
    Flush a finished file to disk, then rename it to `path`: even a power cut leaves either the old
    file or the new one. Permissions follow the umask; safetensors would let only the owner read it.
    """
    umask = os.umask(0)  # the umask can only be read by setting it
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    with open(temporary, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path, text):
    """
    Write a text file atomically: readers see the old content or the new, never a part of it. A path
    that is not a regular file (/dev/null, a pipe) is written to directly. Raises UserError for text
    that UTF-8 cannot encode.
    """
    path, temporary = Path(path), Path(f'{path}.tmp')
    try:
        content = text.encode('utf-8')
    except UnicodeEncodeError as error:
        raise UserError(f'{path} cannot hold text that is not Unicode: {error}') from None
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary.write_bytes(content)
    commit_file(temporary, path)


def write_json(path, content):
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(content, indent=1) + '\n')


def read_json(path, **types):
    """
    The object in a JSON file, as a dict. `types` gives required keys and their types. Raises
    UserError for a damaged file, FileNotFoundError for a missing one.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise TypeError('not an object')
        for key, kind in types.items():
            # a bool is an instance of int, but no number in these files
            if not isinstance(content[key], kind) or isinstance(content[key], bool):
                raise TypeError(f'{key} is {content[key]!r}')
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f'{type(error).__name__}: {str(error)[:80]}'
        raise UserError(f'{path} is damaged ({reason})') from None
    return content


@contextlib.contextmanager
def locked(folder, wait=False):
    """
    Hold a lock on FOLDER.lock, so that only one process writes to a folder. The operating system
    releases it however the process ends. If another process has the lock, wait for it (wait=True)
    or raise UserError.
    """
    path = Path(f'{os.path.realpath(folder)}.lock')  # Path.resolve() can raise on a circular link
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f'{folder} is being written by another process') from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: later it may be another process's lock
        lock.release()


@contextlib.contextmanager
def new_folder(target):
    """
    Yield a temporary folder next to `target`, which is renamed to `target` when the block succeeds
    and removed when it fails. Raises UserError if `target` exists or another process is writing it.
    """
    target, unfinished = Path(target), Path(f'{target}.partial')
    if target.exists():
        raise UserError(f'{target} exists: choose another folder, or remove it')
    with locked(target):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            os.replace(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


# ----------------------------------------------------------------------------------------------
# manifests


def checksum(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def measure_files(paths):
    """{name: SHA-256} of files, flushed to the disk first."""
    entries = {}
    for path in map(Path, paths):
        with open(path, 'rb') as file:
            os.fsync(file.fileno())
        entries[path.name] = checksum(path)
    return entries


def digest(content):
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, files, owner, **more):
    """
    Write checksums.json. files: entries as measure_files returns them; owner: a hash that
    identifies the run; `more` is stored beside them.
    """
    content = dict(owner=owner, files=files, **more)
    write_json(Path(folder) / 'checksums.json', content | dict(checksum=digest(content)))


def read_manifest(folder):
    """The content of checksums.json. Raises UserError if it is missing or damaged."""
    path = Path(folder) / 'checksums.json'
    try:
        content = read_json(path, owner=str, files=dict, checksum=str)
    except FileNotFoundError:
        raise UserError(f'{path} is missing') from None
    expected = content.pop('checksum')
    if expected != digest(content):
        raise UserError(f'{path} is damaged')
    return content


def damage_of(path, expected):
    """A sentence that says what is wrong with a file that should have this SHA-256, or ''."""
    if not path.is_file():
        return f'{path} is missing'
    if checksum(path) != expected:
        return f'{path} is damaged: it does not match the checksum that was recorded for it'
    return ''


def find_damage(folder, owner=None, rank=0, world_size=1):
    """
    The first problem with the files in a folder's manifest, as a sentence that starts with the path
    of the file, or ''. owner: the hash of the run they must belong to; None accepts any. rank,
    world_size: check only every world_size-th file, from `rank` on.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    if owner is not None and manifest['owner'] != owner:
        return f'{folder} belongs to another run'
    for name, expected in sorted(manifest['files'].items())[rank::world_size]:
        if damage := damage_of(Path(folder) / name, expected):
            return damage
    return ''
