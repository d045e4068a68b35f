"""Every error the farm raises, as one tree.

Errors cross actor boundaries and processes: each class keeps ``args == signature``, so that it
survives pickling and :mod:`cluster.wire`. Each says what was being done to what; :attr:`ClusterError.hint`
says what to do next.

    ClusterError
    ├─ ConfigError                 every fault at once, each with its key and file
    ├─ InputError                  what the caller gave can't be meant: reference, digest, descriptor
    │  └─ GraphError               a build graph, for a vertex of it
    ├─ ContentError                bytes: absent, damaged, of another digest or size, not unpackable
    ├─ RefError                    refs: unknown, ambiguous, without a usable provider
    ├─ LeaseError                  leases and fences: lost, stale
    ├─ RegistryError               what a registry answered and meant
    ├─ WireError                   a payload of an unknown version, truncated or malformed
    ├─ RemoteError                 an error of a class that only the other end knows
    ├─ JobError                    builds: unknown, ended, another under that ID
    ├─ OpError                     an op of a build can't be carried out, or its command failed
    ├─ ContainerError              this node can't run a container, or not as it is asked to
    ├─ FarmError                   the farm itself: not running, no such node
    ├─ UnavailableError            no answer, outcome unknown; may be tried again
    └─ InternalError               our bug
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from cluster.quota import Quota


class ClusterError(Exception):
    """Root of the tree: catch this to catch everything the farm raises on purpose."""

    #: True where the same call may succeed if it is simply made again.
    retryable: ClassVar[bool] = False
    _hint: ClassVar[str] = ""

    @property
    def hint(self) -> str:
        """Return what the user can do next, as one sentence; empty where there is nothing."""
        return self._hint

    @property
    def needed_opts(self) -> tuple[str, ...]:
        """Return the cache opts with which the same call may succeed, as a vertex may have published them."""
        return ()


# -- configuration ---------------------------------------------------------------------------


class ConfigError(ClusterError):
    """The configuration can't be used; all faults are listed, each as ``key: what is wrong``."""

    _hint = "see configs/default.toml for every key, its unit and its default"

    def __init__(self, source: str, faults: tuple[str, ...]) -> None:
        super().__init__(source, tuple(faults))
        self.source = source
        self.faults = tuple(faults)

    def __str__(self) -> str:
        counted = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        return f"configuration from {self.source} has {counted}: {'; '.join(self.faults)}"


class CredentialFileError(ConfigError):
    """A file of registry credentials (docker's ``config.json``, podman's ``auth.json``) can't be used."""

    _hint = (
        "repair or remove that file and log in again (docker login); DOCKER_CONFIG or REGISTRY_AUTH_FILE names another"
    )

    def __str__(self) -> str:
        return f"credentials file {self.source}: {'; '.join(self.faults)}"


# -- what the caller gave ---------------------------------------------------------------------


class InputError(ClusterError):
    """What the caller gave can't be meant; nothing was done."""


class InvalidReferenceError(InputError):
    """An image reference doesn't parse."""

    _hint = "write it as [HOST[:PORT]/]REPOSITORY[:TAG][@sha256:HEX]"

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid image reference {self.text!r}: {self.reason}"


class OtherDigestError(InputError):
    """A push was to name a digest that is not that of the image; nothing was moved."""

    def __init__(self, target: str, digest: str) -> None:
        super().__init__(target, digest)
        self.target = target
        #: Digest of the image's manifest.
        self.digest = digest

    def __str__(self) -> str:
        return f"{self.target} names another image: the digest of this one is {self.digest}"

    @property
    def hint(self) -> str:
        """Return what the user can do next."""
        return f"push to a tag, or to {self.target.partition('@')[0]}@{self.digest}"


class InvalidDigestError(InputError):
    """A digest is not ``algorithm:hex`` of an algorithm we compute."""

    _hint = "a digest is sha256: and 64 lower-case hexadecimal digits"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"invalid digest {self.text!r}"


class InvalidArgumentError(InputError):
    """An argument of a call has a value that can't be meant."""

    def __init__(self, name: str, value: str, reason: str) -> None:
        super().__init__(name, value, reason)
        self.name = name
        self.value = value
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} can't be {self.value}: {self.reason}"


class InvalidOutputError(InputError):
    """An output of a build doesn't say where to."""

    _hint = "write it as type=oci|tar|local|image|registry,dest=PATH,name=IMAGE, or as DIR, or - for standard output"

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid output {self.text!r}: {self.reason}"


class InvalidDescriptorError(InputError):
    """A descriptor lacks something or contradicts itself."""

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(digest, reason)
        self.digest = digest
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid descriptor {self.digest}: {self.reason}"


class InvalidPlatformError(InputError):
    """A platform is not ``os/architecture[/variant]``."""

    _hint = "write it as os/architecture[/variant], for example linux/amd64"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"invalid platform {self.text!r}"


