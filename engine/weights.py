"""The files with the weights of a model folder: safetensors, one or several with an index."""

import contextlib
import errno
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from engine.errors import UserError, first_line
from engine.files import commit_file, find_damage, read_json

SHARD_BYTES = 5 * 10**9  # weights in one file, as on the hub
HEADS = re.compile(r'(^|\.)(lm_head|embed_out|wte|embed_in|embed_tokens)\.weight$')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_files(folder):
    """
    The files with a model's weights: safetensors, or pickles where there is nothing else. Raises
    UserError where they are missing, some of those that the index names, or changed since they
    were written.
    """
    folder = Path(folder)
    if (folder / 'checksums.json').is_file() and (damage := find_damage(folder)):
        raise UserError(damage)
    for name in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{name}.index.json'
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            listed = read_json(index, weight_map=dict)['weight_map'].values()
            files = [folder / Path(str(file)).name for file in sorted(set(map(str, listed)))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(
                    f'{folder} is incomplete: {len(missing)} of its {len(files)} files of weights '
                    f'are missing ({missing[0]})'
                )
            return files
    raise UserError(f'{folder} has no weights (model.safetensors)')


def load_pickle(file, device='cpu'):
    """
    {name: tensor} of a pickle, as older repositories of the hub have: read by torch's reader that
    knows tensors and nothing else, so that no code of the file runs. Raises UserError.
    """
    mapped = zipfile.is_zipfile(file)  # older ones cannot be read lazily
    try:
        found = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # damage and refused content raise all kinds
        raise UserError(f'{file} cannot be read: {first_line(error)}') from None
    if not isinstance(found, dict) or not all(torch.is_tensor(v) for v in found.values()):
        raise UserError(f'{file} holds other things than tensors by name')
    return found


def read_tensors(folder, device='cpu'):
    """{name: tensor} of all weights of a model folder. Raises UserError."""
    tensors = {}
    for file in weight_files(folder):
        if file.suffix == '.bin':
            tensors |= load_pickle(file, device)
            continue
        try:
            tensors |= load_file(file, device=str(device))
        except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
            raise UserError(f'{file} is damaged: {first_line(error)}') from error
    return tensors


def has_other_head(folder):
    """Whether the files of a folder hold a head that is not the token embedding."""
    found, folder = {}, Path(folder)
    for file in [*folder.glob('model*.safetensors')] or [*folder.glob('pytorch_model*.bin')]:
        with contextlib.suppress(SafetensorError):  # damage, which read_tensors names
            tensors = load_pickle(file) if file.suffix == '.bin' else safe_open(file, 'pt')
            for name in filter(HEADS.search, tensors.keys()):
                tensor = tensors[name] if file.suffix == '.bin' else tensors.get_tensor(name)
                found[name] = tensor.bfloat16()  # of one matrix, one may be rounded
    return len(found) == 2 and not torch.equal(*found.values())


def check_finite(name, tensor):
    """Raise UserError for numbers that are not finite, or no weights: quantised, say."""
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix('torch.')
        raise UserError(f'{name} is {kind}, not one of float64, float32, bfloat16 and float16')
    if tensor.sum().isfinite():  # only if all terms are; fifteen times faster than to ask each
        return
    if not tensor.isfinite().all():  # or the sum alone is too large
        raise UserError(f'{name} has values that are not finite in {tensor.dtype}')


def write_tensors(folder, tensors):
    """
    Write {name: tensor} as the weights of a model folder, in place of those it had: several files
    with an index where one would have more than SHARD_BYTES.
    """
    from huggingface_hub import save_torch_state_dict  # a second, which not every command needs

    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, tensor in tensors.items():
            check_finite(name, tensor)  # float16 has a small range
        # a view of a larger storage, as FSDP gathers them, is refused: give it its own
        own = {
            name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in tensors.items()
        }
        try:
            save_torch_state_dict(own, unfinished, max_shard_size=SHARD_BYTES)
        except SafetensorError as error:  # mostly a full disk
            raise OSError(errno.EIO, str(error), str(folder)) from error
        written = sorted(Path(unfinished).iterdir())  # the index last
        for path in written:
            commit_file(path, folder / path.name)
    for path in folder.glob('model*.safetensors*'):  # of an earlier model
        if path.name not in {new.name for new in written}:
            path.unlink()
