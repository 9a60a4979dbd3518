"""
Prepare corpora one after the other in one process, as data/prepare.py does: NAME OUT [NAME OUT
...], then knobs. A connection that breaks is given up at once, not after minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import datasets  # noqa: E402

from data.prepare import main  # noqa: E402
from engine.errors import UserError  # noqa: E402

datasets.config.STREAMING_READ_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.01

if __name__ == '__main__':
    names = [word for word in sys.argv[1:] if not word.startswith('--')]
    more = [word for word in sys.argv[1:] if word.startswith('--')]
    for name, out in zip(names[::2], names[1::2]):
        try:
            main([name, f'--out={out}', '--tokenizer=bytes', '--val_fraction=0.3', *more])
        except UserError as error:
            sys.exit(f'error: {error}')
