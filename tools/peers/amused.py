"""aMUSEd-256 (603M U-ViT, diffusers) with random weights, timed: the peer of tools/bench_sample.py and bench_train.py.

    python tools/peers/amused.py '{"task": "sample", "batch": 8, "mode": "reduce-overhead", "repeats": 15, "steps": 12}'
    python tools/peers/amused.py '{"task": "train", "batch": 64, "mode": "default", "repeats": 10}'

`mode` is eager or one of torch.compile's. 'sample' ends with a picture of 256×256 in half precision, guided; 'train' is
one step of bfloat16 autocast with fused AdamW. "tiny": true is a model for a CPU. Needs torch and diffusers. Prints
one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

GPU = torch.cuda.is_available()
DEVICE, HALF = ('cuda', torch.float16) if GPU else ('cpu', torch.float32)
CODES, MASK, WIDTH, TEXT = 8192, 8255, 768, 77
TINY_NET = {
    'hidden_size': 64,
    'cond_embed_dim': WIDTH,
    'block_out_channels': 64,
    'intermediate_size': 128,
    'num_hidden_layers': 1,
    'num_attention_heads': 4,
    'block_num_heads': 4,
    'num_res_blocks': 1,
}


def timed(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of a call that is waited for, after the first, which compiles, and two more."""
    times = []
    for number in range(repeats + 3):
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if GPU:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        if number == 0:
            first = times[0]
    kept = times[3:]
    return {
        'ms': round(statistics.median(kept), 3),
        'ms_min': round(min(kept), 3),
        'ms_max': round(max(kept), 3),
        'repeats': repeats,
        'compile_s': round(first / 1e3, 1),  # pyright: ignore[reportPossiblyUnboundVariable]
    }


def compiled(function: Any, mode: str) -> Any:
    """`function` under torch.compile, or as it is."""
    return function if mode == 'eager' else torch.compile(function, mode=mode)


def sampler(batch: int, mode: str, steps: int, tiny: bool) -> Callable[[], Any]:
    """Draws `batch` pictures from random text states through the published pipeline."""
    from diffusers import UVit2DModel, VQModel  # pyright: ignore[reportMissingImports]
    from diffusers.schedulers import AmusedScheduler  # pyright: ignore[reportMissingImports]

    channels = [32] * 5 if tiny else [128, 256, 256, 512, 768]
    decoder = VQModel(
        act_fn='silu',
        block_out_channels=channels,
        down_block_types=['DownEncoderBlock2D'] * 5,
        up_block_types=['UpDecoderBlock2D'] * 5,
        latent_channels=64,
        layers_per_block=1 if tiny else 2,
        num_vq_embeddings=CODES,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    decoder = decoder.to(DEVICE, HALF).eval()
    net = UVit2DModel(sample_size=16, **(TINY_NET if tiny else {})).to(DEVICE, HALF).eval()
    decoder.decode, net = compiled(decoder.decode, mode), compiled(net, mode)
    pipe = diffusers.AmusedPipeline(
        vqvae=decoder, tokenizer=None, text_encoder=None, transformer=net, scheduler=AmusedScheduler(mask_token_id=MASK)
    )
    pipe.set_progress_bar_config(disable=True)
    pooled = torch.randn(batch, WIDTH, device=DEVICE, dtype=HALF)
    states = torch.randn(batch, TEXT, WIDTH, device=DEVICE, dtype=HALF)

    @torch.no_grad()
    def draw() -> Any:
        return pipe(
            prompt_embeds=pooled,
            encoder_hidden_states=states,
            negative_prompt_embeds=pooled * 0,
            negative_encoder_hidden_states=states * 0,
            num_inference_steps=steps,
            guidance_scale=10.0,
            height=256,
            width=256,
            output_type='pt',
        )

    return draw


def trainer(batch: int, mode: str, tiny: bool) -> Callable[[], Any]:
    """One training step on `batch` pictures' tokens."""
    from diffusers import UVit2DModel  # pyright: ignore[reportMissingImports]

    net = UVit2DModel(sample_size=16, **(TINY_NET if tiny else {})).to(DEVICE).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=GPU)
    forward = compiled(net, mode)
    token = torch.randint(0, CODES, (batch, 16, 16), device=DEVICE)
    mask = torch.rand(batch, 16, 16, device=DEVICE) < 0.64
    canvas, label = torch.where(mask, MASK, token), torch.where(mask, token, -100).reshape(-1)
    shapes = ((WIDTH,), (TEXT, WIDTH), (5,))
    pooled, states, micro = (torch.randn(batch, *shape, device=DEVICE) for shape in shapes)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = forward(canvas, encoder_hidden_states=states, pooled_text_emb=pooled, micro_conds=micro)
            flat = logits.permute(0, 2, 3, 1).reshape(-1, CODES)
            loss = torch.nn.functional.cross_entropy(flat, label, ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Reads the setting, times the calls, prints the result."""
    setting = json.loads(sys.argv[1])
    batch, mode, tiny = setting['batch'], setting['mode'], setting.get('tiny', False)
    sample = setting['task'] == 'sample'
    call = sampler(batch, mode, setting['steps'], tiny) if sample else trainer(batch, mode, tiny)
    found = timed(call, setting['repeats'])
    found |= {
        'peak_gib': round(torch.cuda.max_memory_allocated() / 2**30, 3) if GPU else None,
        'torch': torch.__version__,
        'diffusers': diffusers.__version__,
        'torch_device': torch.cuda.get_device_name() if GPU else 'cpu',
    }
    print(json.dumps(found))


if __name__ == '__main__':
    main()
