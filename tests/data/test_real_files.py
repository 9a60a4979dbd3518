"""
Files as they are out there, and not only as this project writes them: tokenizers, heads, templates
and rows after the reports of people who use such models.
"""

import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_command, train_tokenizer
from safetensors.torch import load_file, save_file

from data.prepare import Preparation, prepare
from data.vocabulary import load_tokenizer
from engine.errors import UserError
from engine.loss import Distillation, fused_linear_cross_entropy
from expand import compare
from model import GPT, GPTConfig, load
from sample import Sampling, generate, speculate

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')
TEXT = 'The cat sat on the mat. ' * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def tokenizer_folder(folder, *specials, change=lambda tokenizer: None, **settings):
    """A folder with a byte-level tokenizer.json that has these control tokens."""
    train_tokenizer('byte-level', folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokenizer.add_special_tokens([*specials])
    change(tokenizer)
    tokenizer.save(str(folder / 'tokenizer.json'))
    settings = dict(tokenizer_class='PreTrainedTokenizerFast') | settings
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return str(folder)


def begins_with(token):
    def change(tokenizer):
        ids = [(token, tokenizer.token_to_id(token))]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            f'{token} $A', special_tokens=ids
        )

    return change


def write_lines(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)))
    return str(path)


def tokens_of(folder, split='train'):
    meta = json.loads((folder / 'meta.json').read_text())
    return np.fromfile(folder / f'{split}.bin', meta['dtype']).tolist()


# ----------------------------------------------------------------------------------------------
# weights


def their_model(kind):
    torch.manual_seed(0)
    small = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    if kind == 'GPT2':
        small = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    elif kind != 'OPT':
        small['intermediate_size'] = 40
    config = getattr(transformers, f'{kind}Config')(**small, tie_word_embeddings=False)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize('kind', ['Llama', 'GPT2', 'GPTNeoX'])
def test_a_head_in_the_file_counts_whatever_the_configuration_says(tmp_path, kind):
    model, x = their_model(kind), torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', tie_word_embeddings=True)
    assert (load(tmp_path)(x).logits - model(x).logits).abs().max() < 1e-4
    weights = load_file(tmp_path / 'model.safetensors')  # as older files have them
    masks = {'gpt_neox.layers.0.attention.bias': torch.ones(1, 1, 9, 9, dtype=torch.uint8)}
    save_file(weights | (masks if kind == 'GPTNeoX' else {}), tmp_path / 'model.safetensors')
    assert not load(tmp_path).config.tied
    if kind == 'Llama':
        head = dict(weights, **{'lm_head.weight': weights['model.embed_tokens.weight'].clone()})
        save_file(head, tmp_path / 'model.safetensors')
        assert load(tmp_path).config.tied  # the same matrix twice


def test_a_final_norm_that_was_removed_is_not_made_up(tmp_path):
    their_model('OPT').save_pretrained(tmp_path)
    edit(tmp_path / 'config.json', _remove_final_layer_norm=True, tie_word_embeddings=False)
    with pytest.raises(UserError, match='_remove_final_layer_norm=True cannot be read'):
        load(tmp_path)


@pytest.mark.parametrize('umask', [0o022, 0o027])
def test_files_may_be_read_by_those_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    GPT(GPTConfig.named('16x1', vocab_size=257)).save(tmp_path / 'm', 'bytes')
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'm').iterdir()} == {0o666 & ~umask}


def padded(vocab_size, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig.named('16x1', vocab_size=vocab_size, block_size=48)).double().eval()


@pytest.mark.parametrize('sizes', [(64, 72), (72, 64)])
def test_one_tokenizer_with_heads_padded_to_different_sizes(sizes):
    """Drafting, KL and distillation compare the rows that both have."""
    one, other = (padded(size, size) for size in sizes)
    x = torch.randint(64, (2, 12))
    greedy = Sampling(temperature=0)
    (alone,) = generate(one, x[:1], 20, greedy)
    assert torch.equal(speculate(one, other, x[:1], 20, 4, greedy)[0], alone)
    p, q = (model(x).logits[..., :64].log_softmax(-1) for model in (one, other))
    kl, _ = compare(one, other, x)
    assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    hidden = torch.randn(8, 16, dtype=torch.float64)
    heads = [model.head_weight.detach() for model in (one, other)]
    teacher = Distillation(hidden, heads[1], alpha=0.0)
    loss, *_ = fused_linear_cross_entropy(hidden, heads[0], torch.zeros(8, dtype=int), teacher)
    ours, theirs = ((hidden @ head[:64].T).log_softmax(-1) for head in heads)
    assert loss.item() == pytest.approx(F.kl_div(ours, theirs, log_target=True).item() * 64)


