"""Searches as Ray jobs: sent to a cluster, listed, stopped."""
