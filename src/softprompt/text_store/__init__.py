"""Keys and values of texts that no soft token precedes, kept in memory and on disk, over steps, trials, tasks and runs.

folders.py: what lies on disk, its size and its age; shards.py: the files; eight_bit.py: numbers in 8 bits; store.py:
what is kept where.
"""
