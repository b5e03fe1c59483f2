"""Decoding in a process of its own: the same answers, and no file that ends or fills the process that asks."""

import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from image_files import GRAY, VALID
from semwatch.errors import ImageError
from semwatch.intake import decoding
from semwatch.intake.decoder_process import LENGTH, receive
from semwatch.intake.decoders import Decoders


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with Decoders(1, max_pixels=1 << 22) as made:
        yield made


def scans(side_px: int, n: int) -> bytes:
    """A progressive JPEG of many refinement scans: few bytes, a pass over all pixels for each."""
    table = b"".join(
        b"\xff\xc4" + struct.pack(">H", 20) + bytes([kind, 1]) + bytes(15) + b"\0" for kind in (0x00, 0x10)
    )
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side_px, side_px, 1) + bytes([1, 0x11, 0])
    head = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64) + frame + table
    first = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 0, 0, 0, 0])
    more = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 1, 63, 0x10, 0])
    return head + first + more * n + b"\xff\xd9"


@pytest.mark.parametrize("form", VALID)
def test_a_decoder_answers_what_decoding_here_does(decoders: Decoders, form: str) -> None:
    here = decoding.decode(VALID[form], name="x")
    there = decoders.decode(VALID[form], name="x")
    assert len(here) == len(there)
    for ours, theirs in zip(here, there, strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert theirs.pixels.flags.writeable
        assert (ours.field_xyxy, ours.page, ours.pixel_nm, ours.vendor) == (
            theirs.field_xyxy, theirs.page, theirs.pixel_nm, theirs.vendor
        )  # fmt: skip


def test_a_refused_file_says_the_same_here_and_there(decoders: Decoders) -> None:
    for data in (b"", b"II*\0", VALID["png"][:-30]):
        with pytest.raises(ImageError) as here:
            decoding.decode(data, name="lot/a.tif")
        with pytest.raises(ImageError) as there:
            decoders.decode(data, name="lot/a.tif")
        assert str(there.value) == str(here.value)


def test_a_file_that_takes_too_long_is_refused_and_the_next_one_decoded() -> None:
    with Decoders(1, cpu_s=0.2, max_pixels=1 << 28) as decoders:
        with pytest.raises(ImageError, match=r"slow\.jpg: decoding took over [\d.]+ s"):
            decoders.decode(scans(16384, 60), name="slow.jpg", max_pixels=1 << 28)
        assert decoders.decode(VALID["png"], name="x")[0].pixels.shape == GRAY.shape


def test_a_message_that_comes_a_byte_at_a_time_is_waited_for_no_longer_than_another() -> None:
    ours, theirs = socket.socketpair()
    is_over = threading.Event()

    def drip() -> None:
        theirs.sendall(LENGTH.pack(1000))
        while not is_over.wait(0.05):
            theirs.sendall(b"x")

    dripping = threading.Thread(target=drip)
    with ours, theirs:
        dripping.start()
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            receive(ours, timeout_s=0.5)
        assert time.monotonic() - start < 5
        is_over.set()
        dripping.join()


def test_a_decoder_that_is_killed_is_replaced_and_the_file_decoded_after_all(decoders: Decoders) -> None:
    (decoder,) = decoders._all
    decoders.decode(VALID["png"], name="x")
    os.kill(decoder._process.pid, signal.SIGSEGV)
    assert decoders.decode(VALID["tiff"], name="x")[0].pixels.shape == GRAY.shape


def test_a_file_that_ends_every_decoder_is_refused_with_the_signal(decoders: Decoders) -> None:
    is_over = threading.Event()

    def shoot() -> None:
        while not is_over.is_set():
            for decoder in decoders._all:
                if decoder._is_ready:
                    decoder._process.send_signal(signal.SIGFPE)
            time.sleep(0.01)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    try:
        with pytest.raises(ImageError, match=r"a\.jpg: the decoder ended with signal 8"):
            decoders.decode(scans(2048, 60), name="a.jpg")
    finally:
        is_over.set()
        shooter.join()
    assert decoders.decode(VALID["png"], name="x")


def test_a_decoder_that_talks_nonsense_is_not_believed(decoders: Decoders) -> None:
    (decoder,) = decoders._all
    limits = {"max_pages": 2}
    for row in (
        [0, 10**6, 10**6, [0, 0, 9, 9], None, None],
        [0, 64, 64, [0, 0, 65, 9], None, None],
        [0, 64, 64, [0, 0, 9, 9], "wide", None],
        [0, 6.4, 64, [0, 0, 6, 9], None, None],
        [0, True, 64, [0, 0, 6, 9], None, None],
    ):
        with pytest.raises(ValueError, match="not a page"):
            decoder._pages([row], limits)
    with pytest.raises(ValueError, match="3 pages"):
        decoder._pages([[0, 9, 9, [0, 0, 9, 9], None, None]] * 3, limits)


def test_a_decoder_can_neither_write_nor_start_nor_connect_nor_fill_memory(tmp_path: object) -> None:
    program = """
        import os, socket, subprocess
        from semwatch.intake.decoder_process import _give_up_rights
        _give_up_rights(200 << 20)
        def attempt(what):
            try:
                what()
                return "DONE"
            except (OSError, MemoryError) as error:
                return type(error).__name__
        kept = os.open("FILE", os.O_WRONLY | os.O_CREAT)
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        print(attempt(lambda: os.write(kept, b"x")), attempt(lambda: os.execv("/bin/true", ["true"])),
              attempt(lambda: socket.socket()), attempt(lambda: os.unlink("FILE")),
              attempt(lambda: os.kill(os.getppid(), 0)), attempt(lambda: bytearray(300 << 20)),
              attempt(lambda: bytearray(20 << 20)))
    """
    program = textwrap.dedent(program).replace("FILE", f"{tmp_path}/written")
    ended = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    refused = "PermissionError PermissionError PermissionError PermissionError"
    assert ended.stdout.split() == ["OSError", *refused.split(), "MemoryError", "DONE"], ended.stderr


def test_closing_ends_the_processes() -> None:
    with Decoders(2, max_pixels=1 << 20) as decoders:
        processes = [decoder._process for decoder in decoders._all]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
