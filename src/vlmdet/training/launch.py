"""Start one command on several processes of this machine: what `--num-processes N` does.

When: PER RUN, before anything of the run itself; each process then runs the same command line. `accelerate launch` does it too,
and is the way to several machines, FSDP and DeepSpeed (`configs/accelerate/`).

Why not `accelerate launch` here: with `--cpu --num_processes 2` accelerate 1.15 starts one single process and says nothing,
since it leaves several CPU processes to mpirun. Its launcher for GPUs starts gloo processes just as well, once it is told that
they are to use the CPU; that one is called below. Torch's store, through which the processes find one another, would listen on
every network of the machine, and knows no password: here it listens on the loopback only.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from vlmdet.errors import ConfigError

LOOPBACK = "127.0.0.1"

GRACE = 120
"""Seconds that the others get to save and end, once one process has ended or the launcher was told to stop."""


def launch(num_processes: int, words: Sequence[str], *, device: str = "auto") -> int:
    """Run `vlmdet WORDS` in several processes and wait for them.

    When: `vlmdet train … --num-processes N`.

    Input: `num_processes`, two or more; `words`, the command line behind `vlmdet`; `device`, as `model.device`: without a GPU,
    or with `cpu`, the processes share the CPU and talk over gloo, else each takes a GPU of its own.
    Output: the exit code: 0; that of the process that failed first, 128 + signal where one was killed; 128 + signal where the
    launcher itself was told to stop and the processes have saved. All have ended when it returns.

    Raises:
        ConfigError: fewer than two processes, more than there are GPUs, or a launcher within a launcher.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"--num-processes {num_processes} in a process that a launcher has started already",
            "use --num-processes, or accelerate launch, not both",
        )
    if num_processes < 2:
        raise ConfigError(f"--num-processes is {num_processes}", "give two or more, or leave it out")
    cpu = device == "cpu" or not torch.cuda.is_available()
    if not cpu and num_processes > torch.cuda.device_count():
        raise ConfigError(
            f"--num-processes is {num_processes}, and there are {torch.cuda.device_count()} GPUs",
            "each process takes one; lower the number, or use model.device=cpu",
        )
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // num_processes)
    arguments = launch_command_parser().parse_args(
        [
            *("--multi_gpu", "--num_processes", str(num_processes), "--num_machines", "1", "--machine_rank", "0"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),  # the run's own settings say what they are
            *(
                "--num_cpu_threads_per_process",
                str(threads),
                "--rdzv_backend",
                _Loopback.NAME,
                "--main_process_port",
                "0",
            ),
            *("--module", "vlmdet", *words),
        ]
    )
    os.environ |= {
        "ACCELERATE_USE_CPU": str(cpu).lower(),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE),
    }
    logging.disable(logging.ERROR)  # torch writes three pages for one dead process
    try:
        multi_gpu_launcher(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        print(f"process {rank} of {num_processes} ended with {how}; the others were stopped", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0


class _Loopback(StaticTCPRendezvous):
    """Torch's own meeting point for one machine, whose store listens on the loopback alone, at a port that is free."""

    NAME = "loopback"
    _store: Any  # the parent's, None until the processes meet

    @classmethod
    def make(cls, parameters: RendezvousParameters) -> _Loopback:
        return cls(LOOPBACK, 0, rank=0, world_size=1, run_id=parameters.run_id, timeout=600)

    def get_backend(self) -> str:
        return self.NAME

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            listener = socket.create_server((LOOPBACK, 0))
            self.master_port = listener.getsockname()[1]
            self._store = TCPStore(
                LOOPBACK,
                self.master_port,
                is_master=True,
                timeout=self.timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        return super().next_rendezvous()


rendezvous_handler_registry.register(_Loopback.NAME, _Loopback.make)
