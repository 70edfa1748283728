"""The super-res of the paper's 632M base (table 1: 268M); its shape is not published.

    python train.py --config=configs/paper/superres_268m.py --workdir=DIR --distributed --config.data.path=TOKENS \
        --config.eval_data.path=TOKENS --config.tokenizer=FOLDER --config.superres_tokenizer=FOLDER

Our choice: 16 multi-axis layers of width 1024 with cross-attention to the embedded low-res tokens and the text. The
layers hold 268M parameters; with tables, text projection and head there are 298M.
Hardware: eight or more accelerators for the paper's batch. Never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'data/superres_tokens', 'image_size': 512, 'text_length': 127}
    return complete(
        {
            'task': 'superres',
            'tokenizer': 'runs/paper/tokenizer_f16/export',
            'superres_tokenizer': 'runs/paper/tokenizer_f8/export',
            'model': {'layers': 16, 'low_layers': 0, 'remat': 'full', 'dtype': 'bfloat16'},
            'data': {**data, 'workers': 8},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'name': 'adafactor'},
            'train': {'steps': 1_000_000, 'batch_size': 512},
        }
    )
