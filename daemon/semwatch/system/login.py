"""Who is at the terminal."""

import os
import pwd


def login_name() -> str:
    """Who is at the terminal, also behind sudo; without a login session, whose process this is."""
    try:
        return os.getlogin()
    except OSError:
        pass
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
