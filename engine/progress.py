"""The progress bar of a loop: gone when it is done, and none where there is no terminal."""

from functools import partial

from tqdm import tqdm

progress_bar = partial(tqdm, leave=False, disable=None)
