"""The child process that runs one program and its tests; started as a script, it imports nothing of ours.

Before the program runs, the process gives up for good: memory, processor time, open files and file sizes beyond its
limits; all privileges of root; and, by the kernel's filter of system calls (seccomp), new processes and threads, other
programs, sockets, signals to other processes, opening files for writing and every other change of the file system. It
may still read what its user may read. It ends when its parent does.
"""

import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import types

# From linux/prctl.h, linux/capability.h, linux/seccomp.h, linux/bpf_common.h.
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPABILITY_VERSION_3 = 0x20080522
SECCOMP_MODE_FILTER = 2
ALLOW, REFUSE, KILL_PROCESS = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: the call fails with EPERM
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FILE_BYTES, OPEN_FILES = 2**20, 64

# Name: numbers on x86_64 (asm/unistd_64.h) and aarch64 (asm-generic/unistd.h), which lacks some.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
# With the position of their flags.
OPENING = {"open": (2, None, 1), "openat": (257, 56, 2)}
REFUSED = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "clone": (56, 220),
    "clone3": (435, 435),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "unshare": (272, 97),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "creat": (85, None),
    "openat2": (437, 437),
    "truncate": (76, 45),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}


def main() -> None:
    """Read a job from standard input, and write a line "token number" for each test that passed."""
    job = json.load(sys.stdin)
    results = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limit(job["seconds"], job["memory"])
    restrict()
    # Not __main__: what a program does only when it is run by itself, such as asking for input, is no part of a test.
    program = types.ModuleType("program")
    sys.modules["program"] = program
    exec(compile(job["program"], "program", "exec"), vars(program))
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, f"test {number}", "exec"), vars(program))
        except BaseException:  # also SystemExit: a program that leaves has not passed
            continue
        os.write(results, f"{job['token']} {number}\n".encode())


def limit(seconds: float, memory: int) -> None:
    """Bound the process's memory in bytes, its processor time in seconds, and its files."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, bound in limits.items():
        resource.setrlimit(name, (bound, bound))


def restrict() -> None:
    """Give up privileges, then the system calls that change anything outside the process.

    Raises:
      OSError: the kernel refuses. ValueError: an architecture whose calls are not known here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    no_capabilities = (ctypes.c_uint32 * 6)()
    call(libc.capset, (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), no_capabilities)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    instructions = filter_instructions(platform.machine())
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(packed, len(packed))
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(pointer), 0, 0)


def filter_instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter as (operation, jump if true, jump if false, operand) of classic BPF."""
    column = list(ARCHITECTURES).index(machine)
    instructions = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":  # the same calls have other numbers in the x32 way of calling
        instructions += [(JUMP_AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL_PROCESS)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            instructions += [(JUMP_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE)]
    for *numbers, flags in OPENING.values():
        if numbers[column] is not None:
            instructions += [
                (JUMP_EQUAL, 0, 4, numbers[column]),
                (LOAD, 0, 0, ARGUMENTS + 8 * flags),
                (JUMP_ANY_BIT, 0, 1, WRITES),
                (RETURN, 0, 0, REFUSE),
                (RETURN, 0, 0, ALLOW),
            ]
    return [*instructions, (RETURN, 0, 0, ALLOW)]


def call(function, *arguments) -> None:
    """Call a C function that returns 0 or sets errno."""
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
