"""A few processes that decode, so that no file ends or fills this one: killed and replaced where a file is too much.

A file goes in, and pixels come back, through shared memory (memfd); sizes and errors through a socket. The memory that
pixels come back in is sealed in size, so that a decoder cannot cut it under the reader. What a decoder says is checked
like what a stranger says.
"""

import fcntl
import logging
import mmap
import os
import queue
import socket
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from semwatch.defects import Micrograph
from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.intake.decoder_process import receive, send
from semwatch.intake.decoding import LIMITS
from semwatch.intake.page import SAVE_AS

log = logging.getLogger(__name__)

START_S = 60.0
"""Seconds that a decoder may take to start, on a machine under load."""
WALL_PER_CPU = 4
"""By the clock a decoder may take so many times the seconds of computing that it is given."""
MEMORY_PER_PIXEL = 40
"""Bytes of a decoder for each pixel of the largest page: the page as it is decoded five times over (samples, float64
and float32 of them, counts of levels, gray)."""
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
    # What one image took is kept for the next: giving it back and taking it again costs more than decoding a small one.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 27),
}  # fmt: skip
"""And nothing of ours: no secret of the daemon's environment reaches a decoder."""
_KEPT_BYTES = 1 << 24
"""Shared memory that stays filled between two files."""
_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 2, 4


