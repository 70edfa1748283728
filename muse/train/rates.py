"""How fast a run goes: pictures and tokens a second, share of the chips' peak, and where the time of a step goes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from muse.config import BaseRun, Run, SuperresRun
from muse.train.flops import peak_flops, step_flops


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What turns seconds into rates.

    Attributes:
        batch_size: global.
        tokens_per_image: picture tokens of one example; the text is not counted.
        step_flops: operations of one step of the whole batch, by formula (`muse.train.flops`).
        peak_flops: dense bfloat16 operations a second of all devices of the mesh; None where not known (CPU).
    """

    batch_size: int
    tokens_per_image: int
    step_flops: float
    peak_flops: float | None

    def over(self, steps: int, seconds: float, *, waited: float, blocked: float) -> dict[str, float]:
        """The rates of some steps.

        Args:
            steps: how many.
            seconds: from the start of the first to the end of the last.
            waited: of them, the seconds that the loop waited for the next batch.
            blocked: of them, the seconds that it waited for the devices.

        Returns:
            'images_per_s', 'tokens_per_s'; 'mfu', where the peak is known; 'data_wait', a share of the time; 'host_ms',
            what is left of a step besides the two waits; 'hbm_peak_gib', where the device says.
        """
        seconds = max(seconds, 1e-9)
        images = steps * self.batch_size / seconds
        found = {'images_per_s': images, 'tokens_per_s': images * self.tokens_per_image}
        if self.peak_flops:
            found['mfu'] = steps * self.step_flops / (seconds * self.peak_flops)
        found |= {'data_wait': waited / seconds, 'host_ms': 1e3 * max(seconds - waited - blocked, 0.0) / steps}
        memory = peak_memory_gib()
        return found if memory is None else found | {'hbm_peak_gib': memory}


def rates_of(run: Run, mesh: Mesh) -> Rates:
    """The rates of a run on a mesh."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Rates(
        batch_size=run.train.batch_size,
        tokens_per_image=tokens_per_image(run),
        step_flops=step_flops(run),
        peak_flops=peak * mesh.size if peak else None,
    )


def tokens_per_image(run: Run) -> int:
    """Picture tokens of one example: of the high-res grid in the super-res."""
    if isinstance(run, BaseRun | SuperresRun):
        return run.model.grid[0] * run.model.grid[1]
    return (run.data.image_size // run.model.factor) ** 2


def peak_memory_gib() -> float | None:
    """The most that this process has held on its first device so far; None where the device does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    peak = (stats or {}).get('peak_bytes_in_use')
    return None if peak is None else round(peak / 2**30, 3)
