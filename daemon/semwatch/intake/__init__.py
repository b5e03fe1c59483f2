"""From a drop folder to decoded pages: which files are complete, their bytes, their pixels, their information bar.

May import: `system`, `defects`, `errors`.
Start reading: `drop_folder.py`.
"""