class InvalidPatternError(InputError):
    """A pattern for files, as in ``.dockerignore``, is malformed."""

    _hint = "write a backslash before *, ?, [, ! and - that are meant literally"

    def __init__(self, pattern: str, reason: str) -> None:
        super().__init__(pattern, reason)
        self.pattern = pattern
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid pattern {self.pattern!r}: {self.reason}"


class CacheOptionError(InputError):
    """What is given for ``--cache-to`` or ``--cache-from`` can't be meant."""

    _hint = "write type=registry,ref=HOST/REPOSITORY:TAG, that name alone, or type=s3,bucket=…,prefix=…,name=…"

    def __init__(self, option: str, text: str, reason: str) -> None:
        super().__init__(option, text, reason)
        self.option = option
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.option} {self.text!r}: {self.reason}"


class CacheTooLargeError(InputError):
    """A cache has more layers or results than its manifest and config may have bytes."""

    _hint = "export it with mode=min"

    def __init__(self, reference: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(reference, size_bytes, limit_bytes)
        self.reference = reference
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return (
            f"the cache for {self.reference} is too large: "
            f"a document of {self.size_bytes} bytes, of {self.limit_bytes} at most"
        )


class ScanError(InputError):
    """A local directory, or something in it, can't be taken into a build."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"can't take {self.path} into the build: {self.reason}"


class FileChangedError(InputError):
    """A local file changed between being scanned and being sent."""

    _hint = "build again when nothing writes to the directory"

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(path, expected)
        self.path = path
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.path} changed while it was sent: it was {self.expected}"


class InvalidTreeError(InputError):
    """A tree's manifest contradicts itself, or would reach out of its directory."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid tree at {self.path!r}: {self.reason}"


class BuildArgumentError(InputError):
    """A step of a build graph is called with something that it can't mean; *step* is image, run, copy and so on."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(step, reason)
        self.step = step
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.step}: {self.reason}"


# -- build graphs -------------------------------------------------------------------------------


class GraphError(InputError):
    """A build graph can't be meant, because of one vertex of it; nothing of it was run.

    *vertex* is its digest, *name* what the user calls it (may be empty).
    """

    def __init__(self, vertex: str, name: str, reason: str) -> None:
        super().__init__(vertex, name, reason)
        self.vertex = vertex
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        named = f"{self.name!r} ({self.vertex})" if self.name else self.vertex
        return f"vertex {named}: {self.reason}"


class CycleError(GraphError):
    """A vertex needs its own result."""


class UnknownVertexError(GraphError):
    """A vertex is named (as an input, a target, or by a display name) that the definition doesn't hold."""


class UnneededVertexError(GraphError):
    """No target needs a vertex of the definition."""


class InputCountError(GraphError):
    """An op has too few or too many inputs."""


class InputIndexError(GraphError):
    """A mount or a copy is from an input that the op doesn't have."""


class UnknownOpError(GraphError):
    """A vertex is of an op, or a version of one, that this release doesn't know."""

    _hint = "run the same release of lazyfarm in the driver and in the farm"


class MalformedOpError(GraphError):
    """An op's fields are not what its kind has."""


class VertexDigestError(GraphError):
    """A vertex is filed under another digest than its own."""

    _hint = "run the same release of lazyfarm in the driver and in the farm"


class EmptyGraphError(InputError):
    """There is nothing to build: the graph has no target."""

    _hint = "start from image() or local(); scratch() alone has nothing in it"

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return "the build graph has no target"


class DockerfileError(InputError):
    """A Dockerfile can't be built as it stands: it is wrong, or asks for what is not supported."""

    _hint = "correct that line, or build another --target that does not need it"

    def __init__(self, file: str, line: int, what: str) -> None:
        super().__init__(file, line, what)
        self.file = file
        #: From 1: where the instruction starts.
        self.line = line
        self.what = what

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


# -- bytes --------------------------------------------------------------------------------------


class ContentError(ClusterError):
    """Something is wrong with the bytes of a blob or a layer."""


class BlobNotFoundError(ContentError):
    """*where* (a registry repository, a foreign layer's address, the content store) has no such blob."""

    _hint = (
        "pull the image again from a repository that has all of it, or push it there again; "
        "a foreign layer must be had from its own address"
    )

    def __init__(self, digest: str, where: str) -> None:
        super().__init__(digest, where)
        self.digest = digest
        self.where = where

    def __str__(self) -> str:
        return f"blob {self.digest} is not in {self.where}"


class DigestMismatchError(ContentError):
    """Bytes arrived whole but hash to another digest: their source is wrong."""

    _hint = "the source serves wrong bytes; try another mirror, or push the image again"

    def __init__(self, expected: str, actual: str, source: str) -> None:
        super().__init__(expected, actual, source)
        self.expected = expected
        self.actual = actual
        self.source = source

    def __str__(self) -> str:
        return f"{self.source} served {self.actual} for {self.expected}"


class SizeMismatchError(ContentError):
    """A source has a blob of another size than its descriptor says."""

    _hint = "the source has another blob than the image names; try another mirror, or push the image again"

    def __init__(self, digest: str, expected_bytes: int, actual_bytes: int, source: str) -> None:
        super().__init__(digest, expected_bytes, actual_bytes, source)
        self.digest = digest
        self.expected_bytes = expected_bytes
        self.actual_bytes = actual_bytes
        self.source = source

    def __str__(self) -> str:
        return (
            f"{self.source} has {self.actual_bytes} bytes for {self.digest}, its descriptor says {self.expected_bytes}"
        )


class BlobDamagedError(ContentError):
    """A blob that was present is gone or damaged, in the content store or on a node, and was not had elsewhere."""

    _hint = "pull the image again, so that a provider is known and the blob can be fetched anew"

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(digest, reason)
        self.digest = digest
        self.reason = reason

    def __str__(self) -> str:
        return f"blob {self.digest} is lost: {self.reason}"


class TreeLostError(ContentError):
    """A driver's directory, or the content of a file in it, is not in the content store, or not any more."""

    _hint = "build again: what is not there is sent again"

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(digest, reason)
        self.digest = digest
        self.reason = reason

    def __str__(self) -> str:
        return f"local content {self.digest} is not in the content store: {self.reason}"


class LayerTooLargeError(ContentError):
    """A new layer is more than the content store takes as one object."""

    _hint = "make several layers of it, or raise fetch.part_bytes"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return f"a layer has more than {self.limit_bytes} bytes"


class LayerError(ContentError):
    """A layer can't be unpacked as it is: *entry* names the tar entry, or is empty for the whole."""

    _hint = "the layer itself is malformed, its bytes are as they were pushed: build the image again and push it"

    def __init__(self, digest: str, entry: str, reason: str) -> None:
        super().__init__(digest, entry, reason)
        self.digest = digest
        self.entry = entry
        self.reason = reason

    def __str__(self) -> str:
        at = f" at entry {self.entry!r}" if self.entry else ""
        return f"layer {self.digest} can't be unpacked{at}: {self.reason}"


class UnsafeEntryError(LayerError):
    """A tar entry would leave the root it is unpacked under."""

    _hint = "don't trust this image: a layer of it writes outside of its own root"


class LayerLimitError(LayerError):
    """A layer unpacks to more than a node takes: it is a bomb, or the limit is too low for it."""

    _hint = (
        "if the image is to be trusted, raise node.layer_bytes or node.layer_entries and run `lazyfarm up`; "
        "else don't use it"
    )

    def __init__(self, digest: str, what: str, limit: int) -> None:
        super().__init__(digest, "", f"it comes to more than {limit} {what}")
        self.args = (digest, what, limit)
        self.what = what
        self.limit = limit


class UnprivilegedEntryError(LayerError):
    """A tar entry needs a privilege that this node lacks, and leaving it out would change the result."""

    _hint = "run the farm as root, or extract on a node where it runs as root"


class DiffIdMismatchError(ContentError):
    """A layer unpacks to another diff ID than the image's config promises."""

    _hint = "the image's config and layers don't belong together; push the image again"

    def __init__(self, digest: str, expected: str, actual: str) -> None:
        super().__init__(digest, expected, actual)
        self.digest = digest
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"layer {self.digest} unpacks to diff ID {self.actual}, its image says {self.expected}"


class SnapshotError(ContentError):
    """A snapshot can't be prepared, published or mounted on a node."""

    _hint = "`lazyfarm doctor` on that node checks its disk, overlayfs and rights; node.snapshotter chooses another"

    def __init__(self, snapshot: str, doing: str, reason: str) -> None:
        super().__init__(snapshot, doing, reason)
        self.snapshot = snapshot
        self.doing = doing
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.doing} snapshot {self.snapshot}: {self.reason}"


