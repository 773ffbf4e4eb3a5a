"""Run jaxllm commands, one JSON request a line, each in a fork of this process, which has paid for the imports.

Prints the process id at once; the exit code goes to OUTPUT.status, negative for a signal.
"""

import json
import os
import resource
import sys
import threading
from pathlib import Path

import grain  # noqa: F401
import orbax.checkpoint  # noqa: F401

import jaxllm.train.loop  # noqa: F401
from jaxllm.cli import main


def run(request):
    """Become the command; never returns to the server's loop."""
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={request['devices']} --xla_backend_optimization_level=0"
    )
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(request["arguments"]))


def reap(pid, output):
    _, status = os.waitpid(pid, 0)
    temporary = Path(f"{output}.status.tmp")
    temporary.write_text(str(os.waitstatus_to_exitcode(status)))
    temporary.rename(f"{output}.status")


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        Path(f"{request['output']}.status").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            run(request)
        print(pid, flush=True)
        threading.Thread(target=reap, args=(pid, request["output"])).start()
