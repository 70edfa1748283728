"""The emoji super-res, from 16x16 tokens of 256 pixels to 64x64 tokens of 512: 6 multi-axis layers of width 192.

    python tools/precompute.py --config=configs/emoji/superres_tokenizer.py --low_tokenizer=muse/assets \
        --tokenizer=runs/emoji/superres_tokenizer/export --out=runs/emoji/superres_tokens --num=60000 --batch_size=128
    ... and once more with --split=heldout_pairs --num=0, then:
    python train.py --config=configs/emoji/superres.py --workdir=runs/emoji/superres
    python tools/export.py --tokenizer=muse/assets --text_encoder=muse/assets --base=muse/assets \
        --superres=runs/emoji/superres/export --superres_tokenizer=runs/emoji/superres_tokenizer/export --out=release

5.0M parameters, 5.2 MB as int8, over the shipped f16 tokenizer, text encoder and base.
Hardware: one H100 and 16 CPU cores; by the count of operations 2.7 minutes at 35 % of its peak. Not yet run. The
decoding settings are the shipped base's but for steps and guidance, and not tuned.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'runs/emoji/superres_tokens', 'image_size': 512, 'text_length': 63}
    return complete(
        {
            'task': 'superres',
            'tokenizer': 'muse/assets',
            'superres_tokenizer': 'runs/emoji/superres_tokenizer/export',
            'model': {
                'codebook_size': 2048,
                'grid': (64, 64),
                'low_codebook_size': 2048,
                'low_grid': (16, 16),
                'width': 192,
                'mlp_dim': 704,
                'heads': 6,
                'layers': 6,
                'low_layers': 1,
                'text_width': 256,
                'text_length': 63,
                'remat': 'none',
                'unroll': 6,
                'dtype': 'bfloat16',
            },
            'data': {**data, 'workers': 8},
            'eval_data': {**data, 'split': 'heldout_pairs'},
            'optim': {'learning_rate': 1.5e-3, 'b2': 0.98, 'weight_decay': 0.02, 'warmup_steps': 300},
            'decode': {'steps': 8, 'guidance_scale': 1.0, 'temperature': 0.5, 'choice_temperature': 8.0},
            'train': {
                'steps': 8000,
                'batch_size': 64,
                'ema_decay': 0.999,
                'log_every_steps': 100,
                'save_every_steps': 4000,
                'eval_every_steps': 2000,
                'eval_batches': 2,
                'grid_every_steps': 4000,
            },
        }
    )
