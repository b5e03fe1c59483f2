"""Settings files: the site (what is watched, where things live) and recipes (how a layer is judged).

May import: `system`, `defects`, `errors`.
Start reading: `site.py` and `recipe.py`.
"""
