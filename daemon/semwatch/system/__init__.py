"""The operating system: durable files and SQLite, the clock, the journal, systemd's notifications, child processes.

May import: `errors`.
Start reading: `files.py`: the only module that renames and fsyncs.
"""
