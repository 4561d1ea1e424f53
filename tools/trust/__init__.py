"""Proofs that take longer than a test: half an hour of mixed load, faults, a thousand clients, mutated media.

Each tool starts a server of its own, says what it saw, and ends with status 1 where something is not as promised.
"""
