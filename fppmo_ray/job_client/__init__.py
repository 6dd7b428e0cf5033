"""Searches as jobs of a cluster: submit, list, logs and stop, from a machine outside it.

It talks to the cluster's job server alone; a search knows nothing of it.
"""