class SnapshotGoneError(SnapshotError):
    """A snapshot is not on the node, or not any more; what is made of it works again once its chain is unpacked."""

    _hint = "`lazyfarm extract` unpacks it there (again); a build that is started again does so by itself"

    def __init__(self, snapshot: str, doing: str) -> None:
        super().__init__(snapshot, doing, "it is not on this node")
        self.args = (snapshot, doing)


# -- refs -----------------------------------------------------------------------------------------


class RefError(ClusterError):
    """Something is wrong with a ref or what it needs."""


class RefNotFoundError(RefError):
    """No ref or image is known by that name."""

    _hint = "`lazyfarm refs ls` lists what is known; `lazyfarm pull IMAGE` makes a ref"

    def __init__(self, ref: str) -> None:
        super().__init__(ref)
        self.ref = ref

    def __str__(self) -> str:
        return f"no ref or image {self.ref!r} is known to this farm"


class NotAnImageError(RefError):
    """A ref that is no image's top is used as an image."""

    _hint = "name the image, or the ref that `lazyfarm pull` printed for it"

    def __init__(self, ref: str) -> None:
        super().__init__(ref)
        self.ref = ref

    def __str__(self) -> str:
        return f"ref {self.ref} is the top of no image, so there is no manifest to push"


class NoLayersError(RefError):
    """An image without layers is asked for its ref."""

    _hint = "it needs none: extracting it gives an empty directory"

    def __init__(self, image: str) -> None:
        super().__init__(image)
        self.image = image

    def __str__(self) -> str:
        return f"image {self.image} has no layers, so it has no ref"