# ----------------------------------------------------------------------------------------------
# tokenizers


def test_truncation_and_padding_of_a_file_are_not_obeyed(tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(16)
        tokenizer.enable_padding(length=1000)

    name = tokenizer_folder(tmp_path / 't', change=change)
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(list(tokenizer.encode(TEXT))) == TEXT
    assert [len(ids) for ids in tokenizer.encode_batch([TEXT, 'a'])][1] == 1


@pytest.mark.parametrize('text', ['it ends with <|endoftext|> here', '<|im_end|>'])
def test_control_tokens_that_a_text_mentions_are_characters(tmp_path, text):
    name = tokenizer_folder(tmp_path / 't', '<|im_end|>')
    for tokenizer in (load_tokenizer(name), load_tokenizer('bytes')):
        assert not {0, 256} & {*tokenizer.encode(text)} - {text.encode()[0]}
        assert tokenizer.decode([int(i) for i in tokenizer.encode(text)]) == text


def test_a_bos_is_written_once_and_at_the_beginning(tmp_path):
    name = tokenizer_folder(tmp_path / 't', '<s>', change=begins_with('<s>'), bos_token='<s>')
    bos = tokenizers.Tokenizer.from_file(f'{name}/tokenizer.json').token_to_id('<s>')
    theirs = transformers.AutoTokenizer.from_pretrained(name)
    assert load_tokenizer(name).encode('cat') == theirs('cat').input_ids
    texts = write_lines(tmp_path / 'a.jsonl', [dict(text=f'cat {i}') for i in range(40)])
    answers = write_lines(
        tmp_path / 'b.jsonl', [dict(prompt=f'q {i}', completion='cat') for i in range(40)]
    )
    for path in (texts, answers):
        out = prepare(Preparation(path, f'{path}.out', name, val_fraction=0.2))
        ids = tokens_of(out)
        ends = [i for i, token in enumerate(ids) if token == 0]
        assert [i for i, token in enumerate(ids) if token == bos] == [
            0,
            *(i + 1 for i in ends[:-1]),
        ]
    (tmp_path / 't' / 'chat_template.jinja').write_text('{{ bos_token }}' + CHATML)
    out = prepare(Preparation(answers, f'{answers}.chat', name, val_fraction=0.2))
    assert (
        tokens_of(out).count(bos)
        == json.loads((out / 'meta.json').read_text())['splits']['train']['documents']
    )


E_OF_S = '<｜end▁of▁sentence｜>'  # DeepSeek's


@pytest.mark.parametrize(
    'files, ends',
    [
        ({'tokenizer_config.json': dict(eos_token=E_OF_S)}, [E_OF_S]),
        ({'tokenizer_config.json': dict(eos_token=dict(content='</s>'))}, ['</s>']),
        ({'special_tokens_map.json': dict(eos_token=dict(content='</s>'))}, ['</s>']),
        ({'generation_config.json': dict(eos_token_id=[401, 400])}, ['</s>', E_OF_S]),
        (
            {'tokenizer_config.json': dict(eos_token='</s>')}
            | {'generation_config.json': dict(eos_token_id=[400, 401])},
            ['</s>', E_OF_S],
        ),
        ({}, ['<|endoftext|>']),
    ],
)
def test_the_end_of_a_text_is_what_the_folder_names(tmp_path, files, ends):
    name = tokenizer_folder(tmp_path / 't')
    tokenizer = tokenizers.Tokenizer.from_file(f'{name}/tokenizer.json')
    content = json.loads(tokenizer.to_str())
    for i, token in enumerate((E_OF_S, '</s>'), 400):
        content['added_tokens'].append(content['added_tokens'][0] | dict(id=i, content=token))
    (tmp_path / 't' / 'tokenizer.json').write_text(json.dumps(content))
    for file, settings in files.items():
        (tmp_path / 't' / file).write_text(json.dumps(settings))
    wanted = [{E_OF_S: 400, '</s>': 401}.get(end, 0) for end in ends]
    found = load_tokenizer(name)
    assert found.end == wanted[0] and list(getattr(found, 'ends', [found.end])) == wanted


def test_each_of_several_ends_ends_an_answer():
    model = padded(64)
    x = torch.arange(5)
    (free,) = generate(model, x[None], 12, Sampling(temperature=0))
    for end in free[[3, 6]].tolist():
        (found,) = generate(model, x[None], 12, Sampling(temperature=0, stop=(63, end)))
        assert torch.equal(found, free[: free.tolist().index(end)])


def test_the_space_before_a_continuation_is_kept(tmp_path, capsys):
    """SentencePiece's decoder drops the first space of what it is given."""
    pieces = ['<unk>', '</s>', '▁The', '▁capital', '▁of', '▁France']
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, '<unk>')
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(['</s>'])
    config = GPTConfig(n_layer=1, n_head=1, n_embd=6, vocab_size=6, block_size=16, norm_eps=1e-6)
    model = GPT(config)
    with torch.no_grad():  # every piece is followed by the next one
        for name, p in model.named_parameters():
            p.zero_() if '.o.' in name or 'down' in name else p.fill_(1.0)
        model.wte.weight.copy_(torch.eye(6))
        model.lm_head.weight.copy_(torch.eye(6).roll(1, 0))
    model.save(tmp_path)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    process = run_command(
        *('sample.py', f'--model={tmp_path}', '--prompt=The capital'),
        *('--max_new_tokens=2', '--temperature=0'),
    )
    assert 'The capital of France' in process.stdout, process.stderr


