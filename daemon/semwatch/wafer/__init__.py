"""A wafer from the coordinates of its defects alone: its map, repeaters, scratches and clusters, and the maps of dies.

May import: `klarf` and `errors`, numpy and OpenCV; nothing of the rest.
Start reading: `wafer_map.py`, the arrays that every other module here works on.
"""