class AmbiguousRefError(RefError):
    """A shortened ref ID names several refs."""

    _hint = "give more digits of the ref ID"

    def __init__(self, ref: str, matches: int) -> None:
        super().__init__(ref, matches)
        self.ref = ref
        self.matches = matches

    def __str__(self) -> str:
        return f"{self.ref!r} names {self.matches} refs"


class RefReleasedError(RefError):
    """A ref object is used after its lease was released."""

    _hint = "get it anew: `farm.get(ID)`"

    def __init__(self, ref: str) -> None:
        super().__init__(ref)
        self.ref = ref

    def __str__(self) -> str:
        return f"ref {self.ref} was released"


class NonAddressableParentError(RefError):
    """A parent ref has no chain ID, or is unknown, so nothing can be put on top of it."""

    def __init__(self, parent: str) -> None:
        super().__init__(parent)
        self.parent = parent

    def __str__(self) -> str:
        return f"parent ref {self.parent} is unknown or can't be addressed"


class NeedsRemoteProvidersError(RefError):
    """Lazy blobs are needed and none of their providers can be used by this caller.

    Lists *every* such digest, so that a caller can come back once with handlers for all of them.
    """

    _hint = "pull the image again with credentials that may read it; build again what was built of it"

    def __init__(self, digests: tuple[str, ...]) -> None:
        super().__init__(tuple(digests))
        self.digests = tuple(digests)

    @property
    def needed_opts(self) -> tuple[str, ...]:
        """Return the names of the desc handlers of these digests."""
        return tuple(f"desc-handler:{digest}" for digest in self.digests)

    def __str__(self) -> str:
        return f"no usable provider for {len(self.digests)} lazy blob(s): {', '.join(self.digests)}"


# -- leases and fences ------------------------------------------------------------------------------


class LeaseError(ClusterError):
    """Something is wrong with a lease or a fence."""


class LeaseRequiredError(LeaseError):
    """A call that makes or uses a ref came without a live lease."""

    def __init__(self, doing: str) -> None:
        super().__init__(doing)
        self.doing = doing

    def __str__(self) -> str:
        return f"{self.doing} needs a live lease"


class LeaseLostError(LeaseError):
    """A lease has expired or was deleted: what it held may be collected."""

    _hint = "take a new lease and look the refs up again"

    def __init__(self, lease_id: str) -> None:
        super().__init__(lease_id)
        self.lease_id = lease_id

    def __str__(self) -> str:
        return f"lease {self.lease_id} is lost: it expired or was deleted"


class LeaseNotFoundError(LeaseError):
    """No live lease has that ID."""

    _hint = "list the live ones with `lazyfarm leases ls`"

    def __init__(self, lease_id: str) -> None:
        super().__init__(lease_id)
        self.lease_id = lease_id

    def __str__(self) -> str:
        return f"no live lease has the ID {self.lease_id!r}"


class StaleFenceError(LeaseError):
    """A write came from an owner that is no longer the owner; nothing was changed."""

    def __init__(self, key: str, fence: int) -> None:
        super().__init__(key, fence)
        self.key = key
        self.fence = fence

    def __str__(self) -> str:
        return f"fence {self.fence} no longer owns {self.key}"


# -- registries ---------------------------------------------------------------------------------------


class RegistryError(ClusterError):
    """A registry answered, and the answer is no."""


class ManifestNotFoundError(RegistryError):
    """A registry has no such tag or manifest."""

    _hint = "check the repository and the tag"

    def __init__(self, reference: str) -> None:
        super().__init__(reference)
        self.reference = reference

    def __str__(self) -> str:
        return f"{self.reference} is not in its registry"


class AccessDeniedError(RegistryError):
    """The caller's credentials don't allow it (401 after a refresh, or 403)."""

    def __init__(self, what: str, registry: str, reason: str) -> None:
        super().__init__(what, registry, reason)
        self.what = what
        self.registry = registry
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.registry} refuses access to {self.what}: {self.reason}"

    @property
    def hint(self) -> str:
        """Return what the user can do next."""
        return f"log in to {self.registry} (docker login, or an entry in config.json) with an account that may"


