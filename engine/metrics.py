"""metrics.jsonl: what a stage logged, one JSON object every few steps."""

import contextlib
import json
from pathlib import Path

from engine.errors import UserError
from engine.files import write_atomically


def truncate_metrics(path, step):
    """Drop what metrics.jsonl logged after `step`: it is trained, and logged, again."""
    path = Path(path)
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)['step'] <= step and line.endswith('\n'):  # a crash may cut a line
                kept.append(line)
    write_atomically(path, ''.join(kept))


def append_metrics(path, line):
    """Add one line, a dict, to metrics.jsonl."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(line) + '\n')


def has_metrics(folder):
    """Whether a model was trained here."""
    return (Path(folder) / 'metrics.jsonl').is_file()


def read_metrics(folder):
    """The lines of a stage's metrics.jsonl, as dicts. Raises UserError for a damaged file."""
    path = Path(folder) / 'metrics.jsonl'
    try:
        lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        assert lines and all(isinstance(line['step'], int) for line in lines)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__})') from None
    return lines
