"""The paper's 632M base on one H100, or a few, with what was fastest there (docs/performance.md, runs D and G).

    MUSE_GPU_KERNELS=1 XLA_FLAGS=--xla_gpu_enable_cublaslt=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 \
        python train.py --config=configs/paper/base_632m_h100.py --workdir=DIR --config.data.path=TOKENS \
        --config.eval_data.path=TOKENS --config.tokenizer=FOLDER

Layers are compiled one by one, nothing is made again in the backward pass, norms and attention run in own kernels, and
the paper's batch comes in four parts of 128, which fill 80 GB. On eight GPUs: --config.train.accumulate=1.
Hardware: one 80 GB GPU, of which a step of 128 took 61 GiB. Steps of its parts were timed there, not yet of the whole;
never run to the end by this project.
"""

from muse.train.command_line import complete


def get_config():
    data = {'kind': 'precomputed', 'path': 'data/tokens', 'image_size': 256, 'text_length': 127}
    model = {'layers': 36, 'width': 1024, 'mlp_dim': 4096, 'heads': 16, 'dtype': 'bfloat16'}
    return complete(
        {
            'task': 'base',
            'tokenizer': 'runs/paper/tokenizer_f16/export',
            'model': {**model, 'unroll': 36, 'remat': 'none', 'attention': 'fused'},
            'data': {**data, 'workers': 8},
            'eval_data': {**data, 'split': 'heldout'},
            'optim': {'name': 'adafactor'},
            'train': {'steps': 1_000_000, 'batch_size': 512, 'accumulate': 4},
        }
    )