class UnsupportedManifestError(RegistryError):
    """A manifest is of a kind that is not supported."""

    _hint = "push the image again with a current client (OCI or Docker schema 2)"

    def __init__(self, reference: str, media_type: str, reason: str) -> None:
        super().__init__(reference, media_type, reason)
        self.reference = reference
        self.media_type = media_type
        self.reason = reason

    def __str__(self) -> str:
        return f"manifest of {self.reference} ({self.media_type}): {self.reason}"


class PlatformNotFoundError(RegistryError):
    """An image index has no manifest for the platform."""

    _hint = "choose one of them with --platform"

    def __init__(self, reference: str, platform: str, available: tuple[str, ...]) -> None:
        super().__init__(reference, platform, tuple(available))
        self.reference = reference
        self.platform = platform
        self.available = tuple(available)

    def __str__(self) -> str:
        return f"{self.reference} has no manifest for {self.platform} (it has {', '.join(self.available) or 'none'})"


class InsecureRegistryError(RegistryError):
    """Plain HTTP to a registry that is neither on loopback nor configured for it."""

    _hint = 'set registries."HOST".plain_http = true in the configuration, or pass --plain-http for this call'

    def __init__(self, registry: str) -> None:
        super().__init__(registry)
        self.registry = registry

    def __str__(self) -> str:
        return f"{self.registry} would be reached over plain HTTP"


class RegistryProtocolError(RegistryError):
    """A registry's answer breaks the distribution specification, or is an error it calls final."""

    _hint = (
        "the log of the registry, or of a proxy before it, says why; "
        "for a push, check that it may be written to and takes blobs of that size"
    )

    def __init__(self, doing: str, status: int, detail: str) -> None:
        super().__init__(doing, status, detail)
        self.doing = doing
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"{doing_status(self.doing, self.status)}: {self.detail}"


def doing_status(doing: str, status: int) -> str:
    """Join what was done and the HTTP status it got (0: none)."""
    return f"{doing}: HTTP {status}" if status else doing


class MalformedManifestError(RegistryError):
    """A manifest, index or image config doesn't parse or contradicts itself."""

    _hint = "the image was damaged or made by a broken tool; push it again"

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(reference, reason)
        self.reference = reference
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reference} is malformed: {self.reason}"


class NotACacheError(RegistryError):
    """There is something under a cache's name, and it is no cache that this release reads."""

    _hint = "export a cache there with --cache-to, or name another one"

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(reference, reason)
        self.reference = reference
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reference} holds no cache: {self.reason}"


class MalformedCacheError(RegistryError):
    """A remote cache doesn't parse or contradicts itself; *reference* is empty for one that is nowhere yet."""

    _hint = "export the cache again"

    def __init__(self, reference: str, reason: str) -> None:
        super().__init__(reference, reason)
        self.reference = reference
        self.reason = reason

    def __str__(self) -> str:
        return f"the cache {self.reference or 'itself'} is malformed: {self.reason}"


class ChallengedError(RegistryError):
    """A registry wants (other) credentials: HTTP 401. Internal: who has the session answers it and tries again."""

    def __init__(self, what: str, registry: str, challenge: str) -> None:
        super().__init__(what, registry, challenge)
        self.what = what
        self.registry = registry
        #: The ``WWW-Authenticate`` header; empty where there was none.
        self.challenge = challenge

    def __str__(self) -> str:
        return f"{self.registry} asks for authorization for {self.what}"


class RangeRefusedError(RegistryError):
    """A registry refuses a byte range (HTTP 416); the whole blob may still be had."""

    def __init__(self, what: str, source: str, offset: int) -> None:
        super().__init__(what, source, offset)
        self.what = what
        self.source = source
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.source} refuses {self.what} from byte {self.offset}"


class UntrustedCertificateError(RegistryError):
    """A registry's TLS certificate can't be verified."""

    _hint = 'set registries."HOST".ca_file in the configuration to the PEM file of the authority that signed it'

    def __init__(self, registry: str, reason: str) -> None:
        super().__init__(registry, reason)
        self.registry = registry
        self.reason = reason

    def __str__(self) -> str:
        return f"the certificate of {self.registry} is not trusted: {self.reason}"


class CredentialHelperError(RegistryError):
    """A credential helper could not be run or answered with an error; its output is never repeated."""

    def __init__(self, helper: str, registry: str, reason: str) -> None:
        super().__init__(helper, registry, reason)
        self.helper = helper
        self.registry = registry
        self.reason = reason

    def __str__(self) -> str:
        return f"credential helper {self.helper} for {self.registry}: {self.reason}"

    @property
    def hint(self) -> str:
        """Return what the user can do next."""
        return (
            f"check that `docker-credential-{self.helper} get` works for {self.registry} on this machine, "
            "or take it out of credHelpers and credsStore in config.json and log in again"
        )


# -- payloads ---------------------------------------------------------------------------------------


