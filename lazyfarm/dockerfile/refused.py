"""What is wrong, said by code that doesn't know where it stands."""


class RefusedError(ValueError):
    """A word, field or instruction can't be meant or is not supported.

    Never leaves this package: whoever knows the file and line makes it a :class:`cluster.errors.DockerfileError`.
    """
