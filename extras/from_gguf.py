"""
Convert a GGUF file, the format of llama.cpp, to a model folder with its tokenizer and chat
template. Quantised weights are dequantised to float32 or bfloat16.

    python -m extras.from_gguf SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2-135m

transformers reads the file, which needs the packages gguf and accelerate; all three are in
requirements-extras.txt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import configure
from engine.errors import UserError, first_line, import_extra, run_as_program
from engine.files import new_folder, read_json, write_json
from engine.hugging_face import config_from_hugging_face, tensors_from_hugging_face
from model import GPT, GPTConfig


@dataclass
class Conversion:
    """Turn a GGUF file into a model folder: from_gguf.py FILE FOLDER."""

    source: str = ''  # the .gguf file
    target: str = ''  # the folder to make
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the weights


def convert(source, target, dtype='float32'):
    """
    Convert the GGUF file `source` to the model folder `target`, which is built under another name
    and renamed when complete. dtype: of the weights. Raises UserError if a package is missing, or
    if the file is not a model that load() reads.
    """
    gguf = import_extra('gguf', 'GGUF files need the package gguf')
    transformers = import_extra('transformers', 'GGUF files need the package transformers')
    transformers.logging.set_verbosity_error()
    file = dict(pretrained_model_name_or_path=Path(source).parent, gguf_file=Path(source).name)
    with new_folder(target) as unfinished:
        try:
            if any('rope_freqs' in tensor.name for tensor in gguf.GGUFReader(source).tensors):
                raise ValueError('transformers does not read the RoPE scaling of Llama 3 in it')
            found = transformers.AutoModelForCausalLM.from_pretrained(**file, dtype=dtype)
            config = GPTConfig(**config_from_hugging_face(found.config.to_dict()))
            config.norm_eps = float(f'{config.norm_eps:.6g}')  # 1e-5 in float32 is 9.99e-6
            template = GPT.on_meta(config).state_dict()
            state = tensors_from_hugging_face(config, found.state_dict(), template)
            transformers.AutoTokenizer.from_pretrained(**file).save_pretrained(unfinished)
            tidy_tokenizer(unfinished, config.vocab_size)
            GPT.from_state(config, state).save(unfinished, unfinished)
        except Exception as error:  # the reader fails in as many ways as there are damaged files
            raise UserError(f'{source} cannot be converted: {first_line(error)}') from error


def tidy_tokenizer(folder, vocab_size):
    """
    Remove the tokens that transformers' converter adds beyond the model's vocabulary, and name a
    tokenizer class that transformers 4 has, too.
    """
    path, settings = folder / 'tokenizer.json', folder / 'tokenizer_config.json'
    content = read_json(path)
    known = [token for token in content['added_tokens'] if token['id'] < vocab_size]
    write_json(path, content | dict(added_tokens=known))
    write_json(settings, read_json(settings) | dict(tokenizer_class='PreTrainedTokenizerFast'))


def main(argv):
    """Command line: FILE FOLDER, then knobs."""
    words, program = ('source', 'target'), 'python -m extras.from_gguf FILE FOLDER'
    options, _, _ = configure(argv, Conversion, program=program, words=words)
    if not options.target:
        raise UserError('missing arguments; usage: from_gguf.py FILE FOLDER')
    convert(options.source, options.target, options.dtype)
    print(f'{options.target}: a model folder, for --init_from, expand.py, sample.py and the others')


if __name__ == '__main__':
    run_as_program(main)
