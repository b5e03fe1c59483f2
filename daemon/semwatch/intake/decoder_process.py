"""The process that decodes one file after another for ``decoders``: what hostile bytes do to a codec ends here.

    python -I -m semwatch.intake.decoder_process SOCKET INPUT OUTPUT MEMORY_BYTES

The three are inherited descriptors: a stream socket, a memfd that holds the file, a memfd that takes the pixels. Both
directions of the socket are 4 bytes of length, big-endian, and JSON:

    -> {"n_bytes": ..., "cpu_s": ..., limits of ``decoding.decode``}
    <- {"pages": [[index, H, W, field, pixel_nm, vendor], ...]}     pixels in the output, page behind page
    <- {"error": "..."}                                             the file is refused

Before the first file it gives up what decoding does not need: memory beyond its share, files, children, and on the
machines that we know calls that reach other processes, files or the network.
"""

import ctypes
import json
import mmap
import os
import platform
import resource
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from semwatch.errors import ImageError
from semwatch.intake import decoding

LENGTH = struct.Struct(">I")
_DENIED = {  # by number, from the kernel's tables
    # execve execveat socket connect bind ptrace process_vm_readv/writev kill tkill tgkill pidfd_send_signal pidfd_open
    # pidfd_getfd unlink(at) rename(at,at2) link(at) symlink(at) *chmod* *chown* truncate mkdir(at) io_uring_setup bpf
    "x86_64": (0xC000003E, (59, 322, 41, 42, 49, 101, 310, 311, 62, 200, 234, 424, 434, 438, 87, 263, 82, 264, 316, 86,
                            265, 88, 266, 90, 91, 268, 452, 92, 93, 94, 260, 76, 83, 258, 425, 321)),
    "aarch64": (0xC00000B7, (221, 281, 198, 203, 200, 117, 270, 271, 129, 130, 131, 424, 434, 438, 35, 38, 276, 37, 36,
                             52, 53, 452, 54, 55, 45, 34, 425, 280)),
}  # fmt: skip
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM


def main(socket_fd: int, input_fd: int, output_fd: int, memory_bytes: int) -> None:
    """Decode files until the other end of the socket is closed."""
    channel = socket.socket(fileno=socket_fd)
    cv2.setNumThreads(1)
    memory = mmap.mmap(output_fd, 0)  # once: its pages stay mapped from file to file
    _give_up_rights(memory_bytes)
    send(channel, {"ready": True})
    while (request := receive(channel)) is not None:
        _limit_cpu(request.pop("cpu_s"))
        data = os.pread(input_fd, request.pop("n_bytes"), 0)
        send(channel, _answer(data, memory, **request))


def _answer(data: bytes, memory: mmap.mmap, **limits: int) -> dict[str, Any]:
    try:
        pages = decoding.decode(data, name="", **limits)
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            limit_mb = resource.getrlimit(resource.RLIMIT_AS)[0] >> 20
            return {"error": f"decoding needs more than {limit_mb} MB; save it as 8- or 16-bit gray or RGB"}
        return {"error": str(error).removeprefix(": ")}
    at = 0
    for page in pages:
        memory[at : at + page.pixels.size] = page.pixels.data.cast("B")
        at += page.pixels.size
    return {"pages": [[it.page, *it.pixels.shape, it.field_xyxy, it.pixel_nm, it.vendor] for it in pages]}


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Send one message.

    Raises:
        OSError: the other end is gone, or takes it too slowly for the socket's timeout.
    """
    body = json.dumps(message).encode()
    channel.sendall(LENGTH.pack(len(body)) + body)


def receive(channel: socket.socket, *, timeout_s: float | None = None) -> dict[str, Any] | None:
    """Receive one message; None where the other end is closed.

    Args:
        channel: where from.
        timeout_s: for the whole message, however slowly its bytes come; None waits for ever.

    Raises:
        OSError: it took longer, or the other end failed.
        ValueError: what came is no message.
    """
    until = None if timeout_s is None else time.monotonic() + timeout_s
    head = _exactly(channel, LENGTH.size, until)
    body = _exactly(channel, LENGTH.unpack(head)[0], until) if head else b""
    if not head or not body:
        return None
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


def _exactly(channel: socket.socket, n_bytes: int, until: float | None) -> bytes:
    if n_bytes > 1 << 24:
        raise ValueError(f"a message of {n_bytes} bytes")
    parts = bytearray()
    while len(parts) < n_bytes:
        channel.settimeout(None if until is None else max(until - time.monotonic(), 1e-3))
        part = channel.recv(n_bytes - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def _limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))


def _give_up_rights(memory_bytes: int) -> None:
    with suppress(OSError):  # first to go when the machine is short of memory
        Path("/proc/self/oom_score_adj").write_text("800")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    for limit, value in (
        (resource.RLIMIT_AS, in_use + memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),  # writing to a mapping is not writing to a file
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))
    machine = platform.machine()
    if machine in _DENIED:
        _deny(*_DENIED[machine])


def _deny(architecture: int, calls: tuple[int, ...]) -> None:
    """Have the kernel refuse calls with EPERM, and all calls of another architecture than the one we know."""
    code = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    for left, call in zip(range(len(calls), 0, -1), calls, strict=True):
        code.append((_JUMP_EQUAL, left, 0, call))
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    held = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("H6xP", len(code), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(filter_, len(filter_)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(*(int(word) for word in sys.argv[1:5]))
