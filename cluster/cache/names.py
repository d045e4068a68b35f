"""What people call a ref: its ID, the first digits of it, or the name or digest of its image."""

from __future__ import annotations

from cluster.digest import is_digest
from cluster.errors import AmbiguousRefError, InvalidReferenceError, RefNotFoundError
from cluster.ports import RefStore
from cluster.ref import ImageRecord, RefId
from cluster.reference import parse_reference

#: Fewer digits than this name too many refs, and may as well be a repository's name.
_FEWEST_DIGITS = 4


async def find_ref(refs: RefStore, name: str) -> tuple[ImageRecord | None, RefId | None]:
    """Return the image and the top ref that *name* means; no ref for an image without layers.

    Raises:
        RefNotFoundError: nothing known goes by that name.
        AmbiguousRefError: the digits begin several ref IDs.
    """
    if is_digest(name):
        image = await refs.image(name)
        if image is not None:
            return image, image.ref
    digits = name.removeprefix("sha256:")
    if len(digits) >= _FEWEST_DIGITS and all(c in "0123456789abcdef" for c in digits):
        found = await refs.find(name)
        if len(found) > 1:
            raise AmbiguousRefError(name, len(found))
        if found:
            return await refs.image_of_ref(found[0]), found[0]
    try:
        reference = parse_reference(name)
    except InvalidReferenceError as exc:
        raise RefNotFoundError(name) from exc
    image = await refs.image(reference.name)
    if image is None:
        raise RefNotFoundError(name)
    return image, image.ref