class WireError(ClusterError):
    """A payload from another process can't be read."""


class UnknownVersionError(WireError):
    """A payload is of a version or kind that this process doesn't know."""

    _hint = "the two ends run different releases: upgrade the older one"

    def __init__(self, kind: str, version: int) -> None:
        super().__init__(kind, version)
        self.kind = kind
        self.version = version

    def __str__(self) -> str:
        return f"payload {self.kind!r} of version {self.version} is unknown here"


class MalformedPayloadError(WireError):
    """A payload is truncated or doesn't have the shape its kind promises."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"payload {self.kind!r} can't be read: {self.reason}"


class RemoteError(ClusterError):
    """An error came from a process of another release, in a class that this one doesn't know."""

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name = type_name
        self.message = message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


# -- jobs ---------------------------------------------------------------------------------------------


class JobError(ClusterError):
    """Something is wrong with a job, a build that was submitted."""


class JobNotFoundError(JobError):
    """No job has that ID, or it ended so long ago that it is forgotten."""

    _hint = "`lazyfarm jobs ls` lists the jobs that are known"

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"no job {self.job!r} is known to this farm"


class AmbiguousJobError(JobError):
    """A shortened job ID names several jobs."""

    _hint = "give more of the job's ID"

    def __init__(self, job: str, matches: int) -> None:
        super().__init__(job, matches)
        self.job = job
        self.matches = matches

    def __str__(self) -> str:
        return f"{self.job!r} names {self.matches} jobs"


class JobEndedError(JobError):
    """A job has ended in *state* already; nothing was changed."""

    _hint = "`lazyfarm jobs show JOB` says how it ended"

    def __init__(self, job: str, state: str) -> None:
        super().__init__(job, state)
        self.job = job
        self.state = state

    def __str__(self) -> str:
        return f"job {self.job} has ended already: {self.state}"


class JobCancelledError(JobError):
    """A job was cancelled: by request, or because its driver was gone."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"job {self.job} was cancelled"


class JobIdTakenError(JobError):
    """Another job has been submitted under that ID; nothing was changed."""

    _hint = "submit it under an ID of its own"

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"job ID {self.job} is another job's"


# -- ops of builds ------------------------------------------------------------------------------------


class OpError(ClusterError):
    """An op of a build can't be carried out as it is written, on any node."""


class FileActionError(OpError):
    """A copy, or the making of a file or directory, can't be done at *path*."""

    def __init__(self, action: str, path: str, reason: str) -> None:
        super().__init__(action, path, reason)
        self.action = action
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.action} {self.path}: {self.reason}"


class UnknownUserError(OpError):
    """A user or group is given by a name that the root's ``/etc/passwd`` or ``/etc/group`` doesn't have."""

    _hint = "give it by number, or create it in an earlier step"

    def __init__(self, user: str, reason: str) -> None:
        super().__init__(user, reason)
        self.user = user
        self.reason = reason

    def __str__(self) -> str:
        return f"user {self.user!r}: {self.reason}"


class MissingSecretError(OpError):
    """A command needs a secret that the driver doesn't give."""

    _hint = "give it with the build: --secret id=ID,src=FILE"

    def __init__(self, secret_id: str) -> None:
        super().__init__(secret_id)
        self.secret_id = secret_id

    def __str__(self) -> str:
        return f"secret {self.secret_id!r} is required and was not given"


class UnusableSecretError(OpError):
    """A secret's value can't be given in the way that is asked for; the value is never repeated."""

    def __init__(self, secret_id: str, reason: str) -> None:
        super().__init__(secret_id, reason)
        self.secret_id = secret_id
        self.reason = reason

    def __str__(self) -> str:
        return f"secret {self.secret_id!r}: {self.reason}"


class SourceDateError(OpError):
    """A command's ``SOURCE_DATE_EPOCH`` is no time."""

    _hint = "give it seconds since 1970, as in `git log -1 --format=%ct`"

    def __init__(self, value: str) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return f"SOURCE_DATE_EPOCH is {self.value!r}, not a whole number of seconds"


class ProcessNotStartedError(OpError):
    """A command can't be started in its container: not found, not executable."""

    def __init__(self, command: tuple[str, ...], reason: str) -> None:
        super().__init__(tuple(command), reason)
        self.command = tuple(command)
        self.reason = reason

    def __str__(self) -> str:
        return f"{' '.join(self.command)!r} can't be started: {self.reason}"


class ProcessFailedError(OpError):
    """A command ended with another exit code than 0; 128 and up: by that signal."""

    def __init__(self, command: tuple[str, ...], exit_code: int, last_lines: tuple[str, ...]) -> None:
        super().__init__(tuple(command), exit_code, tuple(last_lines))
        self.command = tuple(command)
        self.exit_code = exit_code
        #: What it said last, secrets taken out.
        self.last_lines = tuple(last_lines)

    def __str__(self) -> str:
        return f"{' '.join(self.command)!r} ended with exit code {self.exit_code}"


