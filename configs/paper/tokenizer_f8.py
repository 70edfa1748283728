"""The paper's f8 tokenizer (§2.2, Table 5): 512 pixels to 64x64 tokens of 8192 codes, batch 256, 1M steps.

    python train.py --config=configs/paper/tokenizer_f8.py --workdir=DIR --distributed --config.data.path=PICTURES \
        --config.eval_data.path=PICTURES --config.loss.perceptual_net=FOLDER

Hardware: 64 or more accelerators. Never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'folder', 'path': 'data/pictures', 'image_size': 512}
    return complete(
        {
            'task': 'tokenizer',
            'model': {'channel_mult': (1, 1, 2, 4), 'dtype': 'bfloat16'},
            'loss': {'perceptual_net': 'data/perceptual'},
            'data': {**data, 'random_flip': True, 'workers': 8},
            'eval_data': {**data, 'path': 'data/heldout_pictures'},
            'train': {'steps': 1_000_000, 'batch_size': 256},
        }
    )
