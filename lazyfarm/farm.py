"""Farm: what a driver script uses. Asynchronous, and a blocking twin from the same methods.

A driver of the cluster has a :class:`lazyfarm.joined.farm.JoinedFarm`, one outside it a
:class:`lazyfarm.gateway.farm.GatewayFarm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from cluster import tracing
from cluster.audit import AuditEntry
from cluster.cache_options import CacheSource, CacheTarget, parse_cache_source, parse_cache_target
from cluster.collect.runner import Pruned
from cluster.collect.stock import Kept, Usage
from cluster.collect.values import Item
from cluster.collect.verify import Verified
from cluster.descriptor import Descriptor
from cluster.drain import UnderWay
from cluster.errors import FarmClosedError
from cluster.graph import Definition
from cluster.lease import Lease, LeaseId
from cluster.messages import (
    ExtractResult,
    NodePruneResult,
    NodeRecord,
    NodeUsageResult,
    PushResult,
    UnlazyResult,
)
from cluster.ports import AuditReader, LeaseStore
from cluster.progress import ProgressItem
from cluster.provider import DescHandler
from cluster.ref import ImageRecord, RefId, RefState
from cluster.reference import parse_reference
from lazyfarm.builds import BuildOptions, Builds, ResolvedImage
from lazyfarm.drain import DRAIN_S
from lazyfarm.gateway.access import Access, gateway_url
from lazyfarm.graph import Resolved, State
from lazyfarm.job import EventCallback, Job, Result
from lazyfarm.lease import FarmLease
from lazyfarm.operation import Operation, ProgressCallback
from lazyfarm.outputs import Output
from lazyfarm.ref import Ref
from lazyfarm.settings import load_settings
from storage.registry.credentials import CredentialSource

#: Bytes a second that verifying reads, if nobody says otherwise: a farm's builds go on beside it.
VERIFY_BYTES_PER_S = 100 * 1024.0**2


class Farm(ABC):
    """A running farm, joined as a driver.

    ::

        async with await Farm.connect() as farm:
            ref = await farm.pull("debian:12")
            print((await ref.extract()).path)
    """

    def __init__(self, name: str, *, lease_ttl_s: float) -> None:
        #: For messages.
        self._name = name
        #: Seconds that a lease lives without renewal, if nobody says otherwise.
        self._lease_ttl_s = lease_ttl_s
        self._is_closed = False
        #: Under way: ends of progress streams that are being told.
        self._ends: set[asyncio.Task[None]] = set()

    # -- joining and leaving -------------------------------------------------------------------------------

    @staticmethod
    async def connect(
        state_dir: Path | str | None = None,
        *,
        config: Path | str | None = None,
        credentials: CredentialSource | Mapping[str, tuple[str, str]] | None = None,
        keep: bool = False,
        token: str | None = None,
        token_file: Path | str | None = None,
        ca_file: Path | str | None = None,
    ) -> Farm:
        """Join a farm; or, from outside its cluster, its gateway: ``Farm.connect("https://farm.example.com:8443")``.

        Args:
            state_dir: Its state directory, or its gateway's address; None: ``LAZYFARM_URL`` or
                ``LAZYFARM_STATE_DIR``, or the default directory.
            config: A configuration file that names Redis, S3 and Ray, for a farm that has no state
                directory on this machine.
            credentials: Registry credentials: ``{"registry.example.com": (user, password)}``; None: docker's
                ``config.json`` and its credential helpers. They stay in this process.
            keep: Keep what this driver makes for ``cache.keep_s`` after it has gone, as the command line does;
                not where its ``async with`` body raises.
            token: What the gateway is shown.
            token_file: A file with it; None: ``LAZYFARM_TOKEN_FILE``.
            ca_file: Authorities (PEM) of the gateway's certificate; None: ``LAZYFARM_CA_FILE``, or this machine's.

        Raises:
            FarmNotRunningError: there is no farm. ConfigError: its settings can't be used.
            GatewayRefusedError, GatewayNotTrustedError, UnavailableError: the gateway's token or certificate is not
                what it should be, or it doesn't answer.
        """
        found = source_of(credentials)
        if (url := gateway_url(state_dir, config, os.environ)) is not None:
            from lazyfarm.gateway.farm import GatewayFarm  # noqa: PLC0415 - what only drivers outside need

            access = Access.of(url, os.environ, token=token, token_file=token_file, ca_file=ca_file)
            return await GatewayFarm.open(access, credentials=found, keep=keep)
        from lazyfarm.joined.farm import JoinedFarm  # noqa: PLC0415 - what drivers outside have no packages for

        settings = load_settings(Path(state_dir) if state_dir else None, Path(config) if config else None, os.environ)
        return await JoinedFarm.open(settings, credentials=found, keep=keep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(discard=error is not None)

    @abstractmethod
    async def close(self, *, discard: bool = False) -> None:
        """Give back what this driver holds, and leave. The process stays connected to Ray, which is Ray's way.

        Args:
            discard: Also give back what was to be kept: the work failed, or was cancelled.
        """

    @property
    @abstractmethod
    def session_id(self) -> str:
        """Return the ID of this driver's session."""

    # -- refs ------------------------------------------------------------------------------------------------

    def pull(
        self,
        image: str,
        *,
        platform: str | None = None,
        plain_http: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Operation[Ref]:
        """Resolve *image*: its manifest and config are read, its layers stay where they are.

        Raises:
            InvalidReferenceError: *image* doesn't parse. RegistryError: the registry says no.
        """
        return Operation(self, lambda stream: self.pull_told(image, platform, stream, plain_http=plain_http), progress)

    @abstractmethod
    async def get(self, ref: str) -> Ref:
        """Look up a ref by ID, by the first digits of its ID, or by the name or digest of its image.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
            NeedsRemoteProvidersError: this driver has no access to some of its blobs.
        """

    @tracing.begins("get by blob")
    async def get_by_blob(
        self,
        descriptor: Descriptor,
        parent: Ref | None = None,
        handlers: Sequence[DescHandler] = (),
        lease: FarmLease | None = None,
        image_ref: str | None = None,
    ) -> Ref:
        """Make or find the ref of one layer on top of *parent*, without moving its bytes.

        Raises:
            InvalidDescriptorError: it has no diff ID. LeaseLostError: the lease isn't live.
            RefReleasedError: *parent* was released.
            NeedsRemoteProvidersError: names every digest without a provider this driver may use.
        """
        self._raise_if_closed()
        if lease is not None:
            lease.raise_if_lost()
        if parent is not None:
            parent.raise_if_released()
        return await self.get_by_blob_under(
            lease.id if lease is not None else self.lease_id(), descriptor, parent, handlers, image_ref
        )

    @abstractmethod
    async def refs(self) -> list[RefState]:
        """Return every ref, most recently used first."""

    @abstractmethod
    async def images(self) -> list[ImageRecord]:
        """Return every image that was resolved, by name."""

    def push(
        self,
        ref: Ref | str | Result,
        target: str,
        *,
        plain_http: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Operation[PushResult]:
        """Push an image, or what a build came to, to *target*; a layer moves only if its registry has it nowhere.

        Raises:
            RefNotFoundError: it names nothing known. NotAnImageError: it is no image's top.
            RefReleasedError: it was released.
            RegistryError: the target says no.
        """
        return Operation(self, lambda stream: self._push(ref, target, stream, plain_http=plain_http), progress)

    @tracing.begins("push")
    async def _push(self, ref: Ref | str | Result, target: str, stream: str | None, *, plain_http: bool) -> PushResult:
        reference = parse_reference(target)
        if isinstance(ref, Result):
            found = await self.tag(ref, reference.name)
        else:
            found = await self.get(ref) if isinstance(ref, str) else ref
        found.raise_if_released()
        return await self.push_told(found, target, stream, plain_http=plain_http)

    # -- builds ----------------------------------------------------------------------------------------------------

    def solve(
        self,
        graph: State | Sequence[State] | Resolved | Definition,
        *,
        config: bytes | None = None,
        no_cache: bool = False,
        secrets: Mapping[str, bytes | str | Path] | None = None,
        labels: Mapping[str, str] | None = None,
        cache_from: Sequence[str | CacheSource] = (),
        cache_to: Sequence[str | CacheTarget] = (),
        detached: bool = False,
        on_event: EventCallback | None = None,
    ) -> Job:
        """Build what a graph describes; what is cached stays lazy.

        ::

            result = await farm.solve(image("debian:12").run("echo hello > /greeting"))
            print(result.ref.layers)

        Args:
            graph: A state, several (one result each), or a definition.
            config: Image config (JSON) of what is built; None: that of the image it is built upon.
            no_cache: Run every op afresh.
            secrets: By ID, for the secret mounts of ops: values, or paths of files. They stay in this process but
                for the commands that need them.
            labels: For people, as ``lazyfarm jobs`` shows them.
            cache_from: Remote caches to look in, as ``type=registry,ref=HOST/REPOSITORY:TAG``; one that isn't there
                is a miss.
            cache_to: Remote caches to write, as ``type=registry,ref=…[,mode=max]`` or ``type=inline``.
            detached: Go on when this driver is gone; only with credentials that the farm is configured with.
            on_event: Called with each event while the job is awaited.

        Returns:
            A job, to be awaited for its result.

        Raises:
            InvalidArgumentError: secrets that can't be read, or for a detached job.
            CacheOptionError: a remote cache that can't be meant.
            ScanError, FileChangedError: a local directory can't be read, when the job is submitted.
            ClusterError: what failed, from awaiting it; JobCancelledError if it was cancelled.
        """
        self._raise_if_closed()
        options = BuildOptions(
            config=config,
            no_cache=no_cache,
            labels=labels or {},
            cache_from=[parse_cache_source(each) if isinstance(each, str) else each for each in cache_from],
            cache_to=[parse_cache_target(each) if isinstance(each, str) else each for each in cache_to],
            detached=detached,
        )
        return self.builds.solve(graph, options, secrets=secrets or {}, on_event=on_event)

    async def submit(
        self,
        graph: State | Sequence[State] | Resolved | Definition,
        *,
        config: bytes | None = None,
        no_cache: bool = False,
        labels: Mapping[str, str] | None = None,
        cache_from: Sequence[str | CacheSource] = (),
        cache_to: Sequence[str | CacheTarget] = (),
    ) -> Job:
        """Submit a detached job and return it: it goes on whatever becomes of this driver. See :meth:`solve`."""
        job = self.solve(
            graph,
            config=config,
            no_cache=no_cache,
            labels=labels,
            cache_from=cache_from,
            cache_to=cache_to,
            detached=True,
        )
        return await job.submitted()

    @tracing.begins("tag")
    async def tag(self, result: Result, name: str, *, created_s: int | None = None) -> Ref:
        """Make an image of what a build came to, under *name* in this farm. No layer moves.

        Args:
            result: With one target.
            name: As of an image of a registry; the farm's image of that name is replaced.
            created_s: When it is said to be made, in seconds since 1970; None: when its top layer was, so that
                a build that is all cached makes the same image.

        Raises:
            InvalidReferenceError: *name* doesn't parse. InvalidArgumentError: *result* has several targets.
        """
        self._raise_if_closed()
        return await self.builds.tag(result, name, created_s=created_s)

    async def export(
        self,
        result: Result | Ref,
        output: str | Output,
        *,
        names: Sequence[str] = (),
        stdout: BinaryIO | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Write what a build came to, or an image, to this machine: layers are made present first.

        Args:
            result: A result with one target, or an image's ref.
            output: ``oci:DIR``, ``oci-archive:FILE``, ``local:DIR`` and the other forms that
                :func:`lazyfarm.outputs.parse_output` has, but those of images: for them there are :meth:`tag` and
                :meth:`push`.
            names: What a layout or archive calls the image.
            stdout: Where an archive goes that is written to standard output; None: to this process's own.
            progress: Called with each blob's progress.

        Raises:
            InvalidOutputError: *output* doesn't parse, or names nothing of this machine.
            NotAnImageError: a ref of no image. ExportError: it can't be written there.
        """
        self._raise_if_closed()
        await self.builds.export(result, output, names=names, stdout=stdout, progress=progress)

    async def job(self, job: str) -> Job:
        """Return the job of an ID, whoever submitted it; JobNotFoundError if there is none."""
        self._raise_if_closed()
        return await self.builds.find(job)

    async def resolve(self, image: str, *, platform: str | None = None, plain_http: bool = False) -> ResolvedImage:
        """Read what an image's name stands for now, and its config. No ref is made."""
        self._raise_if_closed()
        return await self.builds.resolve(image, platform=platform, plain_http=plain_http)

    # -- leases and nodes --------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lease(
        self, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None
    ) -> AsyncIterator[FarmLease]:
        """Hold a lease of one's own while the body runs; it is renewed, and deleted at the end.

        Args:
            ttl_s: Seconds it lives without renewal; None: ``cache.lease_ttl_s``.
            labels: For people, as ``lazyfarm leases`` shows them.

        Raises:
            InvalidArgumentError: *ttl_s* is not above 0.
        """
        self._raise_if_closed()
        lease = FarmLease(self.lease_store, LeaseId(f"user-{secrets.token_hex(8)}"))
        async with lease.held(ttl_s=self._lease_ttl_s if ttl_s is None else ttl_s, labels=labels):
            yield lease

    @abstractmethod
    async def pin(self, ref: Ref, *, ttl_s: float | None = None, labels: Mapping[str, str] | None = None) -> Lease:
        """Keep a ref, and all that it stands on, when this driver has long gone; a lazy one stays lazy.

        Args:
            ref: What to keep.
            ttl_s: Seconds for which it is kept; None: until :meth:`unpin`.
            labels: For people, as ``lazyfarm leases`` shows them.

        Raises:
            RefReleasedError: *ref* was released. RefNotFoundError: it is gone.
            InvalidArgumentError: *ttl_s* is not above 0.
        """

    @abstractmethod
    async def unpin(self, lease_id: LeaseId) -> None:
        """Let go of what :meth:`pin` keeps; LeaseNotFoundError where no live lease has that ID."""

    async def leases(self) -> list[Lease]:
        """Return the live leases."""
        self._raise_if_closed()
        return await self.lease_store.leases()

    @abstractmethod
    async def du(self) -> Usage:
        """Return what the content store is used for: by ref and by image, what is in use, and what is avoided."""

    @abstractmethod
    async def prune(
        self,
        *,
        everything: bool = False,
        keep_bytes: int = 0,
        keep_duration_s: float = 0.0,
        filters: Sequence[str] = (),
        dry_run: bool = False,
        on_removed: Callable[[Item], object] = lambda _: None,
    ) -> Pruned:
        """Remove from the content store what nobody holds. What this driver made is held as long as it lives.

        A ref goes after all that stands on it. A blob turns lazy where a ref that stays has it, and its object is
        deleted ``collect.grace_s`` later.

        Args:
            everything: Also what others share: blobs that several refs have, refs that several images have.
            keep_bytes: Bytes that may stay; what was used longest ago and least often goes first. 0: nothing need.
            keep_duration_s: Seconds since its last use for which a ref stays, and what it stands on.
            filters: ``FIELD==VALUE``, ``!=`` or ``~=REGEX``, several with commas; what matches one of them may go.
                Fields: id, parents, type, description, inuse, shared, private, lazy.
            dry_run: Only say what would go.
            on_removed: Told of each item as it goes.

        Raises:
            InvalidArgumentError: a filter can't be read, or a number is below 0.
        """

    @abstractmethod
    async def node_usage(self, node: str | None = None) -> list[NodeUsageResult]:
        """Return what lies on nodes' disks, and what holds it: snapshots, cached blobs, cache mounts of commands.

        Args:
            node: Which one; None: every live node.

        Raises:
            NodeNotFoundError: there is no such live node.
            SnapshotError, ContainerError: a node's disk refused.
        """

    @abstractmethod
    async def prune_nodes(
        self,
        node: str | None = None,
        *,
        keep_bytes: int = 0,
        keep_duration_s: float = 0.0,
        filters: Sequence[str] = (),
        dry_run: bool = False,
    ) -> list[NodePruneResult]:
        """Remove from nodes' disks what nothing needs there; what is in the bucket stays.

        Needed is the snapshot of a chain that a lease holds a ref of, what such a one stands on, and what a process
        of the node uses. What an earlier extract has mounted is not, once no lease holds it any more.

        Args:
            node: Which one; None: every live node.
            keep_bytes: Bytes that may stay on each node; what was used longest ago goes first. 0: nothing need.
            keep_duration_s: Seconds since its last use for which something stays, and what it stands on.
            filters: As of :meth:`prune`. Types are ``regular`` (snapshots and blobs) and ``exec.cachemount``; IDs begin
                with ``snapshot``, ``blob`` or ``cache``.
            dry_run: Only say what would go.

        Raises:
            InvalidArgumentError: a filter can't be read, or a number is below 0.
            NodeNotFoundError: there is no such live node.
            SnapshotError, ContainerError: a node's disk refused.
        """

    @abstractmethod
    async def verify(
        self,
        *refs: str,
        repair: bool = False,
        bytes_per_s: float = VERIFY_BYTES_PER_S,
        on_verified: Callable[[Verified], object] = lambda _: None,
    ) -> Verified:
        """Read blobs that are present, in the content store and in the nodes' caches, and compare their digests.

        All fetch workers share the work. A node's copy that is damaged is dropped in any case.

        Args:
            refs: Whose blobs: refs' IDs, the first digits of these, or images; none: all that are present.
            repair: Turn lazy what is missing or damaged, so that it is fetched anew when somebody needs it. Damaged
                objects are kept under ``quarantine/`` for a week.
            bytes_per_s: What all nodes together read of the content store in a second; 0: as fast as it goes.
            on_verified: Told what has come of it so far, now and then.

        Raises:
            RefNotFoundError, AmbiguousRefError: a ref names none, or several.
            InvalidArgumentError: the rate is below 0.
        """

    @abstractmethod
    async def kept(self, ref: str) -> Kept:
        """Return why a ref is kept: leases on it and on what stands on it, and which refs do.

        Args:
            ref: Its ID, the first digits of that, or the image that it is the top of.

        Raises:
            RefNotFoundError, AmbiguousRefError: it names none, or several.
        """

    @abstractmethod
    async def audit(
        self, *, last_s: float | None = None, job: str = "", digest: str = "", operation: str = ""
    ) -> list[AuditEntry]:
        """Return what the audit stream has: who had what done with which layer, as whom and from where. Oldest first.

        Args:
            last_s: Of the last so many seconds; None: all that is kept, which ``audit`` in the configuration says.
            job: Of this job alone: its ID, or how that begins.
            digest: Of this blob or manifest alone: its digest, or how that begins.
            operation: One of :class:`cluster.audit.Operation`.

        Raises:
            UnavailableError: Redis doesn't answer.
        """

    @abstractmethod
    async def drain(
        self, node: str, *, timeout_s: float = DRAIN_S, on_left: Callable[[UnderWay], object] = lambda _: None
    ) -> UnderWay:
        """Have a node get no new ops, fetches or extracts, and wait until those that it has are over.

        It drains until :meth:`undrain`, also when it, or anything else of the farm, is started again. What is left
        at the timeout goes on; when the node is stopped, others take it over.

        Args:
            node: Its name.
            timeout_s: Seconds to wait for.
            on_left: Told what is under way there, at each look.

        Returns:
            What is left under way there.

        Raises:
            NodeNotFoundError: there is no such node. InvalidArgumentError: *timeout_s* is below 0.
        """

    @abstractmethod
    async def undrain(self, node: str) -> None:
        """Have a node take work again; NodeNotFoundError where there is no such node."""

    @abstractmethod
    async def nodes(self) -> list[NodeRecord]:
        """Return the cluster's nodes."""

    @abstractmethod
    async def page(self) -> str:
        """Return the address that opens the farm's page, with the token in it: a secret.

        Raises:
            PageNotRunningError: there is none; or it is on another machine, that of the state directory.
        """

    # -- for what is built upon a farm -------------------------------------------------------------------------

    @abstractmethod
    async def pull_told(self, image: str, platform: str | None, stream: str | None, *, plain_http: bool) -> Ref:
        """Resolve an image, and tell a progress stream of it."""

    @abstractmethod
    async def push_told(self, found: Ref, target: str, stream: str | None, *, plain_http: bool) -> PushResult:
        """Push a ref's image, and tell a progress stream of it."""

    @abstractmethod
    async def get_by_blob_under(
        self,
        lease_id: LeaseId,
        descriptor: Descriptor,
        parent: Ref | None,
        handlers: Sequence[DescHandler],
        image_ref: str | None,
    ) -> Ref:
        """Make or find the ref of one layer, held by a lease."""

    @abstractmethod
    async def states(self, ref_ids: Sequence[RefId]) -> list[RefState | None]:
        """Return the records of refs, in bulk."""

    @abstractmethod
    async def chain(self, ref_id: RefId) -> list[RefState]:
        """Return a ref and all below it, lowest first."""

    @abstractmethod
    async def hold(self, ref_ids: Sequence[RefId]) -> None:
        """Attach refs to this driver's lease."""

    @abstractmethod
    async def unlazy_chain(self, ref: Ref, stream: str | None) -> UnlazyResult:
        """Unlazy a ref's whole chain at one worker."""

    @abstractmethod
    async def extract_chain(self, ref: Ref, node: str | None, stream: str | None) -> ExtractResult:
        """Extract a ref's chain on a node; NodeDrainingError where that takes nothing new."""

    @abstractmethod
    def follow(self, stream: str) -> AsyncIterator[ProgressItem]:
        """Yield a progress stream's items from its start to its end."""

    def end_stream(self, stream: str) -> None:
        """End a progress stream: whoever follows it stops."""
        task = asyncio.create_task(self._tell_end(stream))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    @abstractmethod
    async def _tell_end(self, stream: str) -> None:
        """Tell who follows a progress stream that it is over."""

    async def _ends_told(self) -> None:
        """Wait a little for what :meth:`end_stream` began."""
        if self._ends:
            await asyncio.wait(self._ends, timeout=1.0)

    @abstractmethod
    def lease_id(self) -> LeaseId:
        """Return the lease of this driver, if it is live."""

    @property
    @abstractmethod
    def builds(self) -> Builds:
        """Return this driver's jobs."""

    @property
    @abstractmethod
    def lease_store(self) -> LeaseStore:
        """Return where leases are kept."""

    @property
    @abstractmethod
    def audit_reader(self) -> AuditReader:
        """Return the audit stream."""

    def _raise_if_closed(self) -> None:
        if self._is_closed:
            raise FarmClosedError(self._name)


def source_of(credentials: CredentialSource | Mapping[str, tuple[str, str]] | None) -> CredentialSource:
    """Return where a driver's credentials come from; None: from docker's files and helpers."""
    if isinstance(credentials, CredentialSource):
        return credentials
    if credentials is None:
        return CredentialSource.from_environment(os.environ)
    return CredentialSource(credentials)
