"""What a search leaves behind and is resumed from.

A *fact* is something that happened; the *journal* is all facts in order; a *run directory* is a
journal and the *artifacts* that its facts name, with one writer at a time. Knows nothing of Ray.
"""
