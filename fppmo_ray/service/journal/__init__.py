"""What a search leaves behind and is resumed from.

A *fact* is something that happened; the *journal* is all facts in order; a *run directory* is a
journal and the *artifacts* that its facts name, with one writer at a time. It lies in a *storage*:
a folder, whose journal is a file under a lock, or an object store, whose journal is a sequence of
*leases*, one per driver. Knows nothing of Ray.
"""
