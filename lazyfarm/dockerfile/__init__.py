"""Dockerfiles: parsed, and converted into build graphs.

The parser is our own. Of the libraries on PyPI, ``dockerfile-parse`` knows neither heredocs nor ``--mount``, and
``dockerfile`` is a Go extension that drops the heredocs' bodies. What is accepted, and what it means, is what
BuildKit's Dockerfile frontend does (``frontend/dockerfile``).
"""
