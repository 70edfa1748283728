"""A larger decoder (appendix A.2) for the tokenizer of the tiny recipe: twice the channels and blocks, trained alone.

    python train.py --config=configs/tiny/decoder_finetune.py --workdir=runs/tiny/decoder

After configs/tiny/tokenizer.py. Encoder, codebook and ids stay as they are: a base trained on the old tokenizer takes
the new one. Hardware: 2 CPU cores.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'image_size': 64, 'max_objects': 1, 'text_length': 31}
    return complete(
        {
            'task': 'decoder',
            'model': {
                'channels': 16,
                'channel_mult': (1, 2, 2, 4),
                'num_res_blocks': 1,
                'decoder_channels': 32,
                'decoder_num_res_blocks': 2,
                'codebook_size': 256,
                'code_dim': 8,
                'l2_normalize': True,
            },
            'tokenizer': 'runs/tiny/tokenizer/export',
            'loss': {'perceptual': 0.1, 'adversarial': 0.0},
            'data': data,
            'eval_data': {**data, 'split': 'heldout_labels'},
            'optim': {'learning_rate': 2e-3, 'warmup_steps': 50},
            'train': {
                'steps': 300,
                'batch_size': 16,
                'ema_decay': 0.99,
                'log_every_steps': 20,
                'save_every_steps': 100,
                'eval_every_steps': 100,
                'eval_batches': 2,
                'grid_every_steps': 100,
            },
        }
    )
