"""System calls that commands may not make.

What containerd's and Docker's default profile keeps from containers without ``CAP_SYS_ADMIN``, turned round: that
one lists what is allowed, and a program with a call newer than the list fails. Above all there is no making
of namespaces, which would lend a command the rights that it was not given, and with these more of the kernel.
"""

from __future__ import annotations

import errno
import platform
from typing import Any, Final

_ARCHITECTURES: Final = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
_DENIED: Final = (
    *("acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module"),
    *("finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "init_module", "ioperm", "iopl"),
    *("io_uring_enter", "io_uring_register", "io_uring_setup", "kexec_file_load", "kexec_load", "keyctl"),
    *("lookup_dcookie", "mount", "mount_setattr", "move_mount", "move_pages", "nfsservctl", "open_by_handle_at"),
    *("open_tree", "perf_event_open", "pivot_root", "query_module", "quotactl", "quotactl_fd", "reboot"),
    *("request_key", "setns", "settimeofday", "stime", "swapoff", "swapon", "_sysctl", "sysfs", "umount", "umount2"),
    *("unshare", "uselib", "userfaultfd", "ustat", "vm86", "vm86old"),
)
#: ``linux/sched.h``: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NAMESPACES: Final = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)


def profile(machine: str = platform.machine()) -> dict[str, Any] | None:
    """Return the profile as the runtime takes it; None for a machine that it isn't known for."""
    architectures = _ARCHITECTURES.get(machine)
    if architectures is None:
        return None
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": list(architectures),
        "syscalls": [
            {"names": list(_DENIED), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
            *(
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": errno.EPERM,
                    "args": [{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}],
                }
                for flag in _NAMESPACES
            ),
            # Its flags are in memory, where no profile can look: the C library takes clone instead.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        ],
    }