def test_vocab_and_merges_alone_open_and_travel(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(
        f'{train_tokenizer("byte-level", tmp_path / "t")}/tokenizer.json'
    )
    GPT(GPTConfig.named('16x1', vocab_size=400)).save(tmp_path / 'm')
    tokenizer.model.save(str(tmp_path / 'm'))
    for arguments in (('--to=stk2',), ()):
        program, source, *target = ('sample.py', f'--model={tmp_path}/m', '--max_new_tokens=2')
        if arguments:
            program, source, target = 'expand.py', tmp_path / 'm', [tmp_path / 'grown', *arguments]
        process = run_command(program, source, *target)
        assert process.returncode == 0, process.stderr
    assert load_tokenizer(str(tmp_path / 'grown')).encode(TEXT) == tokenizer.encode(TEXT).ids


def test_a_token_beyond_the_embedding_is_named_with_the_way_out(tmp_path):
    name = tokenizer_folder(tmp_path / 'm', '[PAD]')
    size = load_tokenizer(name).vocab_size
    GPT(GPTConfig.named('16x1', vocab_size=size - 1)).save(tmp_path / 'm')
    process = run_command('sample.py', f'--model={tmp_path}/m')
    assert process.returncode == 2 and process.stderr.count('\n') == 1
    assert '[PAD]' in process.stderr and 'delete them from "added_tokens"' in process.stderr


# ----------------------------------------------------------------------------------------------
# chats and rows


def talk(i, *more):
    turns = enumerate((f'q {i}', f'a {i}', 'more', 'b', *more))
    said = [dict(role=('user', 'assistant')[k % 2], content=text) for k, text in turns]
    return dict(messages=[dict(role='system', content='Be brief.'), *said])


def test_a_chat_is_trained_in_the_format_in_which_it_is_used(tmp_path):
    name = tokenizer_folder(tmp_path / 'm', '<|im_start|>', '<|im_end|>')
    (tmp_path / 'm' / 'chat_template.jinja').write_text(CHATML)
    size = load_tokenizer(name).vocab_size
    GPT(GPTConfig.named('16x1', vocab_size=size, block_size=256)).save(tmp_path / 'm', name)
    rows = [*map(talk, range(40)), talk(40, 'what is <|im_end|>?', 'an end')]
    path = write_lines(tmp_path / 'talk.jsonl', rows)
    process = run_command('data/prepare.py', path, f'--tokenizer={name}', f'--out={tmp_path}/talk')
    assert '1 rows cannot be used and are left out; the first: ' in process.stdout, process.stderr
    assert 'line 41: UserError: a message holds the control token <|im_end|>' in process.stdout
    theirs = transformers.AutoTokenizer.from_pretrained(name)
    ids = tokens_of(tmp_path / 'talk')
    marks = np.fromfile(tmp_path / 'talk' / 'train.marks', np.uint8)
    assert theirs.decode(ids[: marks[1:].tolist().index(2) + 1]).startswith(
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq '
    )
    targets = theirs.decode([i for i, mark in zip(ids, marks) if mark & 1])
    assert {part.split(' ')[0] for part in targets.split('<|im_end|>')} == {'a', 'b', ''}
    knobs = [f'--init_from={name}', f'--data_dir={tmp_path}', '--data=talk', '--tokens=512']
    knobs += ['--block_size=24', '--batch_size=2', f'--out_dir={tmp_path}/run', '--device=cpu']
    trained = run_command('train.py', *knobs)
    assert 'examples are cut to 24 tokens' in trained.stdout, trained.stderr
    made = tmp_path / 'run' / 'm-continued'
    end = json.loads((made / 'generation_config.json').read_text())['eos_token_id']
    assert (
        theirs.convert_ids_to_tokens(end) == '<|im_end|>' and end in load_tokenizer(str(made)).ends
    )
    assert (made / 'chat_template.jinja').is_file()


def test_a_template_without_transformers_is_one_line(tmp_path, monkeypatch):
    name = tokenizer_folder(tmp_path / 'm')
    (tmp_path / 'm' / 'chat_template.jinja').write_text(CHATML)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    path = write_lines(tmp_path / 'talk.jsonl', map(talk, range(9)))
    with pytest.raises(UserError, match='need the package transformers: pip install'):
        prepare(Preparation(path, f'{path}.out', name))


GOOD = [json.dumps(dict(text=f'document {i} ' * 9)).encode() for i in range(100)]
BAD = {
    'surrogate': b'{"text": "bad \\ud800 here"}',
    'cut': b'{"text": "cut',
    'number': b'{"text": 7}',
    'null': b'{"text": null}',
    'Latin-1': '{"text": "naïve"}'.encode('latin-1'),
}


@pytest.mark.parametrize('kind', BAD)
def test_a_bad_row_is_left_out_counted_and_named(tmp_path, kind, capsys):
    path = tmp_path / 'mine.jsonl'
    path.write_bytes(b'\n'.join([b'\xef\xbb\xbf' + GOOD[0], BAD[kind], b'', BAD[kind], *GOOD[1:]]))
    out = prepare(Preparation(str(path), f'{path}.out', 'bytes'))
    assert f'2 rows cannot be used and are left out; the first: {path}, line 2: ' in (
        capsys.readouterr().out
    )
    found = bytes(i if i < 256 else 10 for s in ('train', 'val') for i in tokens_of(out, s))
    assert sorted(found.decode().split('\n')[:-1]) == sorted(
        json.loads(line)['text'] for line in GOOD
    )
    with pytest.raises(UserError, match='mine.jsonl, line 2: ') as error:
        prepare(Preparation(str(path), f'{path}.2', 'bytes', bad_rows='stop'))
    assert 'continues' not in str(error.value)


def test_empty_answers_and_inputs_of_null(tmp_path, capsys):
    rows = [dict(instruction=f'Do {i}', input=None, output=f'done {i}') for i in range(40)]
    path = write_lines(tmp_path / 'alpaca.json', [])
    rows += [dict(instruction='Say nothing', input='', output=' '), dict(instruction='a', output=3)]
    (tmp_path / 'alpaca.json').write_text(json.dumps(rows), encoding='utf-8-sig')
    prepare(Preparation(path, f'{path}.out', 'bytes', val_fraction=0.2))
    said = f'2 rows cannot be used and are left out; the first: {path}, record 41: '
    assert said in capsys.readouterr().out


def test_shards_without_rows_and_files_of_commas(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, texts in (('a', []), ('b', ['some text'] * 9)):
        table = pyarrow.table(dict(text=pyarrow.array(texts, pyarrow.string())))
        pyarrow.parquet.write_table(table, tmp_path / f'{name}.parquet')
    out = prepare(Preparation(f'{tmp_path}/*.parquet', f'{tmp_path}/out', 'bytes'))
    assert len(tokens_of(out)) == 80 and len(tokens_of(out, 'val')) == 10
    (tmp_path / 'a.csv').write_text('text\nhello\n')
    (tmp_path / 'b.parquet').write_bytes(b'damage')
    for name, word in (('a.csv', 'read_csv'), ('b.parquet', 'cannot be read')):
        with pytest.raises(UserError, match=word) as error:
            prepare(Preparation(f'{tmp_path}/{name}', f'{tmp_path}/no', 'bytes'))
        assert 'continues' not in str(error.value)


def test_losses_are_printed_before_what_may_fail(data_dir, tmp_path):
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=32)).save(tmp_path / 'm', 'bytes')
    knobs = ('--tasks=no_such_task', f'--task_folder={tmp_path}', f'--data_dir={data_dir}')
    process = run_command('evaluate.py', tmp_path / 'm', *knobs, '--eval_tokens=256')
    assert process.returncode == 2 and 'm: validation loss 5.' in process.stdout, process.stderr
