"""The paper's super-res (Table 6) for the 3B base: 16 layers over 16x16 tokens, 32 multi-axis ones over 64x64.

    python train.py --config=configs/paper/superres_770m.py --workdir=DIR --distributed --config.data.path=TOKENS \
        --config.eval_data.path=TOKENS --config.tokenizer=FOLDER --config.superres_tokenizer=FOLDER

768M parameters: 537M in the multi-axis layers, 201M in the low-res layers, 29M in tables, text projection and head.
Hardware: a pod. Never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'data/superres_tokens', 'image_size': 512, 'text_length': 127}
    return complete(
        {
            'task': 'superres',
            'tokenizer': 'runs/paper/tokenizer_f16/export',
            'superres_tokenizer': 'runs/paper/tokenizer_f8/export',
            'model': {'remat': 'full', 'dtype': 'bfloat16'},
            'data': {**data, 'workers': 8},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'name': 'adafactor'},
            'mesh': {'data': -1, 'fsdp': 8},
            'train': {'steps': 1_000_000, 'batch_size': 512},
        }
    )
