"""The tiny recipe's super-res, 1 of 2: a VQGAN of factor 4 for 128-pixel scenes, 32x32 tokens of 256 codes.

    python train.py --config=configs/tiny/superres_tokenizer.py --workdir=runs/tiny/superres_tokenizer

Hardware: 2 CPU cores, 3 minutes of CPU time, 1.5 GB. Perceptual loss of a random net, no adversary, as in
`configs/tiny/tokenizer.py`. Expect: training PSNR near 21.5 dB, two thirds of the 256 codes in use in a batch of 8; on
held-out labels 23.5 dB (`eval_psnr` in the last line of metrics.jsonl).
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'scenes', 'image_size': 128, 'max_objects': 1, 'text_length': 31}
    return complete(
        {
            'task': 'tokenizer',
            'model': {
                'channels': 16,
                'channel_mult': (1, 2, 2),
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
                'steps': 300,
                'batch_size': 8,
                'ema_decay': 0.99,
                'log_every_steps': 20,
                'save_every_steps': 100,
                'eval_every_steps': 150,
                'eval_batches': 2,
                'grid_every_steps': 150,
            },
        }
    )
