"""The shipped base taught your own pictures: 11.6M parameters, and nothing to download.

    python tools/precompute.py --config=configs/own_data/finetune.py --config.data.kind=folder \
        --config.data.path=PICTURES --split=train,heldout --num=0 --batch_size=32 --out=runs/own_finetune/tokens
    python train.py --config=configs/own_data/finetune.py --workdir=runs/own_finetune/base \
        --release=runs/own_finetune/release

then tools/eval_base.py and sample.py, as the README has them. Its tokenizer has seen emoji art alone: drawings, not
photos. A release of your own is taught in the same way with `init_from` after configs/own_data/base.py.
Hardware: any GPU; minutes by the count of operations (tools/scaling.py --on=4090:1). On a CPU set
--config.model.dtype=float32.

Reached on two busy CPU cores (680a88b), with a folder of 1,000 of the emoji drawings that the base knows under captions
of another wording, five of them unusable: precompute took 132 s; 48 steps of 32 (--config.train.steps=48
--config.train.batch_size=32 --config.optim.warmup_steps=8) 8.3 minutes, the release included. tools/eval_base.py over
the 15 held-out pictures: loss 3.52 (3.71 with --model=muse/assets), 0.66 below that under another's caption (0.47).
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'runs/own_finetune/tokens', 'image_size': 256, 'text_length': 63}
    data |= {'heldout_share': 0.02}
    return complete(
        {
            'task': 'base',
            'init_from': 'muse/assets',
            'tokenizer': 'muse/assets',
            'model': {
                'codebook_size': 2048,
                'grid': (16, 16),
                'width': 256,
                'mlp_dim': 1024,
                'heads': 4,
                'layers': 10,
                'text_width': 256,
                'text_length': 63,
                'remat': 'none',
                'dtype': 'bfloat16',
            },
            'data': {**data, 'workers': 2},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'learning_rate': 3e-4, 'b2': 0.98, 'weight_decay': 0.02, 'warmup_steps': 100},
            'decode': {'steps': 16, 'guidance_scale': 3.0, 'temperature': 0.5, 'choice_temperature': 8.0},
            'train': {
                'steps': 2000,
                'batch_size': 64,
                'ema_decay': 0.999,
                'eval_every_steps': 500,
                'eval_batches': 1,
                'grid_every_steps': 500,
            },
        }
    )
