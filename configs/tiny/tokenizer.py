"""The tiny recipe, 1 of 2: a VQGAN for 64-pixel scenes of the sample art, 8x8 tokens of 256 codes.

    python train.py --config=configs/tiny/tokenizer.py --workdir=runs/tiny/tokenizer

Hardware: 2 CPU cores, 2.4 minutes. Perceptual loss of a random net, no adversary: enough to see shapes and colours.
Expect: training PSNR near 20 dB, most of the 256 codes in use.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'image_size': 64, 'max_objects': 1, 'text_length': 31}
    return complete(
        {
            'task': 'tokenizer',
            'model': {
                'channels': 16,
                'channel_mult': (1, 2, 2, 4),
                'num_res_blocks': 1,
                'codebook_size': 256,
                'code_dim': 8,
                'l2_normalize': True,
            },
            'loss': {'perceptual': 0.1, 'adversarial': 0.0, 'revive_after_steps': 20},
            'data': data,
            'eval_data': {**data, 'split': 'heldout_labels'},
            'optim': {'learning_rate': 2e-3, 'warmup_steps': 50},
            'train': {
                'steps': 600,
                'batch_size': 16,
                'ema_decay': 0.99,
                'log_every_steps': 20,
                'save_every_steps': 200,
                'eval_every_steps': 200,
                'eval_batches': 2,
                'grid_every_steps': 200,
            },
        }
    )
