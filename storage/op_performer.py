"""Ops carried out on one node: on the snapshots of their inputs, to a layer, its snapshot here, and a ref.

The layer goes to S3 while it is written, and the tree that it is written from becomes its snapshot: the next op on
this node finds that there without unpacking anything. The result is recorded last. What fails before leaves a blob
at most, which its flight's lease holds for a while.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, TypeVar, assert_never

import structlog

from cluster.descriptor import Compression, Descriptor
from cluster.digest import EMPTY_CHAIN, Digest, digest_of
from cluster.disk_room import BoundlessDisk, NodeDisk, Part
from cluster.errors import (
    ClusterError,
    DeadlineExceededError,
    InternalError,
    NodeDiskError,
    RefNotFoundError,
    SnapshotError,
    SourceDateError,
)
from cluster.faultpoints import FaultPoint, ahit
from cluster.graph import DiffOp, FileOp, ImageOp, LocalOp, MergeOp, Op, RunOp, Vertex, content_inputs
from cluster.job import LogStream
from cluster.lease import LeaseId, blob_resource
from cluster.ports import LeaseStore, RefStore
from cluster.provider import FARM
from cluster.ref import RefId, RefRecord
from storage.containers.logs import LogLine, LogSink
from storage.containers.runc import Runc
from storage.file_ops.actions import describe, perform
from storage.file_ops.checksum import content_digest, mount_digest
from storage.layer_upload import LayerStore
from storage.local_trees import LocalTrees
from storage.snapshots import LayeredSnapshotter
from storage.snapshots.tree import Tree
from storage.snapshots.workspace import StagedWorkspace
from storage.to_the_end import to_the_end

_log = structlog.get_logger(__name__)

#: Gives a secret's value by its ID; None where there is none.
SecretSource = Callable[[str], Awaitable[bytes | None]]

T = TypeVar("T")

#: Of a layer without entries: its tar is two blocks of zeros.
_EMPTY_DIFF_ID: Final = digest_of(bytes(1024))
_SOURCE_DATE: Final = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_DESCRIPTION_CHARACTERS: Final = 200
#: Room that the disk must have, beyond what is reserved and what is never used, for an op to begin.
_BEGINNING_BYTES: Final = 1024**2
#: What a call calls its workspaces and mounts: whose they are, by process ID and start, then a nonce and an input.
_NAME: Final = re.compile(r"op-(\d+)-(\d+)-[0-9a-f]+(?:-\d+)?\Z", re.ASCII)


class _StoppedError(Exception):
    """Nobody waits any more."""


class OpPerformer:
    """Carries ops out on one node.

    A call that is cancelled or out of time returns when all that it began has stopped, and leaves no container,
    mount, workspace or unfinished upload behind. What a killed process leaves, :meth:`recover` undoes, and
    ``recover`` of the parts.

    Args:
        snapshotter: This node's. The snapshots of inputs are published in it and stay as long as a call lasts.
        containers: Runs commands.
        trees: What drivers have sent.
        layers: Makes layers present.
        refs: Where results are recorded.
        leases: Hold results' blobs.
        threads: For what blocks: one a call at a time.
        disk: Where all of this lies.
        compression: Of the layers.
    """

    def __init__(
        self,
        *,
        snapshotter: LayeredSnapshotter,
        containers: Runc,
        trees: LocalTrees,
        layers: LayerStore,
        refs: RefStore,
        leases: LeaseStore,
        threads: Executor,
        compression: Compression,
        disk: NodeDisk | None = None,
    ) -> None:
        self._snapshotter = snapshotter
        self._containers = containers
        self._trees = trees
        self._layers = layers
        self._refs = refs
        self._leases = leases
        self._threads = threads
        self._compression = compression
        self._disk = disk or BoundlessDisk()

    def __repr__(self) -> str:
        return f"OpPerformer({self._snapshotter!r}, {self._compression.value})"

    async def run(
        self,
        vertex: Vertex,
        inputs: Sequence[RefId | None],
        *,
        lease_id: LeaseId,
        secrets: SecretSource,
        log: LogSink,
        timeout_s: float,
        origins: Sequence[str] = (),
        disk_wait_s: float | None = None,
    ) -> RefId | None:
        """Carry a run, file, local or diff op out; return the top ref of what comes of it, None: an empty filesystem.

        Where nothing is changed that is input 0's. Else the new ref and its blob are held by the lease.

        Args:
            vertex: The op.
            inputs: Top refs of its inputs, in its order; None: an empty filesystem.
            lease_id: A live lease, which holds the inputs.
            secrets: Asked for each secret that the op names, one after the other, before anything is made. What it
                gives goes into the container and nowhere else.
            log: Takes what a command says.
            timeout_s: Longest that all of it may take.
            origins: By what the new ref is open (:mod:`cluster.origin`); none: to nobody.
            disk_wait_s: Seconds to wait for room on the disk; None: as configured.

        Raises:
            OpError: the op can't be carried out as it is written, or its command failed.
            TreeLostError: the farm lacks a part of a local op's tree.
            ContainerError: this node can't run the command.
            SnapshotError, NodeDiskError: this node's kernel or disk refused, or an input's snapshot isn't here.
            RefNotFoundError: an input is unknown.
            LeaseLostError: there is no such live lease.
            LayerTooLargeError: what was made is more than the content store takes.
            DeadlineExceededError: *timeout_s* have passed.
            UnavailableError: Redis, S3 or who has the secrets did not answer.
        """
        async with _deadline(_description(vertex.op), timeout_s) as limit:
            call = _Call(name=_new_name(), op=vertex.op, lease_id=lease_id, limit=limit, origins=tuple(origins))
            records = await self._records(inputs)
            await self._await_room(call, log, disk_wait_s)
            await ahit(FaultPoint.OP_BEGUN)
            match vertex.op:
                case RunOp() as op:
                    made = await self._run(call, op, records, secrets, log)
                case FileOp() as op:
                    made = await self._file(call, op, records)
                case LocalOp() as op:
                    made = await self._local(call, op)
                case DiffOp():
                    lower, upper = records
                    made = await self._diff(call, lower, upper)
                case ImageOp() | MergeOp():
                    raise InternalError(f"a {vertex.kind} op is not carried out on a node")
                case _:
                    assert_never(vertex.op)
        return None if made is None else made.id

    async def content_key(self, vertex: Vertex, index: int, source: RefId | None, *, timeout_s: float) -> Digest:
        """Return the digest of what an op is shown of the files of one of its inputs.

        Args:
            vertex: A file or run op.
            index: One of its :func:`cluster.graph.content_inputs`.
            source: That input's top ref, whose snapshot is here; None: an empty filesystem.
            timeout_s: Longest that it may take.

        Raises:
            FileActionError: the op could not be carried out: what it names is missing, or can't be read.
            SnapshotError: the snapshot isn't on this node.
            RefNotFoundError, DeadlineExceededError, UnavailableError: as :meth:`run`.
        """
        async with _deadline(f"content key of {_description(vertex.op)}", timeout_s):
            (record,) = await self._records([source])
            match vertex.op:
                case FileOp() as op if index in content_inputs(op):
                    digest = partial(content_digest, op)
                case RunOp() as op if index in content_inputs(op):
                    digest = partial(mount_digest, op)
                case _:
                    raise InternalError(f"input {index} of a {vertex.kind} op has no content key")

            def of_tree(checkpoint: Callable[[], None]) -> Digest:
                with self._snapshotter.hold(_chain(record), "reading"):
                    return digest(index, self._snapshotter.tree(_chain(record)), checkpoint=checkpoint)

            return await self._stoppable(of_tree)

    def recover(self) -> list[str]:
        """Undo the mounts that killed processes of this node left; return their names. Blocks.

        Called after :meth:`Runc.recover`, which ends what runs in them. Those of live processes are left alone.

        Raises:
            SnapshotError: the kernel refused.
        """
        left = [name for name in self._snapshotter.mounts() if _is_abandoned(name)]
        for name in left:
            self._snapshotter.unmount(name)
        return left

    # -- each kind ----------------------------------------------------------------------------------------

    async def _run(
        self, call: _Call, op: RunOp, inputs: Sequence[RefRecord | None], secrets: SecretSource, log: LogSink
    ) -> RefRecord | None:
        epoch = _source_date_epoch(op)
        values: dict[str, bytes] = {}
        for secret_id in dict.fromkeys(mount.id for mount in op.secrets):
            value = await secrets(secret_id)
            if value is not None:
                values[secret_id] = value
        async with self._workspace(inputs[0], call.name) as workspace:
            async with self._bound(call, op, inputs) as binds:
                await self._containers.run(
                    op, workspace.path, binds=binds, secrets=values, log=log, timeout_s=call.left_s
                )
            await ahit(FaultPoint.OP_RAN)
            return await self._keep(call, workspace, inputs[0], source_date_epoch=epoch)

    async def _file(self, call: _Call, op: FileOp, inputs: Sequence[RefRecord | None]) -> RefRecord | None:
        def carry_out(checkpoint: Callable[[], None]) -> None:
            with ExitStack() as held:
                trees: dict[int, Tree] = {}
                for index in content_inputs(op):
                    chain = _chain(inputs[index])
                    held.enter_context(self._snapshotter.hold(chain, "reading"))
                    trees[index] = self._snapshotter.tree(chain)
                perform(op, workspace.path, trees, ledger=workspace.ledger, checkpoint=checkpoint)

        async with self._workspace(inputs[0], call.name) as workspace:
            await self._stoppable(carry_out)
            return await self._keep(call, workspace, inputs[0])

    async def _local(self, call: _Call, op: LocalOp) -> RefRecord | None:
        tree = await self._trees.open_tree(op.tree)
        async with self._workspace(None, call.name) as workspace:
            await self._trees.materialise(tree, workspace.path)
            return await self._keep(call, workspace, None)

    async def _diff(self, call: _Call, lower: RefRecord | None, upper: RefRecord | None) -> RefRecord | None:
        below = None if lower is None else lower.chain
        stored = await self._put(call, lambda out: self._snapshotter.diff(_chain(upper), below, out))
        # No snapshot is published: what the layer deletes means something only where it is merged onto another.
        return None if stored.diff_id == _EMPTY_DIFF_ID else await self._record(call, stored, None)

    # -- results ------------------------------------------------------------------------------------------

    async def _keep(
        self,
        call: _Call,
        workspace: StagedWorkspace,
        parent: RefRecord | None,
        *,
        source_date_epoch: int | None = None,
    ) -> RefRecord | None:
        """Make a layer, a snapshot and a ref of what has changed; return the parent where nothing has."""
        if await self._in_thread(workspace.is_unchanged):
            return parent
        layer = await self._put(call, partial(workspace.commit, source_date_epoch=source_date_epoch))
        record = RefRecord.over(layer, parent)
        await self._in_thread(partial(workspace.publish, record.chain))
        return await self._record(call, layer, parent)

    async def _put(self, call: _Call, write_tar: Callable[[BinaryIO], Digest]) -> Descriptor:
        """Make the layer present, and hold it; return its descriptor."""

        async def hold(resource: str) -> None:
            await self._leases.attach(call.lease_id, [resource])

        stored = await self._layers.put_layer(
            write_tar, compression=self._compression, deadline_s=call.left_s, hold=hold
        )
        await ahit(FaultPoint.LAYER_COMMITTED)
        await self._leases.attach(call.lease_id, [blob_resource(stored.descriptor.digest)])
        return stored.descriptor

    async def _record(self, call: _Call, layer: Descriptor, parent: RefRecord | None) -> RefRecord:
        record = replace(RefRecord.over(layer, parent), description=_description(call.op), origins=call.origins)
        (state,) = await self._refs.get_or_create([record], {layer.digest: (FARM,)}, lease_id=call.lease_id)
        return state.record

    # -- what is worked on --------------------------------------------------------------------------------

    async def _records(self, ref_ids: Sequence[RefId | None]) -> list[RefRecord | None]:
        wanted = list(dict.fromkeys(ref_id for ref_id in ref_ids if ref_id is not None))
        records: dict[RefId, RefRecord] = {}
        for ref_id, state in zip(wanted, await self._refs.get(wanted) if wanted else (), strict=True):
            if state is None:
                raise RefNotFoundError(ref_id)
            records[ref_id] = state.record
        return [None if ref_id is None else records[ref_id] for ref_id in ref_ids]

    async def _await_room(self, call: _Call, log: LogSink, wait_s: float | None) -> None:
        """Wait until the disk has some room. What an op will write nobody can know: that is not reserved."""

        async def tell(said: str) -> None:
            await log([LogLine(LogStream.STDERR, f"waiting for disk: {said}")])

        part = Part(key=call.name, likely_bytes=_BEGINNING_BYTES, least_bytes=_BEGINNING_BYTES)
        async with self._disk.reserved(_description(call.op), [part], tell, wait_s=wait_s):
            pass

    @asynccontextmanager
    async def _workspace(self, parent: RefRecord | None, name: str) -> AsyncIterator[StagedWorkspace]:
        """Lend a workspace; what was not published of it in the end is dropped."""
        # Kept by the thread: a caller that is cancelled meanwhile doesn't get it.
        opened: list[StagedWorkspace] = []
        chain = None if parent is None else parent.chain
        try:
            await self._in_thread(lambda: opened.append(self._snapshotter.workspace(chain, name)))
            yield opened[0]
        finally:
            for workspace in opened:
                await self._undo(workspace.discard)

    @asynccontextmanager
    async def _mounted(self, ref: RefRecord | None, name: str) -> AsyncIterator[Path]:
        """Lend a snapshot's tree, to be read."""
        try:
            yield await self._in_thread(partial(self._snapshotter.mount, _chain(ref), name))
        finally:
            await self._undo(partial(self._snapshotter.unmount, name))

    @asynccontextmanager
    async def _bound(
        self, call: _Call, op: RunOp, inputs: Sequence[RefRecord | None]
    ) -> AsyncIterator[Mapping[int, Path]]:
        """Lend the trees of the inputs of bind mounts; what is written to them is dropped."""
        writable = {mount.input for mount in op.binds if not mount.is_read_only}
        async with AsyncExitStack() as stack:
            paths: dict[int, Path] = {}
            for index in sorted({mount.input for mount in op.binds}):
                name = f"{call.name}-{index}"
                if index in writable:
                    paths[index] = (await stack.enter_async_context(self._workspace(inputs[index], name))).path
                else:
                    paths[index] = await stack.enter_async_context(self._mounted(inputs[index], name))
            yield paths

    # -- in threads ---------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do what can't be stopped midway, in a thread; where this is cancelled, return when it has ended."""
        return await to_the_end(asyncio.get_running_loop().run_in_executor(self._threads, work))

    async def _stoppable(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Do what calls a checkpoint now and then, in a thread; where this is cancelled, return when it has stopped."""
        stop = threading.Event()

        def checkpoint() -> None:
            if stop.is_set():
                raise _StoppedError

        running = asyncio.get_running_loop().run_in_executor(self._threads, work, checkpoint)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            with suppress(ClusterError, _StoppedError):
                await to_the_end(running)
            raise

    async def _undo(self, work: Callable[[], None]) -> None:
        """Undo a mount or a workspace: where the node won't, that is not what became of the op."""
        try:
            await self._in_thread(work)
        except (SnapshotError, NodeDiskError) as exc:
            _log.warning("op.left_behind", error=str(exc))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One op that is carried out."""

    #: Of its workspace, and the beginning of its mounts' names.
    name: str
    op: Op
    lease_id: LeaseId
    limit: asyncio.Timeout
    #: By what the result is open.
    origins: tuple[str, ...]

    @property
    def left_s(self) -> float:
        """Return the seconds that are left."""
        when = self.limit.when()
        assert when is not None  # noqa: S101  # it has a deadline
        return max(0.0, when - asyncio.get_running_loop().time())


@asynccontextmanager
async def _deadline(doing: str, timeout_s: float) -> AsyncIterator[asyncio.Timeout]:
    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield limit
    except TimeoutError as exc:
        raise DeadlineExceededError(doing, f"not done within {timeout_s:g} s") from exc


def _chain(record: RefRecord | None) -> Digest:
    return EMPTY_CHAIN if record is None else record.chain


def _source_date_epoch(op: RunOp) -> int | None:
    """Return the time that an op's environment gives for all that it makes; None where it gives none.

    Raises:
        SourceDateError: it is no whole number.
    """
    value = dict(op.env).get("SOURCE_DATE_EPOCH")
    if value is None:
        return None
    if _SOURCE_DATE.match(value) is None:
        raise SourceDateError(value)
    return int(value)


def _description(op: Op) -> str:
    """Say in a line what an op does."""
    match op:
        case RunOp(args=args):
            said = f"run {' '.join(args)}"
        case FileOp(actions=actions):
            said = "; ".join(map(describe, actions))
        case LocalOp(tree=tree):
            said = f"local {tree}"
        case DiffOp():
            said = "diff"
        case MergeOp():
            said = "merge"
        case ImageOp(reference=reference):
            said = f"image {reference}"
        case _:
            assert_never(op)
    said = " ".join(said.split())
    return said if len(said) <= _DESCRIPTION_CHARACTERS else f"{said[: _DESCRIPTION_CHARACTERS - 1]}…"


# -- names ------------------------------------------------------------------------------------------------


def _new_name() -> str:
    pid = os.getpid()
    return f"op-{pid}-{_started(pid)}-{uuid.uuid4().hex[:16]}"


def _is_abandoned(name: str) -> bool:
    """Tell whether a mount was made for an op by a process that is not there any more."""
    match = _NAME.match(name)
    return match is not None and _started(int(match[1])) != int(match[2])


def _started(pid: int) -> int | None:
    """Return when a process was started, in the kernel's ticks since boot; None where there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command's name, in brackets, may have anything in it. The 22nd field is the 20th after it.
    return int(status.rpartition(")")[2].split()[19])
