"""expand.py, and at the end the peak of its own memory in bytes, without that of mapped files.

python tests/programs/watch_memory.py [arguments of expand.py]
"""

import re
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import safetensors.torch  # noqa: E402, F401
import torch  # noqa: E402

from expand import main  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def anonymous_memory():
    """Bytes of this process that no file backs, as Linux counts them."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'RssAnon:\s+(\d+)', status)[1]) * 1024


peaks, done = [0], threading.Event()


def watch():
    """Remember the highest value until the work is done."""
    while not done.is_set():
        peaks.append(max(peaks.pop(), anonymous_memory()))


# what the library itself loads and allocates at first use
torch.zeros(10, 10) @ torch.zeros(10, 10)
GPT.on_meta(GPTConfig.named('16x1'))
before = anonymous_memory()
watcher = threading.Thread(target=watch)
watcher.start()
main(sys.argv[1:])
done.set()
watcher.join()
print('PEAK', peaks[0] - before)
