"""A pool of Ray actors that run calls, replaces lost workers and loses no call.

A *call* is one method call for some worker. A *worker* is an actor in a numbered *slot*; the
*worker group* starts one per slot as the cluster has room. Knows Ray, and nothing of pruning.
"""
