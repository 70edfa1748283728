"""The paper's 3B base (Table 4): 48 layers of width 2048, AdaFactor, batch 512, 1.5M steps.

    python train.py --config=configs/paper/base_3b.py --workdir=DIR --distributed --config.data.path=TOKENS \
        --config.eval_data.path=TOKENS --config.tokenizer=FOLDER

Hardware: a pod; the paper used 512 TPUv4 cores for about a week. Never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'data/tokens', 'image_size': 256, 'text_length': 127}
    return complete(
        {
            'task': 'base',
            'tokenizer': 'runs/paper/tokenizer_f16/export',
            'model': {'remat': 'full', 'dtype': 'bfloat16'},
            'data': {**data, 'workers': 8},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'name': 'adafactor'},
            'mesh': {'data': -1, 'fsdp': 8},
            'train': {'steps': 1_500_000, 'batch_size': 512},
        }
    )
