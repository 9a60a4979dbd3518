"""The Hugging Face hub: models by name, and errors within seconds where it cannot be reached."""

import functools
import multiprocessing
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path

from engine.errors import UserError

# loading scripts, which `datasets` no longer runs: the hub's conversion to parquet is read instead
SCRIPTS = ('Skylion007/openwebtext', 'csebuetnlp/xlsum')
WAY_OUT = (  # the default advice at the end of an error message
    'offline, use pydocs or pycode, or files of your own: python data/prepare.py "texts/*.txt"'
)


def within(seconds, function, what, way_out=WAY_OUT):
    """
    Return function(). Raises UserError if it fails or takes longer than `seconds`; the message
    consists of `what`, which went wrong, and `way_out`, what the user can do.
    """
    try:
        with ThreadPool(1) as pool:  # a thread, so that a hanging call cannot block the program
            return pool.apply_async(function).get(seconds)
    except multiprocessing.TimeoutError:
        raise UserError(f'{what} (no answer within {seconds} s); {way_out}') from None
    except Exception as error:  # whatever it raises
        raise UserError(f'{what} ({type(error).__name__}); {way_out}') from None


def reach_hub(what, way_out=WAY_OUT):
    """
    Raise UserError within seconds if the hub does not answer; its own client would retry for
    minutes if packets are dropped. what: what the hub is needed for. In offline mode
    (HF_HUB_OFFLINE) there is no request: the client then reads its cache only.
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
    if '.' in split:  # file names instead of a split
        return dict(path=repository, data_files=split, split='train')
    if repository == 'bigcode/starcoderdata':  # its configurations are folders
        return dict(path=repository, data_dir=configuration, split=split)
    return dict(path=repository, name=configuration, split=split)


@functools.cache
def model_folder(name):
    """
    The local folder of a model. A path, or a name that cannot be a hub model, is returned as it is;
    a hub model, OWNER/NAME (or NAME: gpt2), is downloaded once. Pickled weights are downloaded only
    if there are no safetensors. Raises UserError.
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
    except Exception as error:  # from the hub's client, the system or the HTTP library
        reason = type(error).__name__
        raise UserError(
            f'{name} is not a folder, and the hub does not provide it ({reason}); {way_out}'
        ) from error
