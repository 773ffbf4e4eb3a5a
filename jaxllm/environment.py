"""The machine a command runs on: compilation cache, processes, and what `jaxllm env` tells about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import pwd
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxllm.errors import InputError

_PACKAGES = ("jaxllm", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR")
_ACCELERATOR_FILES = ("/dev/accel", "/dev/vfio/", "/dev/nvidia")
_MIN_CACHED_COMPILE_SECONDS = 0.1


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second start of a job does not compile again.

    JAX_COMPILATION_CACHE_DIR names another folder; JAXLLM_NO_COMPILE_CACHE=1 turns this off.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.environ.get("JAXLLM_NO_COMPILE_CACHE") == "1":
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "jaxllm" / "xla"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        print(f"jaxllm: compiled programs are not kept: {folder}: {error.strerror}", file=sys.stderr)
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A job's many small programs (initialisation, evaluation, each bucket of generation) add up to seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_CACHED_COMPILE_SECONDS)


def start_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, detect: bool = False
) -> None:
    """Join the processes of a multi-process run; does nothing for a single process. Must run before jax sees a device.

    Args:
      coordinator: "host:port" of process 0.
      detect: let jax find the processes, on a TPU pod or under a scheduler that it knows, such as Slurm.

    Raises:
      InputError: the description is incomplete or contradicts itself, or there is nothing to detect.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if detect:
        if len(missing) < len(given):
            raise InputError(f"--distributed finds the processes by itself; leave out {', '.join(given)}")
        _detect_processes()
    elif not missing:
        _check_process(coordinator, num_processes, process_id)
        import jax

        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif len(missing) < len(given):
        raise InputError(f"a run with several processes needs all of {', '.join(given)}; missing: {', '.join(missing)}")


def _detect_processes() -> None:
    import jax

    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise InputError(
            f"--distributed: jax finds no TPU pod and no scheduler here ({error}); "
            "name --coordinator, --num-processes and --process-id instead"
        ) from error


def _check_process(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")
    if process_id >= num_processes:
        raise InputError(f"--process-id: expected less than --num-processes ({num_processes}), found {process_id}")


def describe_environment() -> Iterator[str]:
    """Yield the lines of `jaxllm env`: versions, settings, machine, who holds an accelerator, devices."""
    yield f"{'python':18}{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield f"{package:18}{_version(package)}"
    variables = [name for name in sorted(os.environ) if name in _VARIABLES or name.startswith("JAXLLM_")]
    for name in variables:
        yield f"{name}={os.environ[name]}"
    yield f"{'disk':18}{_gigabytes(shutil.disk_usage('.').free)} free in {Path.cwd()}"
    yield f"{'memory':18}{_memory()}"
    yield from _describe_holders()
    yield from _describe_devices()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _memory() -> str:
    total = _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    info = Path("/proc/meminfo")
    if not info.exists():
        return f"{total} in all"
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return f"{_gigabytes(int(fields['MemAvailable'].split()[0]) * 1024)} available of {total}"


class Holder(NamedTuple):
    """A process that has an accelerator's device files open."""

    pid: int
    user: str
    command: str
    files: tuple[str, ...]


def find_holders(proc: Path = Path("/proc")) -> tuple[list[Holder], int]:
    """Return the processes that hold an accelerator, and how many processes could not be looked into."""
    holders, hidden = [], 0
    for folder in sorted(proc.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        try:
            targets = {os.readlink(file) for file in (folder / "fd").iterdir()}
            files = tuple(sorted(target for target in targets if target.startswith(_ACCELERATOR_FILES)))
            if files and int(folder.name) != os.getpid():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                holders.append(Holder(int(folder.name), _user(folder.stat().st_uid), command, files))
        except PermissionError:
            hidden += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process, or the file it had open, is gone
    return holders, hidden


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _describe_holders() -> Iterator[str]:
    if not Path("/proc/self/fd").exists():
        yield "what holds an accelerator cannot be told here: there is no /proc"
        return
    holders, hidden = find_holders()
    for holder in holders:
        files = ", ".join(holder.files)
        yield f"accelerator held   by pid {holder.pid} of {holder.user}: {holder.command} ({files})"
    if not holders:
        yield "accelerator held   by no process" + (" that can be looked into" if hidden else "")
    if hidden:
        yield f"                   processes that could not be looked into: {hidden}"


def require_devices() -> None:
    """Start jax's backend.

    Raises:
      InputError: there is no device of the platform that was asked for.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts when the only platform asked for is not installed
        platforms = os.environ.get("JAX_PLATFORMS") or "its default platform"
        reason = str(error) or "it is not installed"
        raise InputError(f"jax finds no device of {platforms}: {reason}") from error


def _describe_devices() -> Iterator[str]:
    # Asking about a GPU must not take most of its memory away from a job that runs on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    try:
        require_devices()
    except InputError as error:
        yield f"devices            none: {error}"
        return
    devices = jax.devices()
    yield f"processes          {jax.process_count()}"
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", memory limit {_gigabytes(limit)}" if limit else ""
        yield f"device {device.id:<12}{device.platform}, {device.device_kind}{memory}"
    if all(device.platform == "cpu" for device in devices):
        yield "jax found no accelerator: it computes on the CPU"
