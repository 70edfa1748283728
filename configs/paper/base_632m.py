"""The paper's 632M base: its shape is not published; 36 layers of width 1024 come to 626M parameters.

    python train.py --config=configs/paper/base_632m.py --workdir=DIR --distributed --config.data.path=TOKENS \
        --config.eval_data.path=TOKENS --config.tokenizer=FOLDER

Hardware: fits one 80 GB GPU at batch 64; the paper's batch wants eight or more. Never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'data/tokens', 'image_size': 256, 'text_length': 127}
    return complete(
        {
            'task': 'base',
            'tokenizer': 'runs/paper/tokenizer_f16/export',
            'model': {'layers': 36, 'width': 1024, 'mlp_dim': 4096, 'heads': 16, 'dtype': 'bfloat16'},
            'data': {**data, 'workers': 8},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'name': 'adafactor'},
            'train': {'steps': 1_000_000, 'batch_size': 512},
        }
    )