class Decoders:
    """Processes that decode; ``decode`` is ``decoding.decode`` and may be called from any thread.

    Args:
        n: processes, as many as files are decoded at the same time.
        cpu_s: seconds of computing that one file may take.
        max_pixels: of the largest page that will be asked for.
    """

    def __init__(
        self, n: int = 1, *, cpu_s: float = LIMITS.decode_cpu_s, max_pixels: int = LIMITS.max_image_px
    ) -> None:
        self._cpu_s, self._max_pixels, self._is_open = cpu_s, max_pixels, True
        self._idle: queue.LifoQueue[_Decoder] = queue.LifoQueue()
        self._all = [_Decoder(max_pixels) for _ in range(n)]
        for decoder in self._all:
            self._idle.put(decoder)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a file that is being decoded is given up."""
        self._is_open = False
        for decoder in self._all:
            decoder.close()

    def decode(
        self,
        data: bytes,
        *,
        name: str,
        max_pixels: int = LIMITS.max_image_px,
        max_total_pixels: int | None = None,
        max_pages: int = LIMITS.max_pages,
        min_side_px: int = 32,
    ) -> tuple[Micrograph, ...]:
        """Decode all pages of an image file as ``decoding.decode`` does.

        A decoder that ends or takes too long is replaced, and the file tried once more, for it may have been ended by
        a person or for want of memory.

        Raises:
            ImageError: content that is no whole image within the limits, or that ends a decoder or takes too long.
            ServiceUnavailable: no decoder can be started, or something else keeps ending them.
        """
        pixels = min(max_pixels, self._max_pixels)
        total = min(4 * self._max_pixels, 4 * pixels if max_total_pixels is None else max_total_pixels)
        limits = {
            "max_pixels": pixels, "max_total_pixels": total, "max_pages": max_pages, "min_side_px": min_side_px
        }  # fmt: skip
        try:
            decoder = self._idle.get(timeout=START_S + 2 * WALL_PER_CPU * self._cpu_s)
        except queue.Empty:
            raise ServiceUnavailable(f"{name}: every decoder is busy") from None
        try:
            return self._asked(decoder, data, name, limits)
        finally:
            self._idle.put(decoder)

    def _asked(self, decoder: "_Decoder", data: bytes, name: str, limits: dict[str, int]) -> tuple[Micrograph, ...]:
        for is_last in (False, True):
            try:
                return decoder.decode(data, self._cpu_s, limits)
            except ImageError as error:
                raise ImageError(f"{name}: {error}") from error.__cause__
            except _Ended as error:
                if not self._is_open:
                    raise ServiceUnavailable(f"{name}: the decoders are closed") from None
                log.warning("%s: %s; another one starts", name, error)
                if is_last and not error.is_by_file:
                    raise ServiceUnavailable(f"{name}: {error}, twice; is memory short?") from None
                if is_last or error.took_too_long:
                    raise ImageError(f"{name}: {error}; {SAVE_AS}") from None
        raise AssertionError("unreachable")


class _Ended(Exception):
    def __init__(self, text: str, *, is_by_file: bool, took_too_long: bool = False) -> None:
        super().__init__(text)
        self.is_by_file, self.took_too_long = is_by_file, took_too_long


class _Decoder:
    """One process, its socket and its two pieces of shared memory; the next process takes over both."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels, self._size = max_pixels, 4 * max_pixels
        self._input = os.memfd_create("semwatch-file", os.MFD_CLOEXEC)
        self._output = os.memfd_create("semwatch-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._output, self._size)  # takes no memory until it is written to
        fcntl.fcntl(self._output, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
        self._memory = mmap.mmap(self._output, self._size)
        self._start()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._input, self._output)
        memory = MEMORY_PER_PIXEL * self._max_pixels
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "semwatch.intake.decoder_process", *map(str, (*fds, memory))],
                pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                env=_ENVIRONMENT,
            )  # fmt: skip
        self._is_ready = False

    def decode(self, data: bytes, cpu_s: float, limits: dict[str, int]) -> tuple[Micrograph, ...]:
        try:
            answer = self._answer(data, cpu_s, limits)
            if isinstance(error := answer.get("error"), str):
                raise ImageError("".join(c if c.isprintable() else "?" for c in error)[:500])
            return self._pages(answer["pages"], limits)
        except TimeoutError:
            raise self._ended(f"decoding took over {WALL_PER_CPU * cpu_s:g} s", took_too_long=True) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise self._ended("", cpu_s=cpu_s) from None
        finally:
            self._free(len(data))

    def _answer(self, data: bytes, cpu_s: float, limits: dict[str, int]) -> dict[str, Any]:
        if not self._is_ready:
            if receive(self._channel, timeout_s=START_S) is None:
                raise ValueError("ended at its start")
            self._is_ready = True
        at = 0
        while at < len(data):
            at += os.pwrite(self._input, memoryview(data)[at:], at)
        self._channel.settimeout(WALL_PER_CPU * cpu_s)
        send(self._channel, {"n_bytes": len(data), "cpu_s": cpu_s, **limits})
        answer = receive(self._channel, timeout_s=WALL_PER_CPU * cpu_s)
        if answer is None:
            raise ValueError("ended")
        return answer

    def _pages(self, rows: list[Any], limits: dict[str, int]) -> tuple[Micrograph, ...]:
        pages, at = [], 0
        if not 1 <= len(rows) <= limits["max_pages"]:
            raise ValueError(f"{len(rows)} pages")
        for page, H, W, field, pixel_nm, vendor in rows:
            x0, y0, x1, y1 = field
            numbers = (page, H, W, x0, y0, x1, y1)
            if not all(type(n) is int for n in numbers) or page < 0:
                raise ValueError("not a page")
            is_inside = 0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H and at + H * W <= self._size
            if not is_inside or not isinstance(pixel_nm, float | None) or not isinstance(vendor, str | None):
                raise ValueError("not a page")
            pixels = np.frombuffer(self._memory, np.uint8, H * W, at).reshape(H, W).copy()
            pages.append(Micrograph(pixels, (x0, y0, x1, y1), page, pixel_nm, vendor))
            at += H * W
        return tuple(pages)

    def _ended(self, text: str, *, took_too_long: bool = False, cpu_s: float = 0.0) -> _Ended:
        """End the process and start the next; say how it ended."""
        was_ready = self._is_ready
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.0 if took_too_long else 1.0)
        code = self._process.poll()
        self._end()
        self._start()
        if not was_ready:
            return _Ended("a decoder did not start", is_by_file=False)
        if code == -24:  # SIGXCPU
            return _Ended(f"decoding took over {cpu_s:g} s of computing", is_by_file=True, took_too_long=True)
        how = "gave no sense" if code is None else f"ended with signal {-code}" if code < 0 else f"ended with {code}"
        is_by_file = code is None or code not in (-9, -15)
        return _Ended(text or f"the decoder {how}", is_by_file=is_by_file, took_too_long=took_too_long)

    def _end(self) -> None:
        self._process.kill()
        self._channel.close()
        self._process.wait(10)

    def _free(self, n_bytes: int) -> None:
        if n_bytes > _KEPT_BYTES:
            os.ftruncate(self._input, 0)
        with suppress(OSError):
            if os.fstat(self._output).st_blocks * 512 > _KEPT_BYTES:
                self._memory.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        self._end()
        for fd in (self._input, self._output):
            os.close(fd)
