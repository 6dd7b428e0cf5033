"""Workers that are found room for, given work, watched and replaced; whose work is never lost.

Knows Ray, and nothing of pruning.
"""
