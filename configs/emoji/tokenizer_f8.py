"""The f8 tokenizer for 512-pixel emoji scenes: 64x64 tokens of 8192 codes, 5.7M parameters (6 MB as int8).

    python tools/make_emoji.py --out=data/emoji --cache_size=512
    python train.py --config=configs/emoji/tokenizer_f8.py --workdir=runs/emoji/tokenizer_f8

Hardware: one H100 and 16 CPU cores, about 8 minutes by plan. Not yet run to the end: the goal is LPIPS (AlexNet) 0.03.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'path': 'data/emoji', 'image_size': 512, 'workers': 14, 'text_length': 63}
    schedule = {'learning_rate': 4e-4, 'warmup_steps': 300, 'final_fraction': 0.02}
    return complete(
        {
            'task': 'tokenizer',
            'model': {
                'channels': 32,
                'channel_mult': (1, 2, 2, 4),
                'num_res_blocks': 2,
                'decoder_channels': 48,
                'codebook_size': 8192,
                'code_dim': 16,
                'l2_normalize': True,
                'dtype': 'bfloat16',
            },
            'loss': {
                'perceptual': 1.0,
                'perceptual_net': 'data/perceptual',
                'adversarial': 0.1,
                'adversarial_start_step': 2000,
            },
            'data': data,
            'eval_data': {**data, 'split': 'heldout_labels', 'workers': 0},
            'optim': schedule,
            'discriminator_optim': {**schedule, 'learning_rate': 2e-4},
            'train': {
                'steps': 4500,
                'batch_size': 16,
                'ema_decay': 0.999,
                'log_every_steps': 50,
                'save_every_steps': 2000,
                'eval_every_steps': 2000,
                'eval_batches': 4,
                'grid_every_steps': 2000,
            },
        }
    )
