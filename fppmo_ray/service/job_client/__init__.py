"""Search jobs on a Ray cluster: submit, list, follow and stop them."""
