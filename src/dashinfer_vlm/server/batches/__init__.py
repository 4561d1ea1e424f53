"""Batches: files of requests, answered one by one; `/v1/files` and `/v1/batches` keep them on disk."""
