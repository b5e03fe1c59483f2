"""What a person may ask or decide: examine a site, show an image's history, decide about found classes. No terminal, no
HTTP.

May import: `service` and below.
Start reading: `doctor.py`.
"""
