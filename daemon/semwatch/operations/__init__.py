"""What a person may ask or decide: examine a site, tell an image's story, decide about found classes. No terminal, no
HTTP.

May import: `service` and below.
Start reading: `doctor.py`.
"""
