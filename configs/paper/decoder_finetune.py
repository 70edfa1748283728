"""The paper's larger f8 decoder (appendix A.2): 4 residual blocks a resolution, 256 channels, trained alone.

    python train.py --config=configs/paper/decoder_finetune.py --workdir=DIR --distributed --config.tokenizer=FOLDER \
        --config.data.path=PICTURES --config.eval_data.path=PICTURES --config.loss.perceptual_net=FOLDER

The tokenizer is that of configs/paper/tokenizer_f8.py; its encoder, codebook and ids stay as they are.
Hardware: 64 or more accelerators. Never run to the end by this project. The paper does not say how long.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'folder', 'path': 'data/pictures', 'image_size': 512}
    return complete(
        {
            'task': 'decoder',
            'model': {
                'channel_mult': (1, 1, 2, 4),
                'decoder_channels': 256,
                'decoder_num_res_blocks': 4,
                'dtype': 'bfloat16',
            },
            'tokenizer': 'runs/paper/tokenizer_f8/export',
            'loss': {'perceptual_net': 'data/perceptual'},
            'data': {**data, 'random_flip': True, 'workers': 8},
            'eval_data': {**data, 'path': 'data/heldout_pictures'},
            'train': {'steps': 200_000, 'batch_size': 256},
            'mesh': {'fsdp': 8},
        }
    )
