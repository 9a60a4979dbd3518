"""
A GGUF file, as llama.cpp and its kin read it, turned into a model folder with its tokenizer and
chat template; quantised weights become what they stand for, in float32 or bfloat16.

    python extras/from_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2

transformers' own reader does the work, with the package gguf: both are in requirements-extras.txt.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == '__main__':  # run as a file, Python looks beside it, not in the project's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import torch

from configurator import configure
from engine.errors import UserError, first_line, import_extra, run_as_program
from engine.files import new_folder, read_json, write_json
from engine.hugging_face import config_from_hugging_face, tensors_from_hugging_face
from model import GPT, GPTConfig, rotations


@dataclass
class Conversion:
    """Turn a GGUF file into a model folder: from_gguf.py FILE FOLDER."""

    source: str = ''  # the .gguf file
    target: str = ''  # folder to be made
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the weights


def convert(source, target, dtype=torch.float32):
    """
    Make the model folder `target` from the GGUF file `source`; it is built beside it and renamed
    when it is complete. Raises UserError for what is not a model that load() reads.
    """
    source = Path(source)
    if not source.is_file():
        raise UserError(f'no file {source}')
    transformers = import_extra('transformers', 'GGUF files need the package transformers')
    for package in ('gguf', 'accelerate'):
        import_extra(package, f'GGUF files need the package {package}')
    transformers.logging.set_verbosity_error()
    file = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    with new_folder(target) as unfinished:
        convert_into(unfinished, transformers, file, dtype)


def convert_into(folder, transformers, file, dtype):
    """Write what transformers' reader finds in a GGUF file into a folder. Raises UserError."""
    source = Path(file['pretrained_model_name_or_path'], file['gguf_file'])
    try:
        described = transformers.AutoConfig.from_pretrained(**file).to_dict()
        for name, value in described.items():
            if isinstance(value, float):  # a float32 in the file: 1e-05, not 9.99999975e-06
                described[name] = float(f'{value:.7g}')
        config = GPTConfig(**config_from_hugging_face(described))
        found = transformers.AutoModelForCausalLM.from_pretrained(**file, dtype=dtype)
        template = GPT.on_meta(config).state_dict()
        state = tensors_from_hugging_face(config, found.state_dict(), template)
        config = with_rope_scaling(config, source)
        transformers.AutoTokenizer.from_pretrained(**file).save_pretrained(folder)
        tidy_tokenizer(folder, config.vocab_size)
        GPT.from_state(config, state).save(folder, folder)
    except Exception as error:  # its reader fails in as many ways as there are damaged files
        raise UserError(f'{source} cannot be converted: {first_line(error)}') from error


def with_rope_scaling(config, source):
    """
    The GPTConfig with the rope_scaling of Llama 3.1 and later, which a GGUF file holds as a tensor
    of divisors of RoPE's frequencies. Raises UserError for divisors that no such scaling gives.
    """
    import gguf

    found = [t.data for t in gguf.GGUFReader(source).tensors if t.name == 'rope_freqs.weight']
    if not found:
        return config
    divisors, one = torch.tensor(found[0]), torch.ones(1)
    scaled = replace(config, rope_scaling=(divisors.max().item(), 1.0, 4.0, 8192.0))
    plain, ours = (torch.atan2(*reversed(rotations(c, one)))[0] for c in (config, scaled))
    if not torch.allclose(ours, plain / divisors, rtol=1e-3):
        raise UserError('its rope_freqs.weight is no RoPE scaling of Llama 3')
    return scaled


def tidy_tokenizer(folder, vocab_size):
    """
    Leave out tokens that transformers' converter adds beyond a model's vocabulary, and name the
    class of the tokenizer as transformers 4 knows it, too.
    """
    path, settings = folder / 'tokenizer.json', folder / 'tokenizer_config.json'
    content = read_json(path)
    known = [token for token in content['added_tokens'] if token['id'] < vocab_size]
    write_json(path, content | dict(added_tokens=known))
    write_json(settings, read_json(settings) | dict(tokenizer_class='PreTrainedTokenizerFast'))


def main(argv):
    """Command line: FILE FOLDER, then knobs."""
    words = ('source', 'target')
    options, _, _ = configure(
        argv, Conversion, program='extras/from_gguf.py FILE FOLDER', words=words
    )
    if not (options.source and options.target):
        raise UserError('missing arguments; usage: from_gguf.py FILE FOLDER')
    convert(options.source, options.target, getattr(torch, options.dtype))
    print(f'{options.target}: a model folder, for --init_from, expand.py, sample.py and the others')


if __name__ == '__main__':
    run_as_program(main)
