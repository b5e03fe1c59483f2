"""Model families, a folder each: form, graph, fit, export. The daemon serves them by their contract, see
``semwatch.models.contract``.

How to add one: make ``families/<name>/`` with an ``export.py`` whose ``read(path, backbones)`` turns a weights file of
the family into an ``Exported``: a network whose ``forward`` takes the inputs and returns the outputs that its ``Meta``
names, in that order. An encoder's ``export.py`` also has ``form_of(provenance)``, see ``exported.EncoderExport``. The
weights file says its family in its header (``family: <name>``), and `semwatch-train build` finds the folder by that
word: nothing else changes, in the daemon or here. A command that trains the family is one line in ``__main__``.

May import: `data`, `trunks`, `metrics` and below; families do not know each other, but `ni` carries `branch`, and
`recame` the encoder of `smg_vit`.
Start reading: `exported.py`, then the folder of a family.
"""