class ProcessOutOfMemoryError(ProcessFailedError):
    """A command failed after the kernel killed some of its processes for want of memory."""

    _hint = "raise the step's memory limit, or have it do less at once"

    def __str__(self) -> str:
        return f"{super().__str__()}: out of memory"


class ContainerError(ClusterError):
    """A node can't do something for a container."""

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(doing, reason)
        self.doing = doing
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.doing}: {self.reason}"


class RuntimeMissingError(ContainerError):
    """A node can't run containers at all."""

    _hint = "apt-get install runc on the node, and run the farm there as root; `lazyfarm doctor` checks it"


class LimitUnavailableError(ContainerError):
    """A node can't keep a container to the limit that is asked for; nothing was run without it."""

    _hint = "give the node's processes a writable cgroup hierarchy, or leave the limit out"


# -- exports ------------------------------------------------------------------------------------------


class ExportError(ClusterError):
    """What was exported can't be put where it was to go: the disk refuses, or something else is there."""

    _hint = "name another destination, or make room for it; what was complete in a directory stays there"

    def __init__(self, destination: str, reason: str) -> None:
        super().__init__(destination, reason)
        self.destination = destination
        self.reason = reason

    def __str__(self) -> str:
        return f"export to {self.destination}: {self.reason}"


# -- the farm itself ----------------------------------------------------------------------------------


class FarmError(ClusterError):
    """The farm itself is not there, or not as it must be."""


class FarmNotRunningError(FarmError):
    """No farm runs under that state directory."""

    _hint = "start it with `lazyfarm up`, or name another with --state-dir or LAZYFARM_STATE_DIR"

    def __init__(self, state_dir: str, reason: str) -> None:
        super().__init__(state_dir, reason)
        self.state_dir = state_dir
        self.reason = reason

    def __str__(self) -> str:
        return f"no farm is running in {self.state_dir}: {self.reason}"


class PageNotRunningError(FarmError):
    """The farm runs, and has no page."""

    _hint = "set web.enabled = true in its configuration, or LAZYFARM__WEB__ENABLED=true, and call `lazyfarm up`"

    def __init__(self, state_dir: str) -> None:
        super().__init__(state_dir)
        self.state_dir = state_dir

    def __str__(self) -> str:
        return f"the farm in {self.state_dir} has no page"


class OtherClusterError(FarmError):
    """This process is connected to another Ray cluster than the farm's."""

    _hint = "use one process for each farm, or call ray.shutdown() between them"

    def __init__(self, current: str, wanted: str) -> None:
        super().__init__(current, wanted)
        self.current = current
        self.wanted = wanted

    def __str__(self) -> str:
        return f"this process is in the Ray cluster at {self.current}, the farm's is at {self.wanted}"


class FarmClosedError(FarmError):
    """A farm object is used after it was closed."""

    _hint = "connect again: what was made is still known to the farm"

    def __init__(self, farm: str) -> None:
        super().__init__(farm)
        self.farm = farm

    def __str__(self) -> str:
        return f"this connection to the farm {self.farm} was closed"


class GatewayRefusedError(FarmError):
    """The gateway doesn't take the token that it was shown, or was shown none."""

    _hint = "name the file that has its token, which is on the head: token_file=…, or LAZYFARM_TOKEN_FILE"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url

    def __str__(self) -> str:
        return f"the gateway at {self.url} refuses the token"


class GatewayNotTrustedError(FarmError):
    """The other end of a connection to the gateway doesn't prove that it is the gateway."""

    _hint = "name the file of the authority that its certificate is from: ca_file=…, or LAZYFARM_CA_FILE"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"the gateway at {self.url} is not trusted: {self.reason}"


class NotThroughGatewayError(FarmError):
    """What is asked for needs a machine of the farm; a driver outside it can't have it."""

    _hint = "run it on a machine of the farm, without LAZYFARM_URL"

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} doesn't go through a gateway"


class NotInstalledError(FarmError):
    """This installation is of drivers outside the cluster alone."""

    _hint = "pip install 'lazyfarm[farm]'; or name a gateway by LAZYFARM_URL"

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module

    def __str__(self) -> str:
        return f"this needs {self.module}, which is not installed"


class StartError(FarmError):
    """A part of the farm did not start; *log* is the file that says why."""

    _hint = "`lazyfarm doctor` says what is missing on this machine"

    def __init__(self, part: str, reason: str, log: str) -> None:
        super().__init__(part, reason, log)
        self.part = part
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        return f"{self.part} did not start: {self.reason}" + (f" (see {self.log})" if self.log else "")


