"""Makes the goldens of the T5 encoder and its tokenizer: what Hugging Face's PyTorch T5 and tokenizers give.

    python tools/make_t5_golden.py --out=tests/golden

Needs torch, transformers and sentencepiece, of which only the last is used elsewhere here: run it in an environment of
its own. `t5_*.safetensors` hold small encoders with random weights under Hugging Face's names, in float16, which both
sides read back exactly, their config, and their states. `t5_vocabulary/` holds a vocabulary of a few hundred pieces in
both formats, and ids of odd texts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer  # pyright: ignore[reportMissingImports]

COMMON = {'vocab_size': 96, 'd_model': 48, 'd_kv': 16, 'd_ff': 80, 'num_heads': 3, 'num_layers': 3}
WIDE = {'vocab_size': 70, 'd_model': 40, 'd_kv': 16, 'd_ff': 72, 'num_heads': 4, 'num_layers': 2}
MANY = {'relative_attention_num_buckets': 64, 'relative_attention_max_distance': 220}
FEW = {'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20}
ENCODERS = {
    't5_v1_1': (COMMON | {'feed_forward_proj': 'gated-gelu'}, [100, 37, 1, 72]),
    't5_v1_0': (COMMON | {'feed_forward_proj': 'relu'}, [100, 37, 1, 72]),
    't5_many_buckets': (WIDE | MANY | {'feed_forward_proj': 'gated-gelu'}, [280, 3, 129]),  # past the last bucket
    't5_few_buckets': (WIDE | FEW | {'feed_forward_proj': 'relu', 'num_layers': 1}, [40, 7]),
}


def golden(settings: dict, lengths: list[int], seed: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Weights, ids, lengths and states of one random encoder; and its config as metadata of the file."""
    torch.manual_seed(seed)
    config = T5Config(**settings, initializer_factor=1.0)
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if 'norm' in name:  # initialised to ones, under which a forgotten scale would go unseen
                weight.uniform_(0.5, 1.5)
            if 'relative_attention_bias' in name:  # so large that a wrong bucket shows
                weight.normal_()
            weight.copy_(weight.half().float())
    longest = max(lengths)
    ids = torch.randint(0, settings['vocab_size'], (len(lengths), longest))
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    tensors = {f'weight.{k}': v.half().numpy() for k, v in model.state_dict().items() if k != 'shared.weight'}
    # Of the states, enough rows to see any fault, in a small file.
    kept = np.unique(np.r_[0:8, 30:40, 64:100, longest - 12 : longest])
    kept = kept[kept < longest]
    return tensors | {
        'ids': ids.numpy().astype(np.uint8),
        'lengths': np.array(lengths, np.int32),
        'positions': kept.astype(np.int32),
        'states': np.ascontiguousarray(states.numpy()[:, kept]),  # safetensors writes memory order
    }, {'config': json.dumps(settings | {'model_type': 't5'})}


WORDS = """a photo of the red blue green yellow black white small large old young wooden paper glass dog puppy cat
kitten box ball house tree boat moon river mountain left right under above beside behind on its near, and. with running
sleeping standing painting drawing portrait landscape in style light dark morning evening 12 3x café""".split()
TEXTS = [
    'a photo of a small red dog',
    '  leading,  inner \t and trailing blanks \n',
    'The Red DOG',
    'ｆｕｌｌ　ｗｉｄｔｈ ﬁsh ﬂag ½',
    'nothing known: 日本 ☃ ☃☃ dog☃dog',
    'soft\u00adhyphen zero\u200bwidth no\u00a0break',
    'control\x01 \x00 \x1b[0m \x7f',
    '▁a ▁▁dog',
    "don't, stop.it; (now)",
    'x',
    'unconstitutionally',
    'a\u0301 cafe\u0301 café',
    ' '.join(WORDS * 2),
]
# Ours of the rules of nmt_nfkc, whose whole table would take 240 kB: code points in hexadecimal, from and to.
RULES = {
    'FB01': '66 69',
    'FB02': '66 6C',
    'BD': '31 2F 32',
    '3000': '20',
    'A0': '20',
    '200B': '20',
    '9': '20',
    'A': '20',
}
RULES |= {'1': '', '1B': '', '7F': '', '2581': '20', '61 301': 'E1', '65 301': 'E9'}
RULES |= {f'{0xFF41 + i:X}': f'{0x61 + i:X}' for i in range(26)}


def vocabulary(folder: Path) -> None:
    """A vocabulary as T5's in both formats, and ids of TEXTS by transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile('w', suffix='.tsv') as rules:
        rules.writelines(f'{source}\t{target}\n' for source, target in RULES.items())
        rules.flush()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([f'{" ".join(pair)} .' for pair in itertools.product(WORDS, repeat=2)]),
            model_prefix=str(folder / 'spiece'),
            model_type='unigram',
            vocab_size=200,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_tsv=rules.name,
            num_threads=1,
            minloglevel=2,
        )
    (folder / 'spiece.vocab').unlink()
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=4)
    with tempfile.TemporaryDirectory() as other:
        tokenizer.save_pretrained(other)
        (folder / 'tokenizer.json').write_bytes((Path(other) / 'tokenizer.json').read_bytes())
    found = [{'text': text, 'ids': tokenizer(text)['input_ids']} for text in TEXTS]
    (folder / 'ids.json').write_text(json.dumps(found, indent=1) + '\n')


def main() -> None:
    """Reads the flag and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder to write into')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (settings, lengths) in ENCODERS.items():
        path = args.out / f'{name}.safetensors'
        tensors, metadata = golden(settings, lengths, seed=7)
        save_file(tensors, path, metadata)
        print(f'{path}: {path.stat().st_size} bytes')
    vocabulary(args.out / 't5_vocabulary')
    for path in sorted((args.out / 't5_vocabulary').iterdir()):
        print(f'{path}: {path.stat().st_size} bytes')


if __name__ == '__main__':
    main()
