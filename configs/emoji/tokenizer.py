"""The shipped tokenizer: f16 on 256-pixel emoji scenes, 16x16 tokens of 2048 codes.

    python train.py --config=configs/emoji/tokenizer.py --workdir=runs/emoji/tokenizer --config.data.path=DATA \
        --config.eval_data.path=DATA --config.loss.perceptual_net=FOLDER

DATA is made by tools/make_emoji.py, the perceptual net's folder by tools/fetch_perceptual.py.
Hardware: one H100 and 16 CPU cores, about 6 minutes (700 pictures/s, 1.5 minutes of compiling).
Expect, and reached: 25.0 dB PSNR and 0.14 LPIPS (VGG) on held-out labels, 94 % of the codes in use.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'path': 'data/emoji', 'image_size': 256, 'workers': 14, 'text_length': 63}
    schedule = {'learning_rate': 4e-4, 'warmup_steps': 500, 'final_fraction': 0.02}
    return complete(
        {
            'task': 'tokenizer',
            'model': {
                'channels': 32,
                'channel_mult': (1, 1, 2, 2, 4),
                'num_res_blocks': 2,
                'codebook_size': 2048,
                'code_dim': 16,
                'l2_normalize': True,
                'dtype': 'bfloat16',
            },
            'loss': {
                'perceptual': 0.2,
                'perceptual_net': 'data/perceptual',
                'adversarial': 0.1,
                'adversarial_start_step': 1339,
            },
            'data': data,
            'eval_data': {**data, 'split': 'heldout_labels', 'workers': 0},
            'optim': schedule,
            'discriminator_optim': {**schedule, 'learning_rate': 2e-4},
            'train': {
                'steps': 3349,
                'batch_size': 64,
                'ema_decay': 0.999,
                'log_every_steps': 50,
                'save_every_steps': 2000,
                'eval_every_steps': 2000,
                'eval_batches': 4,
                'grid_every_steps': 2000,
            },
        }
    )
