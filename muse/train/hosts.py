"""Several processes as one run (jax.distributed): how they find each other, and how soon a dead one is noticed."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax

from muse.errors import UserError
from muse.train.signals import Terminated
from muse.train.watchdog import EXIT_CODE

HEARTBEAT_SECONDS = 60  # a process not heard of for so long is dead
_EXPORT_SECONDS = 3600  # at the end the others wait for the one that writes the weights
# In messages of the layers below about a process that is gone: Gloo, NCCL, the coordination service.
_OTHERS = ('Gloo', 'gloo', 'NCCL', 'onnection', 'heartbeat', 'oordination', 'DEADLINE_EXCEEDED', 'UNAVAILABLE')
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join() -> None:
    """Joins the other processes of this job; call it before anything touches a device.

    TPU pods, SLURM, Open MPI and Kubernetes jobs say themselves who takes part. Elsewhere three variables do:
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: nothing says who takes part, or the others cannot be reached.
    """
    address, count, mine = (os.environ.get(name) for name in _VARIABLES)
    number, process = _number('JAX_NUM_PROCESSES', count), _number('JAX_PROCESS_ID', mine)
    if (number is None) != (process is None) or (number is not None and address is None):
        missing = [name for name in _VARIABLES if not os.environ.get(name)]
        raise UserError(f'--distributed: {" and ".join(missing)} must be set too, all of {", ".join(_VARIABLES)}')
    if number is not None and process is not None and not process < number:
        raise UserError(f'JAX_PROCESS_ID is {process}: of {number} processes it goes from 0 to {number - 1}')
    # SIGTERM is the loop's (`muse.train.signals`): JAX's service would swallow it wherever nobody asks for it.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=number,
            process_id=process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_EXPORT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'--distributed: the processes of this job were not found ({reason}): start it under SLURM, Open MPI, '
            f'Kubernetes or on a TPU pod, or set {", ".join(_VARIABLES)}'
        ) from None


def _number(name: str, text: str | None) -> int | None:
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f'{name} is {text!r}: give a whole number')
    return int(text)


@contextlib.contextmanager
def leave_together() -> Iterator[None]:
    """Around the work of one process of several: one that fails goes at once, so that the others hear of it.

    An orderly exit would wait for the others, which wait for it in a collective. A failure that comes from another
    process is one line and `watchdog.EXIT_CODE`; any other is what `main_guard` makes of it.
    """
    code = 1
    try:
        yield
        return
    except SystemExit as end:
        if isinstance(end, Terminated) or not end.code:  # all processes end here together
            raise
        code = end.code if isinstance(end.code, int) else 1
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if any(sign in reason for sign in _OTHERS):
            code = EXIT_CODE
            print(
                f'error: another process of this job has ended, or the network between them failed ({reason}): run the '
                'same command on all hosts to go on from the newest checkpoint',
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
    except BaseException:  # of any kind: nothing may keep this process waiting
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
