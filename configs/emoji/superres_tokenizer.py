"""The tokenizer under the emoji super-res: f8 for 512-pixel scenes, 64x64 tokens of 2048 codes, small enough to ship.

    python tools/make_emoji.py --out=data/emoji --cache_size=512
    python tools/fetch_perceptual.py --out=data/perceptual
    python train.py --config=configs/emoji/superres_tokenizer.py --workdir=runs/emoji/superres_tokenizer

2.7M parameters, 2.8 MB as int8: more would leave a super-res no room in the 28 MB that all shipped weights may take
(tests/test_superres_recipe.py adds them up).
Hardware: one H100 and 16 CPU cores, about 4 minutes at 35 % of its peak by the count of operations. Not yet run.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'path': 'data/emoji', 'image_size': 512, 'workers': 14, 'text_length': 63}
    schedule = {'learning_rate': 4e-4, 'warmup_steps': 300, 'final_fraction': 0.02}
    return complete(
        {
            'task': 'tokenizer',
            'model': {
                'channels': 24,
                'channel_mult': (1, 2, 2, 4),
                'num_res_blocks': 2,
                'decoder_channels': 32,
                'codebook_size': 2048,
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
                'eval_every_steps': 1500,
                'eval_batches': 4,
                'grid_every_steps': 1500,
            },
        }
    )
