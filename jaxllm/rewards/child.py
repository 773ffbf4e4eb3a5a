"""The child process that runs one program and its tests; started as a script, it imports nothing of ours.

Before the program runs, the process gives up for good: more memory, processor time, open files and file sizes than it
is allowed; new processes and threads; other programs; sockets of any kind; signals to other processes; and, by the
kernel's filter of system calls (seccomp), opening a file for writing and every call that changes the file system. It
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

# From linux/prctl.h, linux/seccomp.h, linux/audit.h, linux/bpf_common.h.
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER = 2
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_EPERM, _ENOSYS = 1, 38

# Offsets in struct seccomp_data: the number of the call, the architecture, the low half of argument n.
_NUMBER, _ARCHITECTURE = 0, 4
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Calls by architecture: (its AUDIT_ARCH, openat, open or None, calls that are refused). Numbers are those of
# asm/unistd_64.h and asm-generic/unistd.h.
_REFUSED_X86_64 = (
    *(41, 42, 43, 44, 45, 46, 47, 49, 50, 53, 288, 299, 307),  # socket ... sendmmsg
    *(56, 57, 58, 59, 322, 435),  # clone, fork, vfork, execve, execveat, clone3
    *(62, 129, 200, 234, 297, 424, 101, 310, 311),  # kill, tkill, tgkill, sigqueue, pidfd, ptrace, process_vm
    *(76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 161, 165, 166, 155, 188, 189, 190, 197, 198, 199),
    *(235, 258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 285, 316, 437, 452),
    *(109, 112, 141, 142, 144, 203, 250, 272, 298, 302, 308, 160, 321, 323, 425, 426, 427, 157),
)
