"""The whole daemon in this process, on real files and models."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from daemon import Site
from semwatch.service.loop import Service
from semwatch.settings.site import load_site

WAIT_S = 120.0


@contextmanager
def running(site: Site) -> Iterator[Service]:
    """The daemon at work until the block ends, which it must leave whole."""
    stop, ended = threading.Event(), []
    service = Service(load_site(site.file), stop=stop)
    thread = threading.Thread(target=lambda: ended.append(service.run()))
    thread.start()
    try:
        yield service
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert ended == [True]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def names(site: Site) -> set[str]:
    return {path.name.removesuffix(".review.json") for path in site.reviews()}
