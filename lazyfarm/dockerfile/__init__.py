"""Dockerfiles: parsed, and converted into build graphs.

The parser is our own. Of the libraries on PyPI, ``dockerfile-parse`` 2.0 takes the bodies of heredocs for
instructions, and ``dockerfile`` 3.4 (BuildKit's parser, a Go extension) drops them; ``e2b-dockerfile-utils`` reads
them, but is at its first releases (0.1), expands no variables and leaves ``--mount`` as text. What is accepted, and
what it means, is what BuildKit's Dockerfile frontend does (``frontend/dockerfile``).
"""
