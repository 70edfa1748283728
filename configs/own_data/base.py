"""A base of 320M parameters for your own captioned photos on one GPU of 24 GB: 18 layers of width 1024.

    python tools/import_tokenizer.py --weights=amused-256/vqvae --out=runs/own_data/tokenizer
    python tools/precompute.py --config=configs/own_data/base.py --config.data.kind=folder --config.data.path=PHOTOS \
        --split=train,heldout --num=0 --batch_size=32 --text_dtype=bfloat16 --out=runs/own_data/tokens
    python train.py --config=configs/own_data/base.py --workdir=runs/own_data/base --release=runs/own_data/release

then tools/eval_base.py and sample.py, as the README has them. Any tokenizer of factor 16 and 8,192 codes and any T5 of
width 1024 fit as they are; others by --config.tokenizer, --config.model.codebook_size, --config.text_encoder and
--config.model.text_width, the same for both commands.
Hardware: one GPU of 24 GB. 29 hours on an RTX 4090 at 35 % of its peak (tools/scaling.py --on=4090:1): an estimate.
With less memory, raise --config.train.accumulate. Never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'runs/own_data/tokens', 'image_size': 256, 'text_length': 127}
    data |= {'heldout_share': 0.02}
    return complete(
        {
            'task': 'base',
            'tokenizer': 'runs/own_data/tokenizer',
            'text_encoder': 'google/flan-t5-large',
            'model': {
                'codebook_size': 8192,
                'grid': (16, 16),
                'width': 1024,
                'mlp_dim': 4096,
                'heads': 16,
                'layers': 18,
                'text_width': 1024,
                'text_length': 127,
                'remat': 'dots',
                'dtype': 'bfloat16',
            },
            'data': {**data, 'workers': 4},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'learning_rate': 2e-4, 'warmup_steps': 2000},
            'train': {'steps': 50_000, 'batch_size': 256, 'accumulate': 8, 'ema_decay': 0.9995},
        }
    )
