"""PyTorch's T5EncoderModel with random weights, timed: the peer of tools/bench_text.py, which starts this as a process.

    python tools/peers/t5_torch.py '{"config": {...}, "batch": 64, "length": 128, "repeats": 15, "mode": "default"}'

Needs torch and transformers. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def build(config: dict[str, Any], device: str) -> Any:
    """The encoder with random weights made on the device; initialising it the usual way takes minutes on the host."""
    theirs = transformers.T5Config(
        vocab_size=config['vocab_size'],
        d_model=config['width'],
        d_kv=config['head_dim'],
        d_ff=config['mlp_dim'],
        num_layers=config['layers'],
        num_heads=config['heads'],
        feed_forward_proj='gated-gelu' if config['gated'] else 'relu',
        use_cache=False,
    )
    with torch.device('meta'):
        model = transformers.T5EncoderModel(theirs)
    model = model.to(getattr(torch, config['dtype'])).to_empty(device=device).eval()
    model.encoder.embed_tokens = model.shared  # to_empty may give the tied table two places
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if 'layer_norm' in name:
                weight.fill_(1)
            else:
                weight.normal_(std=1.0 if name.startswith('shared') else weight.shape[-1] ** -0.5)
    return model


def main() -> None:
    """Reads the setting, times the calls, prints the result."""
    setting = json.loads(sys.argv[1])
    gpu = torch.cuda.is_available()
    device = 'cuda' if gpu else 'cpu'
    model = build(setting['config'], device)
    shape = (setting['batch'], setting['length'])
    ids = torch.randint(2, min(setting['config']['vocab_size'], 32000), shape, device=device)
    mask = torch.ones(shape, dtype=torch.long, device=device)
    if setting['mode'] != 'eager':
        model = torch.compile(model, mode=setting['mode'])

    def call() -> None:
        model(input_ids=ids, attention_mask=mask)
        if gpu:
            torch.cuda.synchronize()

    times = []
    with torch.inference_mode():
        start = time.perf_counter()
        call()
        compile_s = time.perf_counter() - start
        for _ in range(3):
            call()
        for _ in range(setting['repeats']):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    found = {
        'ms': round(statistics.median(times), 3),
        'ms_min': round(min(times), 3),
        'ms_max': round(max(times), 3),
        'repeats': setting['repeats'],
        'peak_gib': round(torch.cuda.max_memory_allocated() / 2**30, 3) if gpu else None,
        'compile_s': round(compile_s, 1),
        'torch': torch.__version__,
        'transformers': transformers.__version__,
        'torch_device': torch.cuda.get_device_name() if gpu else 'cpu',
    }
    print(json.dumps(found))


if __name__ == '__main__':
    main()
