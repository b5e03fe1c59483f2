"""The service on a tool's workstation: what is laid out where, which version serves, and how it is exchanged."""
