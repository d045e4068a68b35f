"""The command line: one file a noun, and what they share.

``main`` finds a noun's file when it is named; ``boundary`` turns errors into one line and an exit code;
``output`` prints; ``layers`` shows progress; ``driving`` runs a coroutine and ends it at Ctrl-C; ``parts``
is where the farm itself is reached, imported only by commands that need it.
"""
