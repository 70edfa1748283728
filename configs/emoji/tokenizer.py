"""The shipped tokenizer: f16 on 256-pixel emoji scenes, 16x16 tokens of 2048 codes, 3.9M parameters.

    python tools/make_emoji.py --out=data/emoji --cache_size=256
    python tools/fetch_perceptual.py --out=data/perceptual
    python train.py --config=configs/emoji/tokenizer.py --workdir=runs/emoji/tokenizer

Hardware: one H100 and 16 CPU cores, 14.5 minutes (510 to 560 pictures/s after 2.5 minutes of compiling).
Expect, and reached on held-out labels: 26.7 dB PSNR, LPIPS 0.073 (VGG) and 0.051 (AlexNet), 99.6 % of the codes in use.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'path': 'data/emoji', 'image_size': 256, 'workers': 12, 'text_length': 63}
    schedule = {'learning_rate': 6e-4, 'warmup_steps': 300, 'final_fraction': 0.02}
    return complete(
        {
            'task': 'tokenizer',
            'model': {
                'channels': 32,
                'channel_mult': (1, 1, 2, 2, 3),
                'num_res_blocks': 2,
                'decoder_channels': 48,
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
                'steps': 5000,
                'batch_size': 64,
                'ema_decay': 0.999,
                'log_every_steps': 50,
                'save_every_steps': 2500,
                'eval_every_steps': 2500,
                'eval_batches': 4,
                'grid_every_steps': 2500,
            },
        }
    )
