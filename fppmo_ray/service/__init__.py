"""The search as a service on Ray.

A *probability model* actor proposes masks and learns from feedback; *scoring workers* hold the
data on their devices and do all heavy work; the *driver* runs the loop between them and is the
only writer of the *run directory*, whose *journal* of facts is the search's state: whoever reads
it can go on.
"""
