"""
Files that tell when they are damaged: checksums.json in a folder says how long its files are and what their SHA-256 is, and whose
they are. A file that was truncated, emptied, changed by a bit or exchanged for another run's is found before it is used.
"""
import hashlib
import json
import os
from pathlib import Path

from configurator import UserError, read_json, write_atomically


def checksum(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def measure(paths):
    """{name: [bytes, SHA-256]} of files, written through to the disk first."""
    paths = list(paths)
    for path in paths:
        with open(path, 'rb') as file:
            os.fsync(file.fileno())
    return {Path(path).name: [Path(path).stat().st_size, checksum(path)] for path in paths}


def seal(folder, files, owner, texts=None, **more):
    """
    Write checksums.json of `files`, as `measure` gives them; owner: a text that another run's files do not have; texts: {name:
    content} of files that are written after it.
    """
    texts = {name: text.encode('utf-8') for name, text in (texts or {}).items()}
    files = files | {name: [len(text), hashlib.sha256(text).hexdigest()] for name, text in texts.items()}
    content = dict(owner=owner, files=files, **more)
    content['checksum'] = _digest(content)
    write_atomically(Path(folder) / 'checksums.json', json.dumps(content, indent=1) + '\n')


def _digest(content):
    return hashlib.sha256(json.dumps({k: v for k, v in content.items() if k != 'checksum'}, sort_keys=True).encode()).hexdigest()


def read_seal(folder):
    """The content of checksums.json. Raises UserError that says why it cannot be read."""
    path = Path(folder) / 'checksums.json'
    try:
        found = read_json(path, owner=str, files=dict)
    except OSError:
        raise UserError(f'{path} is missing') from None
    if found.get('checksum') != _digest(found) or any([*map(type, entry)] != [int, str] for entry in found['files'].values()):
        raise UserError(f'{path} is damaged')
    return found


def find_damage(folder, owner, rank=0, world_size=1):
    """
    What is wrong with the sealed files of a folder, in words that begin with the file's name, or ''. owner: None if anyone's will
    do. Of several processes each looks at its share of the files.
    """
    try:
        found = read_seal(folder)
    except UserError as error:
        return str(error)
    if owner is not None and found['owner'] != owner:
        return f'{folder} belongs to another run'
    for name, (size, digest) in sorted(found['files'].items())[rank::world_size]:
        path = Path(folder) / name
        if not path.is_file():
            return f'{path} is missing'
        if path.stat().st_size != size:
            return f'{path} is damaged: it has {path.stat().st_size:,} bytes instead of {size:,}'
        if checksum(path) != digest:
            return f'{path} is damaged: its checksum is not the one that was written down'
    return ''