class UnsafeStoreError(FarmError):
    """Redis or S3 is set up so that the farm's promises would not hold."""

    def __init__(self, store: str, setting: str, advice: str) -> None:
        super().__init__(store, setting, advice)
        self.store = store
        self.setting = setting
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.store} has {self.setting}"

    @property
    def hint(self) -> str:
        """Return what the user can do next."""
        return self.advice


class StoreFullError(FarmError):
    """The content store takes no more bytes; what it has can be read, and nothing new is kept."""

    _hint = "make room in the bucket, or raise its quota, and try again"

    def __init__(self, store: str, reason: str) -> None:
        super().__init__(store, reason)
        self.store = store
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.store} is full: {self.reason}"


class NodeNotFoundError(FarmError):
    """No live node has that ID."""

    _hint = "`lazyfarm status` lists the nodes"

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node

    def __str__(self) -> str:
        return f"no live node {self.node!r}"


class NodeDrainingError(NodeNotFoundError):
    """The node, or every live one (``any``), drains: it gets nothing new to do."""

    _hint = "`lazyfarm drain NODE --undo` has it take work again"

    def __str__(self) -> str:
        return "every live node drains" if self.node == "any" else f"node {self.node!r} drains: it takes nothing new"


class SessionGoneError(FarmError):
    """The session that was to answer for credentials is gone."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id)
        self.session_id = session_id

    def __str__(self) -> str:
        return f"session {self.session_id} is gone"


# -- no answer ---------------------------------------------------------------------------------------


class UnavailableError(ClusterError):
    """*what* did not answer, or answered that it can't just now; the outcome is unknown."""

    _hint = "try again; `lazyfarm doctor` says what is wrong if it stays so"

    retryable = True

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} is unavailable: {self.reason}"


class NodeDiskError(UnavailableError):
    """This node's disk is full or fails; another node may well do what this one can't."""

    _hint = (
        "`lazyfarm prune --nodes` removes what nobody holds from the nodes' disks; else free space there, give "
        "node.root a bigger one, lower node.cache_bytes, or wait longer: node.disk_wait_s"
    )

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class CircuitOpenError(UnavailableError):
    """A registry host failed again and again: for a while nobody in the cluster asks it.

    *failing_s* is for how long it has been given up, *last_failure* what it did last, *retry_in_s* when it is tried
    again (0: that is under way).
    """

    def __init__(self, host: str, failing_s: float, last_failure: str, retry_in_s: float) -> None:
        super().__init__(host, last_failure)
        self.args = (host, failing_s, last_failure, retry_in_s)
        self.host = host
        self.failing_s = failing_s
        self.last_failure = last_failure
        self.retry_in_s = retry_in_s

    def __str__(self) -> str:
        again = f"it is tried again in {self.retry_in_s:.1f} s" if self.retry_in_s else "it is being tried just now"
        return (
            f"{self.host} is unavailable: given up for {self.failing_s:.0f} s now, after {self.last_failure}; {again}"
        )

    @property
    def hint(self) -> str:
        """Return what the user can do next."""
        return f'try again then; registries."{self.host}".mirrors are asked meanwhile, where there are any'


class RedirectTargetError(UnavailableError):
    """The store that a registry redirects to did not answer; the registry itself did."""


class RateLimitedError(UnavailableError):
    """A registry answers 429; *retry_after_s* is what it asks for (0: it did not say)."""

    #: What its answer says is left; for who made the request, and told no further.
    quotas: tuple[Quota, ...] = ()

    def __init__(self, what: str, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what, reason)
        self.args = (what, reason, retry_after_s)
        self.retry_after_s = retry_after_s


class WorkerBusyError(UnavailableError):
    """A worker has as many calls under way as it takes; nothing was done. Ask again after *retry_after_s*."""

    _hint = "have fewer calls under way, wait for others to end theirs, or raise fetch.calls_per_node"

    def __init__(self, what: str, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what, reason)
        self.args = (what, reason, retry_after_s)
        self.retry_after_s = retry_after_s


class ActorLostError(UnavailableError):
    """An actor or its node went away during a call, or is not there just now; the call may be made again."""


class DeadlineExceededError(UnavailableError):
    """Something took longer than its deadline; the outcome is unknown."""


# -- groups ---------------------------------------------------------------------------------------------


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group that is no group: tasks that stand or fall together fail for one reason."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# -- our bugs -----------------------------------------------------------------------------------------


class InternalError(ClusterError):
    """Our bug: please report it with the story."""

    _hint = "this is a bug in lazyfarm: please report it with the logs of the state directory"

    def __init__(self, story: str) -> None:
        super().__init__(story)
        self.story = story

    def __str__(self) -> str:
        return f"internal error: {self.story}"


class InvalidTransitionError(InternalError):
    """A state got an event that it can't have in that state."""

    def __init__(self, subject: str, state: str, event: str) -> None:
        super().__init__(f"{subject} in state {state} got {event}")
        self.args = (subject, state, event)
        self.subject = subject
        self.state = state
        self.event = event
