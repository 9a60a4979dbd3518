"""The Hugging Face hub: models by name, and errors within seconds where it cannot be reached."""

import functools
import multiprocessing
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path

from engine.errors import UserError

SCRIPTS = ('Skylion007/openwebtext', 'csebuetnlp/xlsum')  # datasets runs none: their parquet twins
WAY_OUT = (
    'offline, use pydocs or pycode, or files of your own: python data/prepare.py "texts/*.txt"'
)


def within(seconds, function, what, way_out=WAY_OUT):
    """function(); UserError, `what`, if it raises something or has not returned after `seconds`."""
    try:
        with ThreadPool(1) as pool:  # a call that hangs does not keep the program from ending
            return pool.apply_async(function).get(seconds)
    except multiprocessing.TimeoutError:
        raise UserError(f'{what} (no answer within {seconds} s); {way_out}') from None
    except Exception as error:  # whatever it raises
        raise UserError(f'{what} ({type(error).__name__}); {way_out}') from None


def reach_hub(what, way_out=WAY_OUT):
    """
    Raise UserError within seconds if the hub does not answer: its own client retries for minutes
    where packets are dropped. Offline mode (HF_HUB_OFFLINE) asks nothing: the cache decides.
    """
    import requests
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        ask = functools.partial(requests.head, constants.ENDPOINT, timeout=8)  # any answer will do
        within(10, ask, f'the Hugging Face hub, needed for {what}, cannot be reached', way_out)


def hub_source(repository, configuration, split):
    """The arguments of datasets.load_dataset for a split of a data set on the hub."""
    if repository in SCRIPTS:
        files = f'hf://datasets/{repository}@refs%2Fconvert%2Fparquet/{configuration}/*{split}/*'
        return dict(path='parquet', data_files=files, split='train')
    if '.' in split:  # the names of its files
        return dict(path=repository, data_files=split, split='train')
    if repository == 'bigcode/starcoderdata':  # its configurations are folders
        return dict(path=repository, data_dir=configuration, split=split)
    return dict(path=repository, name=configuration, split=split)


@functools.cache
def model_folder(name):
    """
    The folder of a model: `name` itself, or the download of the hub model OWNER/NAME, or NAME for
    the oldest (gpt2). Weights in pickles are fetched only where there are no others. UserError.
    """
    if Path(name).exists() or not re.fullmatch(r'([\w.-]+/)?\w[\w.-]*', str(name)):
        return Path(name)
    import huggingface_hub

    way_out = 'give the path of a folder that holds it'
    reach_hub(name, way_out)
    download = functools.partial(huggingface_hub.snapshot_download, str(name))
    files = ['*.json', '*.txt', '*.jinja', 'tokenizer.model']
    try:
        folder = Path(download(allow_patterns=[*files, 'model*.safetensors']))
        if not any(folder.glob('model*.safetensors')):
            folder = Path(download(allow_patterns=[*files, 'pytorch_model*.bin']))
        return folder
    except Exception as error:  # its own, the system's, or those of whichever HTTP client it uses
        reason = type(error).__name__
        raise UserError(
            f'{name} is not a folder, and the hub does not provide it ({reason}); {way_out}'
        ) from error
