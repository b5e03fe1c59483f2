"""semwatch on a tool's workstation: what is laid out where, which version serves, how it is exchanged and backed up.

May import: `settings`, `models` and below.
Start reading: `installation.py`.
"""
